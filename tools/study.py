"""Trains every arm of a study at every learning rate, seed, size and budget it asks for, several runs at once.

python tools/study.py --study examples/studies/cpu.toml --out runs/study
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.errors import OneLineParser, one_line_errors

PROGRAM = "study.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left to be run."""
    parser = OneLineParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--study", type=Path, required=True, metavar="FILE", help="TOML, see examples/studies/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results, runs and corpora")
    parser.add_argument("--at-a-time", type=int, default=cores, metavar="N", help="runs at once")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of each")
    flags = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        from megatron_moa.study.grid import read_study
        from megatron_moa.study.runner import Runner

        Runner(read_study(flags.study), flags.out, flags.at_a_time, flags.threads).run()


if __name__ == "__main__":
    main()
