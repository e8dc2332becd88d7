"""Says what is here, what a training will use of it, and what to do where something is missing.

    python -m megatron_moa.doctor                     what is here; exit code 0 if training can start, else 1
    python -m megatron_moa.doctor --smoke             and trains a tiny mixture for five steps
    python -m megatron_moa.doctor --recipe moe-2b     and how GPUs take its widths, and whether they wait for Python
    python -m megatron_moa.doctor --patches           what is changed in Megatron and torch in place, and why
    python -m megatron_moa.launch --nproc-per-node 8 -m megatron_moa.doctor --nccl     an all-reduce across these ranks

Each line has a state:

    ok          there, and used
    falls back  not there, or not usable: a run takes what the line says instead
    check       there, but runs may fail or crawl with it
    missing     training cannot start without it: exit code 1

The doctor must itself run where much is broken.  Packages are imported in processes of their own, which may crash or
hang, and the doctor's own process needs nothing but the standard library (of Python 3.8 and later, to be able to say
that 3.12 is needed).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict

from megatron_moa.doctor.examine import examine
from megatron_moa.doctor.finding import MISSING, Report
from megatron_moa.doctor.smoke import smoke
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "doctor"


def show(report: Report) -> None:
    """Prints the report for people."""
    print(f"megatron_moa on {platform.node()}, {platform.system()} {platform.machine()}")
    for finding in [*report.findings, *filter(None, [report.smoke])]:
        print(f"  {finding.state:10}  {finding.name:20}  {finding.text}")
        if finding.remedy:
            print(f"  {'':10}  {'':20}  -> {finding.remedy}")
    if report.uses:
        print("A run here uses")
        for part, what in report.uses.items():
            print(f"  {part:15}  {what}")
    missing = [
        finding.name for finding in [*report.findings, *filter(None, [report.smoke])] if finding.state == MISSING
    ]
    if missing:
        print(f"Training cannot start: {', '.join(missing)}.")
    else:
        print(f"Training can start, on {report.uses['device']}.")


@one_line_errors(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    """Examines this machine, prints the report and returns the exit code."""
    options = _parser().parse_args(argv)
    if not 0 < options.timeout < 86400:
        raise UserError(f"--timeout {options.timeout}: give a positive number of seconds, below a day")
    if options.nccl:
        return _test_network(options)
    if options.patches:
        return _list_patches(options)
    report = examine(options.timeout, options.save, options.recipe)
    if options.smoke and report.can_start:
        report = Report(report.findings, report.uses, smoke())
    if options.json:
        print(json.dumps({"can_start": report.can_start, **asdict(report)}, indent=2))
    else:
        show(report)
    return 0 if report.can_start else 1


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--smoke", action="store_true", help="also train a tiny mixture for five steps; minutes at most"
    )
    parser.add_argument(
        "--nccl",
        action="store_true",
        help="only test all-reduces across the ranks this is launched on, and print bandwidths (gloo without GPUs)",
    )
    parser.add_argument(
        "--patches",
        action="store_true",
        help="only list what is changed in Megatron and torch in place: where, why, for which version, until when",
    )
    parser.add_argument(
        "--recipe", metavar="MODEL", help="also look at widths and host time of a recipe of examples/models"
    )
    parser.add_argument("--save", metavar="FOLDER", help="also look at the disk that training's --save will name")
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds an import may take, or with --nccl a rank"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _test_network(options: argparse.Namespace) -> int:
    """Runs ``--nccl`` on this rank and returns the exit code."""
    if options.smoke or options.save or options.recipe or options.patches:
        raise UserError("--nccl: runs on every rank and alone; drop --smoke, --save, --recipe and --patches")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else a time-out is a page of C++ frames
    try:
        from megatron_moa.doctor import network
    except ImportError as error:
        raise UserError(
            f"--nccl: torch cannot be imported ({error}); run it without --nccl, which says what is missing"
        ) from None
    return network.main(options.timeout, options.json)


def _list_patches(options: argparse.Namespace) -> int:
    """Prints the list of ``--patches``, and returns the exit code."""
    if options.smoke or options.save or options.recipe:
        raise UserError("--patches: lists and looks at nothing else; drop --smoke, --save and --recipe")
    try:
        from megatron_moa.doctor.patches import all_patches, patch_table

        changes = all_patches()
    except ImportError as error:
        raise UserError(
            f"--patches: torch or Megatron cannot be imported ({error}); run it without --patches, which says what is "
            "missing"
        ) from None
    print(json.dumps([change.described() for change in changes], indent=2) if options.json else patch_table(changes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
