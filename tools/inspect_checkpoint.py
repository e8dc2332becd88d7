"""Shows what is in a checkpoint, and how two of them differ, without Megatron, a model or a GPU.

    python tools/inspect_checkpoint.py runs/a/checkpoints                     the latest one there
    python tools/inspect_checkpoint.py runs/a/checkpoints --iteration 2000 --json
    python tools/inspect_checkpoint.py runs/a/checkpoints --diff runs/b/checkpoints

The split it was saved under does not matter. Nothing a file says is executed. With --diff, exit code 1 means that
parameters differ, in names, shapes, dtypes or values; the optimizer's state is not compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.trained.inspection.contents import describe
from megatron_moa.trained.inspection.differences import compare, is_same
from megatron_moa.trained.inspection.open import open_checkpoint
from megatron_moa.trained.inspection.tables import report, report_difference

PROGRAM = "inspect_checkpoint.py"


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = OneLineParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what training's --save named, or the folder of one checkpoint")
    add_iteration_flag(parser)
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="compare with another checkpoint")
    parser.add_argument("--diff-iteration", type=positive, metavar="N", help="which one of OTHER; default: the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all settings and tensors")
    flags = parser.parse_args(argv)
    if flags.diff_iteration is not None and flags.diff is None:
        raise UserError(f"--diff-iteration {flags.diff_iteration}: of which checkpoint? add --diff OTHER")
    return flags


@one_line_errors(PROGRAM)
def main(argv: list[str] | None = None) -> None:
    """Reads and prints."""
    flags = parse_flags(argv)
    checkpoint = open_checkpoint(flags.checkpoint, flags.iteration)
    try:
        if flags.diff is None:
            result = describe(checkpoint)
        else:
            result = compare(checkpoint, open_checkpoint(flags.diff, flags.diff_iteration))
    except RecursionError:
        raise UserError(f"{checkpoint.folder}: has settings within settings without end; take another") from None
    if flags.json:
        print(json.dumps(result, indent=1))
    else:
        print(report(result) if flags.diff is None else report_difference(result))
    if flags.diff is not None and not is_same(result):
        sys.exit(1)


if __name__ == "__main__":
    main()
