"""Turns a trained model into one with a richer mixture of activations that computes the same function.

    python tools/convert_mixing.py --load runs/swiglu --out runs/start --mixing moa --form bi-sided

A stock SwiGLU model becomes LA or MoA of any gated form, GELU and squared ReLU become type1, LA becomes MoA, one-sided
becomes bi-sided or quadratic, and a dictionary grows (docs/upcycling.md has the table). The result is a checkpoint from
which training starts at iteration 0 with a new optimizer. Its logits are compared with the source's. Further Megatron
flags may follow (``--tokenizer-model FILE`` for a tokenizer that has moved).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.command_line.tool_flags import (
    add_iteration_flag,
    add_target_flags,
    add_tolerance_flag,
    target_settings,
)
from megatron_moa.command_line.trained_model import check_megatron_flags
from megatron_moa.errors import OneLineParser, one_line_errors

_NAME = "convert_mixing.py"


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        _NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="CHECKPOINT", help="what training's --save named")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write to; not there, or empty")
    add_iteration_flag(parser)
    add_target_flags(parser, required=True)
    add_tolerance_flag(parser)
    return parser.parse_known_args(argv)


@one_line_errors(_NAME, "nothing was written")
def main(argv: list[str] | None = None) -> None:
    """Converts, compares, prints, and leaves with 1, and without a result, if the models differ."""
    flags, megatron_flags = parse_flags(argv)
    check_megatron_flags(flags, megatron_flags)
    with written_folder("--out", flags.out) as unfinished:
        # Imported after the flags are read: it takes seconds.
        from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

        # isort: split
        from megatron_moa.checkpoints.writer import TRAIN_ON
        from megatron_moa.trained.upcycling import convert

        with held_log():
            done = convert(flags.load, unfinished, megatron_flags, flags.iteration, **target_settings(flags))
        source = "stock feed-forward layers" if done.source is None else done.source.describe()
        print(f"> from {source}\n> to {done.target.describe()}")
        print(f"> {done.comparison}")
        if not done.comparison.within(flags.tolerance):
            print(
                f"{_NAME}: error: the models differ by more than --tolerance {flags.tolerance:g}; nothing was written",
                file=sys.stderr,
            )
            raise SystemExit(1)
    print(
        f"> wrote {flags.out}; train it from iteration 0 with a new optimizer, adding data, schedule and split:\n"
        f"  {TRAIN_ON.format(flags.out)}"
    )


if __name__ == "__main__":
    main()
