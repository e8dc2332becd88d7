"""Writes a blend file: how much of a training's data each dataset gives.

    python tools/blend.py --data web code books --temperature 2 --tokens 26e9 --output blend.txt

weighs the datasets by their tokens to the power 1/2, shows how often 26 billion tokens go through each, and writes what
--data-args-path of pretrain_gpt_moa.py reads. --weights gives the weights instead. With --valid (and --test) the file
is JSON for --per-split-data-args-path, and every dataset of --data serves training alone.
"""

import argparse
import json
import math
import os
import shlex
from collections.abc import Sequence

from megatron_moa.command_line import output_files
from megatron_moa.command_line.numbers import positive_number
from megatron_moa.data import corpus, dataset
from megatron_moa.data.blends import as_number
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "blend.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, shows the blend and writes it."""
    args = parse_arguments(argv)
    with one_line_errors(PROGRAM):
        blend(args)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this tool."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="PREFIX", help="datasets of preprocess_data.py")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="of each dataset; any scale")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="without --weights: tokens to the power 1/T; 1 (default) by size, large: all alike",
    )
    parser.add_argument("--split", metavar="SHARES", help="as in training (99,1,0): its first share can be trained on")
    parser.add_argument("--valid", nargs="+", metavar="PREFIX", help="datasets for validation, by their tokens")
    parser.add_argument("--test", nargs="+", metavar="PREFIX", help="datasets for the test, by their tokens")
    parser.add_argument(
        "--tokens", type=positive_number, metavar="N", help="of the training: shows the epochs, e.g. 26e9"
    )
    parser.add_argument("--output", metavar="FILE", help="the blend file; without it nothing is written")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser.parse_args(argv)


def blend(args: argparse.Namespace) -> None:
    """Everything after the flags. Raises UserError."""
    separate = bool(args.valid or args.test)
    if separate and args.split is not None:
        raise UserError(f"--split {args.split}: contradicts --valid and --test, which name those parts; drop one")
    split = None if separate else args.split or "99,1,0"
    check_numbers(args)
    targets = [] if args.output is None else output_files.check_output("--output", args.output, ("",), args.overwrite)
    for flag, prefixes in (("--data", args.data), ("--valid", args.valid), ("--test", args.test)):
        check_named_once(flag, prefixes or [])
        check_words(flag, prefixes or [])
        read = [prefix + ending for prefix in prefixes or [] for ending in (".bin", ".idx")]
        corpus.check_not_overwritten(read, "--output", targets)
    # All files are looked at before a split is computed, for which Megatron is imported.
    valid, test = by_tokens("--valid", args.valid), by_tokens("--test", args.test)
    indices = [read_index(prefix) for prefix in args.data]
    sizes = [training_tokens(index, split) for index in indices]
    weights = blend_weights(args, sizes)
    show(args, sizes, weights)
    words = [word for weight, prefix in zip(weights, args.data, strict=True) for word in (f"{weight:.6g}", prefix)]
    if separate:
        parts = {"train": words, "valid": valid, "test": test}
        text, flags = json.dumps(parts, indent=1) + "\n", ["--per-split-data-args-path", args.output]
    else:
        lines = [f"{weight} {prefix}\n" for weight, prefix in zip(words[::2], words[1::2], strict=True)]
        text, flags = "".join(lines), ["--data-args-path", args.output, "--split", split]
    if not targets:
        return
    with output_files.written_whole("--output", targets, args.overwrite) as (path,), open(path, "w") as stream:
        stream.write(text)
    print(f"written        {args.output}")
    print(f"use it with    {shlex.join(flags)} --data-cache-path FOLDER")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for an invalid number of a flag."""
    if args.temperature is not None and not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature:g}: a number above 0 is wanted; 1 weighs by tokens")
    if args.weights is None:
        return
    shown = " ".join(f"{weight:g}" for weight in args.weights)
    if args.temperature is not None:
        raise UserError(f"--temperature {args.temperature:g}: has no effect with --weights; drop one of the two")
    if len(args.weights) != len(args.data):
        raise UserError(
            f"--weights {shown}: {len(args.weights)} weights for {len(args.data)} datasets; give one for each"
        )
    if not all(0 < weight < math.inf for weight in args.weights):
        raise UserError(f"--weights {shown}: must be above 0; leave a dataset out that shall give nothing")
    if not 0 < min(args.weights) / sum(args.weights) <= 1:
        raise UserError(f"--weights {shown}: too large or too far apart; give shares of 1")


def check_named_once(flag: str, prefixes: Sequence[str]) -> None:
    """Raises UserError for a dataset that a flag names twice, under whatever names."""
    files = set()
    for prefix in prefixes:
        file = os.path.realpath(f"{prefix}.bin")
        if file in files:
            raise UserError(f"{flag} {prefix}: is named twice; name it once, a larger weight has it drawn more often")
        files.add(file)


def check_words(flag: str, prefixes: Sequence[str]) -> None:
    """Raises UserError for a name that a blend file's reader would take for a weight or a comment."""
    for prefix in prefixes:
        if prefix.startswith("#") or as_number(prefix) is not None:
            kind = "comment" if prefix.startswith("#") else "weight"
            raise UserError(f"{flag} {prefix}: would be a {kind} in a blend file; write ./{prefix}")


