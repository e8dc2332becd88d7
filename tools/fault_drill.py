"""Does to small training runs what clusters do to large ones, and sees whether anything is lost.

    python tools/fault_drill.py --kills 20                 # everything, about a quarter of an hour on two cores
    python tools/fault_drill.py --kills 2 --only kill,sigterm

A tiny model (megatron_moa/runs/tiny_model.py) is trained undisturbed once.  The same run is then killed with SIGKILL,
one rank or all, while it starts, computes and saves, and started again each time until it ends; every loss it prints
must be that of the undisturbed run.  Then come single faults: each must be told in the log, end with the expected exit
code, and leave a checkpoint from which the run goes on with the undisturbed run's losses.  The last line says how many
faults did not end so: exit code 0 if it is 'lost 0', 1 if not, 2 for a mistake in the flags.  On GPUs where there are
some.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_moa.command_line.numbers import seed, within
from megatron_moa.errors import OneLineParser, one_line_errors
from megatron_moa.research.fault_drill.run import run_drill

PROGRAM = "fault_drill.py"


def main() -> None:
    """Runs the drill; exit code 1 if a fault did not end as expected."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument(
        "--kills", type=within(int, 0), default=20, metavar="N", help="how often to kill the run (default: 20)"
    )
    parser.add_argument("--only", metavar="NAME,...", help="kill, or single faults by name; default: all")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="of the moments (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=min(gpus, 2) or 2, metavar="N", help="ranks (default: 2, or 1 on a single GPU)"
    )
    parser.add_argument("--work-dir", type=Path, metavar="FOLDER", help="where to work (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and logs there")
    options = parser.parse_args()
    with one_line_errors(PROGRAM):
        lost = run_drill(options)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
