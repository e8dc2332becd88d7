"""Parses the flags of a training: Megatron's parser with this project's flags, each mistake one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.flags import (
    add_flags,
    our_flags,
)
from megatron_moa.errors import UserError, fail, one_line
from megatron_moa.megatron_fixes.kernel_defaults import set_plain_torch_defaults


def add_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds our flags to Megatron's parser.

    Sets the defaults this machine can serve, and makes errors one line.
    """
    add_flags(parser)
    set_plain_torch_defaults(parser)
    parser.error = lambda message: fail(parser.prog, message)
    for action in parser._actions:
        _mend_help(parser, action)
        if action.type not in (None, int, float, str):
            action.type = _told_in_one_line(action.type)
    return parser


def _mend_help(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Megatron 0.19.2 has a bare % in the help of a flag, and --help ends in a traceback."""
    try:
        (action.help or "") % {**vars(action), "prog": parser.prog}
    except ValueError:
        action.help = action.help.replace("%", "%%")


def _told_in_one_line(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of Megatron's parser, such as that of --moe-layer-freq, whose failures argparse can tell."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except Exception as error:
            reason = one_line(error)
            raise argparse.ArgumentTypeError(f"invalid value {text!r} ({reason})") from error

    return converted


def parse_flags() -> argparse.Namespace:
    """Parses ``sys.argv`` by Megatron's parser with our flags.

    Refuses numbers and flags that mean nothing.

    Raises:
        UserError: a flag that nothing reads, or an invalid number.
        SystemExit: what argparse refuses, after one line.
    """
    from megatron.training.arguments import parse_args  # when megatron_moa.cpu has replaced what it must

    megatron_flags.check_words(sys.argv[1:], our_flags())
    args = parse_args(add_all_arguments)
    megatron_flags.check_numbers(args)
    if args.checkpoint_activations:  # Megatron leaves with exit code 0
        raise UserError("--checkpoint-activations: no flag of Megatron's any more; give --recompute-activations")
    return args


def parser_defaults() -> dict[str, Any]:
    """The value of every setting that no flag sets, on this machine."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    add_all_arguments(parser)
    return {action.dest: action.default for action in parser._actions}
