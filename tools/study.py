"""Trains every arm of a study at every learning rate, seed, size and token budget it asks for.

    python tools/study.py --study examples/studies/paper-table1.toml --scale smoke   # minutes on 2 CPU cores
    python tools/study.py --study examples/studies/paper-table1.toml --plan          # H100 hours of the paper's own
    python tools/study.py --study my.toml --out runs/my                              # a study of your own, on your data
    python tools/study_report.py runs/my --out runs/my/report.md

A study's file says what is compared (examples/studies/paper-table1.toml explains the keys; docs/reproduction.md has all
of the paper's). Several runs go at once, each one of pretrain_gpt_moa.py; a finished one is a line of
OUT/results.jsonl. Killed at any moment and started again the study goes on: finished runs stay, cut-off ones start from
their last checkpoint where the file has save_interval, else anew. Learning rates come first, with one seed, further
seeds at each arm's best; a grid that says so goes on where the best lies at its end. Before all that the arms' steps
are timed in turn, if the file asks for it (OUT/timing.jsonl): leave the machine alone while it says so.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.command_line.numbers import positive
from megatron_moa.errors import OneLineParser, one_line_errors

PROGRAM = "study.py"


def make_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, metavar="FILE", help="TOML; examples/studies/ has some")
    parser.add_argument(
        "--scale",
        default="paper",
        metavar="NAME",
        help="paper (default): the file as it stands; or one of its [scales], such as smoke",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results, runs, corpora (default: runs/study-NAME)")
    parser.add_argument("--at-a-time", type=positive, metavar="N", help="runs at once (default: GPUs, or CPU cores)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads of each (%(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="only print what is still to be run, as far as it is known")
    only.add_argument("--plan", action="store_true", help="only print how many H100 hours it takes, by tools/plan.py")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left to be run."""
    flags = make_parser().parse_args(argv)
    with one_line_errors(PROGRAM, "finished runs are kept; the same command goes on"):
        from megatron_moa.research.study.grid import PAPER, read_study
        from megatron_moa.research.study.runner import Runner, visible_gpus

        study = read_study(flags.study, flags.scale)
        if flags.plan:
            from megatron_moa.planning import inputs
            from megatron_moa.research.study.planned import planned

            inputs.prepare()
            for line in planned(study, flags.study):
                print(line, flush=True)
            return
        name = flags.study.stem + ("" if flags.scale == PAPER else f"-{flags.scale}")
        at_a_time = flags.at_a_time or len(visible_gpus()) or len(os.sched_getaffinity(0))
        out = flags.out or Path("runs") / f"study-{name}"
        runner = Runner(study, out, at_a_time, flags.threads, flags.study)
        if flags.list:
            for cell in runner.pending():
                print(cell.name)
            return
        runner.run()


if __name__ == "__main__":
    main()
