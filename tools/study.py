"""Trains every arm of a study at every learning rate, seed, size and token budget it asks for, several runs at once.

    python tools/study.py --preset smoke                  # examples/studies/smoke.toml: 5 minutes on 2 cores
    python tools/study.py --study my.toml --out runs/my   # a study of your own, on your data
    python tools/study_report.py runs/my --out runs/my/report.md

A study's file says what is compared (examples/studies/cpu.toml explains the keys). Every run is one of
pretrain_gpt_moa.py; a finished one is a line of OUT/results.jsonl. Killed at any moment and started again the study
goes on: finished runs stay, cut-off ones are run anew. Learning rates come first, with one seed, further seeds at each
arm's best; where the best lies at the end of the grid, the grid goes on. Before all that the arms' steps are timed, in
turn (OUT/timing.jsonl): leave the machine alone while it says so.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.errors import OneLineParser, one_line_ending
from megatron_moa.measuring import positive

PROGRAM = "study.py"
STUDIES = Path(__file__).resolve().parents[1] / "examples" / "studies"


def make_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    presets = sorted(path.stem for path in STUDIES.glob("*.toml"))
    which.add_argument("--preset", choices=presets, help="a file of examples/studies/")
    which.add_argument("--study", type=Path, metavar="FILE", help="another file, TOML")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results, runs, corpora (default: runs/study-NAME)")
    parser.add_argument("--at-a-time", type=positive, metavar="N", help="runs at once (default: GPUs, or CPU cores)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads of each (%(default)s)")
    parser.add_argument("--list", action="store_true", help="only print what is still to be run, as far as it is known")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left to be run."""
    flags = make_parser().parse_args(argv)
    with one_line_ending(PROGRAM, "finished runs are kept; the same command goes on"):
        from megatron_moa.study.grid import read_study
        from megatron_moa.study.runner import Runner, visible_gpus

        file = flags.study or STUDIES / f"{flags.preset}.toml"
        at_a_time = flags.at_a_time or len(visible_gpus()) or len(os.sched_getaffinity(0))
        runner = Runner(read_study(file), flags.out or Path("runs") / f"study-{file.stem}", at_a_time, flags.threads)
        if flags.list:
            for cell in runner.pending():
                print(cell.name)
            return
        runner.run()


if __name__ == "__main__":
    main()