def read_index(prefix: str) -> dataset.DatasetIndex:
    """A dataset's index. Raises UserError, also for a name that no blend file can hold."""
    index = dataset.read_index(prefix, "--data")
    if len(prefix.split()) != 1:
        raise UserError(f"--data {prefix!r}: a blend file is made of words; give the dataset a name without spaces")
    return index


def training_tokens(index: dataset.DatasetIndex, split: str | None) -> int:
    """Tokens of a dataset's training part; without a split of all of it. Raises UserError."""
    if split is None:
        return index.tokens
    tokens = index.tokens_between(*dataset.split_bounds(split, index.sequences).get(dataset.TRAIN, (0, 0)))
    if not tokens:
        raise UserError(f"--split {split}: leaves nothing of {index.prefix} to training; use e.g. --split 99,1,0")
    return tokens


def blend_weights(args: argparse.Namespace, sizes: Sequence[int]) -> list[float]:
    """The weights, with the sum 1. Raises UserError if a dataset would give nothing."""
    given = args.weights
    if given is None:
        temperature = 1.0 if args.temperature is None else args.temperature
        given = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
        if not all(given):
            raise UserError(f"--temperature {temperature:g}: gives the smaller datasets no weight; give a larger one")
    return [weight / sum(given) for weight in given]


def by_tokens(flag: str, prefixes: Sequence[str] | None) -> list[str] | None:
    """A part's datasets, each with its tokens as its weight. Raises UserError."""
    if prefixes is None:
        return None
    return [word for prefix in prefixes for word in (str(dataset.read_index(prefix, flag).tokens), prefix)]


def show(args: argparse.Namespace, sizes: Sequence[int], weights: Sequence[float]) -> None:
    """Prints a line for each dataset; an epoch is once through its training part."""
    budget = args.tokens
    width = max(7, *map(len, args.data))
    drawn = "" if budget is None else f"{'drawn':>20}{'epochs':>9}"
    print(f"{'dataset':{width}}{'training tokens':>20}{'weight':>9}{drawn}")
    for prefix, size, weight in zip(args.data, sizes, weights, strict=True):
        drawn = "" if budget is None else f"{round(weight * budget):>20,}{weight * budget / size:>9.2f}"
        print(f"{prefix:{width}}{size:>20,}{weight:>9.4f}{drawn}")
    if budget is not None:
        print(f"{'total':{width}}{sum(sizes):>20,}{1:>9.4f}{round(budget):>20,}{budget / sum(sizes):>9.2f}")


if __name__ == "__main__":
    main()
