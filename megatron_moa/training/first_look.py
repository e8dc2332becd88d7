"""Answers --help and mistakes of a training's command line before torch and Megatron are imported.

Those imports take seconds. The checks are the ones that run again when Megatron's parser has read the command line,
since other programs parse the same flags without this first look.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.flags import add_flags, check_progress_flags, mixture_from_args, our_flags
from megatron_moa.data.checks import check_data_files
from megatron_moa.errors import UserError, check_is_folder, fail, one_line_errors
from megatron_moa.megatron_fixes.single_process import check_started_once

# Settings of Megatron's that the checks below look at, beside ours.
_SWITCHES = ("swiglu", "squared_relu", "quick_geglu", "use_checkpoint_args", "mock_data", "skip_train")
_NUMBERS = ("num_experts", "vocab_size")
_WORDS = (
    "load",
    "pretrained_checkpoint",
    "save",
    "tensorboard_dir",
    "wandb_project",
    "wandb_exp_name",
    "wandb_save_dir",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "split",
    "data_args_path",
    "per_split_data_args_path",
)
_BLENDS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def look(program: str, words: Sequence[str]) -> None:
    """Prints the help, or refuses a mistake in one line, or returns.

    Leaves with exit code 0 after the help, and with 2 after a mistake.

    Args:
        program: for messages.
        words: the command line, without the program.
    """
    if "--help-megatron" in words:
        return  # Megatron's own parser answers
    parser = argparse.ArgumentParser(
        prog=program, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.error = lambda message: fail(program, message)
    if "--help" in words or "-h" in words:
        parser.epilog = _names_of_megatrons_flags()
        parser.parse_args(["--help"])
    with one_line_errors(program):
        check_started_once()
        megatron_flags.check_words(words, our_flags())
        args = _few_settings(parser, words)
        check_progress_flags(args)
        _check_folder(args)
        if not args.use_checkpoint_args:  # else the mixture and the tokenizer are the checkpoint's
            mixture_from_args(args)
            check_data_files(args)


def _check_folder(args: argparse.Namespace) -> None:
    if not args.load:
        return
    folder = Path(args.load)
    check_is_folder("--load", folder)
    if args.use_checkpoint_args and not args.pretrained_checkpoint and not folder.exists():
        raise UserError(f"--load {folder}: no checkpoint with settings there; give a folder --save wrote to")


def _few_settings(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Our flags and those of Megatron's that are checked here; the others are left to Megatron's parser."""
    for name in _SWITCHES:
        parser.add_argument(*megatron_flags.spellings(name), action="store_true")
    for name in _NUMBERS:
        parser.add_argument(*megatron_flags.spellings(name), type=int)
    for name in _WORDS:
        parser.add_argument(*megatron_flags.spellings(name))
    for name in _BLENDS:
        parser.add_argument(*megatron_flags.spellings(name), nargs="*")
    args, _ = parser.parse_known_args(list(words))
    return args


def _names_of_megatrons_flags() -> str:
    """Every flag of Megatron's by what it decides, for the end of the help."""
    parts = [f"Megatron {megatron_flags.VERSION} has further flags; --help-megatron explains them."]
    for title, names in (
        (
            "decide the function; like the mixture's they come back with --use-checkpoint-args",
            megatron_flags.FUNCTION,
        ),
        ("decide how text becomes tokens", megatron_flags.TOKENIZER),
        ("decide the training", megatron_flags.TRAINING),
        ("decide the execution", megatron_flags.EXECUTION),
        ("are refused, as nothing reads them", megatron_flags.UNREAD),
    ):
        flags = " ".join(flag for name in names for flag in megatron_flags.spellings(name))
        lines = textwrap.wrap(flags, 116, break_on_hyphens=False, initial_indent="  ", subsequent_indent="  ")
        parts.append("\n".join([f"flags that {title}:", *lines]))
    return "\n\n".join(parts)


def main() -> None:
    """:func:`look` at this process's command line."""
    look(Path(sys.argv[0]).name, sys.argv[1:])
