"""Parses a training's command line: Megatron's flags and ours, a checkpoint's settings, every check in one line."""

from __future__ import annotations

import argparse
import ast
import linecache
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_moa.checkpoints import guard
from megatron_moa.checkpoints.settings import check_saved_settings
from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.flags import (
    MODEL_FLAGS,
    TRAINING_FLAGS,
    add_flags,
    check_checkpoint_flags,
    check_progress_flags,
    mixing_from_args,
    mixture_defaults,
    our_flags,
)
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.command_line.output_folder import check_output_folders
from megatron_moa.command_line.shapes import check_shapes
from megatron_moa.errors import UserError, fail
from megatron_moa.megatron_fixes import optimizer_resharding, random_states
from megatron_moa.megatron_fixes.kernel_defaults import set_plain_torch_defaults
from megatron_moa.mixture.config import FORMAT_VERSION, MixingConfig
from megatron_moa.mixture.functional import check_overwrite, resolve_backend
from megatron_moa.training import optimizer, progress


def add_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds our flags to Megatron's parser, sets the defaults this machine can serve, and makes errors one line."""
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
            reason = " ".join(str(error).split()) or type(error).__name__
            raise argparse.ArgumentTypeError(f"invalid value {text!r} ({reason})") from error

    return converted


def parse_flags() -> argparse.Namespace:
    """Parses ``sys.argv`` by Megatron's parser with our flags, and refuses numbers and flags that mean nothing.

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


def restore_model_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Takes every setting that decides the model's function from a checkpoint's args.

    Those of the mixture are among them; a checkpoint without them is stock Megatron's.

    Args:
        args: parsed and not validated; changed in place.
        saved: validated args in this format version.

    Raises:
        UserError: a flag was given, and the checkpoint has another value.
    """
    _restore_megatrons(args, saved)
    defaults = mixture_defaults()
    stock = {**defaults, "moa_mixing": "none"}
    for name in MODEL_FLAGS:
        given, stored = getattr(args, name), getattr(saved, name, stock[name])
        if given not in (defaults[name], stored):
            raise UserError(f"{as_typed(name, given)}: the checkpoint has {as_typed(name, stored)}; drop the flag")
        setattr(args, name, stored)
    for name in TRAINING_FLAGS:
        if getattr(args, name) == defaults[name]:
            setattr(args, name, getattr(saved, name, defaults[name]))


# Of another class, and taken from the checkpoint all the same: an export writes it as initializer_range.
_ALSO_RESTORED = ("init_method_std",)


def _restore_megatrons(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    defaults = parser_defaults()
    takes_tokenizer = args.use_tokenizer_model_from_checkpoint_args
    tokenizer = [name for name in megatron_flags.TOKENIZER if name != "trust_remote_code"]
    for name in (*megatron_flags.FUNCTION, *_ALSO_RESTORED, *tokenizer):
        if not hasattr(saved, name):
            continue
        given, stored, default = getattr(args, name, None), getattr(saved, name), defaults[name]
        if name in tokenizer:
            if takes_tokenizer or given == default:
                setattr(args, name, stored if stored is not None else given)
        else:
            was_given = not megatron_flags.same(name, given, default)
            if was_given and name in megatron_flags.FUNCTION and not megatron_flags.same(name, given, stored):
                raise UserError(f"{as_typed(name, given)}: the checkpoint has {as_typed(name, stored)}; drop the flag")
            setattr(args, name, stored)
    if not (args.fp16 or args.bf16):
        args.fp32_residual_connection = False  # everything is in float32


def parse_arguments(
    check: Callable[[argparse.Namespace], None] | None = None, as_global: bool = True
) -> tuple[argparse.Namespace, MixingConfig | None]:
    """Megatron's ``parse_and_validate_args`` with our flags, early checks and one-line errors.

    Args:
        check: the caller's own check of the parsed args, before Megatron's.
        as_global: whether they become Megatron's global args, which a process has once.

    Returns:
        Megatron's args and the mixture (None: stock).

    Raises:
        UserError: whatever a user can get wrong, Megatron's own assertions included.
    """
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    args = parse_flags()
    check_checkpoint_flags(args)
    check_progress_flags(args)
    saved = None
    checkpoint = guard.find_checkpoint(args)
    if checkpoint is not None:
        checkpoint, saved = guard.read_saved_settings(args, checkpoint)
    if args.use_checkpoint_args:
        _take_saved_settings(args, checkpoint, saved)
    mixing = mixing_from_args(args)
    check_shapes(args)
    _settle(args, mixing)
    if check is not None:
        check(args)
    check_output_folders(args)
    with megatron_checks(args):
        validate_args(args)
    optimizer.check_validated_arguments(args)
    if saved is not None:
        check_saved_settings(args, saved, checkpoint)
        optimizer.check_saved_optimizer(args, saved, checkpoint)
        optimizer.check_saved_schedule(args, saved, checkpoint)
        optimizer_resharding.check_saved_split(args, saved, checkpoint)
    args.moa_format_version = FORMAT_VERSION  # travels in checkpoints
    if hasattr(saved, "moa_end_tokens"):  # of the Hugging Face folder that a model came from; has no flag
        args.moa_end_tokens = saved.moa_end_tokens
    random_states.check_saved(args, saved)
    if as_global:
        with progress.wandb_errors(args):
            set_global_variables(args)
    return args, mixing


def _take_saved_settings(args: argparse.Namespace, checkpoint: Any, saved: argparse.Namespace | None) -> None:
    """``--use-checkpoint-args``: the checkpoint's settings become the run's, where its flags do not contradict them."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    folder = args.load or args.pretrained_checkpoint
    if folder is None:
        raise UserError("--use-checkpoint-args: needs a checkpoint; add --load FOLDER")
    if saved is None:
        raise UserError(f"--load {folder}: no checkpoint with settings there; give a folder --save wrote to")
    restore_model_flags(args, saved)
    grouped = args.moe_grouped_gemm  # how experts are computed, not what: a flag of the run
    load_args_from_checkpoint(args, "load" if checkpoint.flag == "--load" else "pretrained_checkpoint")
    args.moe_grouped_gemm = args.moe_grouped_gemm or grouped
    if args.tokenizer_type is None:  # where only the tokenizer's file is the run's own, because it has moved
        args.tokenizer_type = getattr(saved, "tokenizer_type", None)


def _settle(args: argparse.Namespace, mixing: MixingConfig | None) -> None:
    """Sets what follows from the mixture and the machine, and checks that this machine can compute the mixture."""
    if args.moa_log_interval and args.fake_process_group:
        raise UserError(
            f"--moa-log-interval {args.moa_log_interval}: with --fake-process-group there are no ranks to sum over; "
            "drop one of the two"
        )
    if mixing is not None:
        # Now, not at the first step.
        check_overwrite(mixing, resolve_backend(mixing.backend, "cuda" if torch.cuda.is_available() else "cpu"))
        # The activation step is ours; Megatron would check that it could fuse the one it no longer runs.
        args.bias_gelu_fusion = args.bias_swiglu_fusion = False
    if not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False  # plain causal: no [s, s] mask per sample
    if not args.eval_interval:
        # Megatron 0.19.2 means never before the end, and then divides by it.
        args.eval_interval = 1 + (args.train_iters or args.train_samples or 0)


# What wrong settings end in when Megatron checks them or builds a model of them.
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@contextmanager
def megatron_checks(args: argparse.Namespace | None = None) -> Iterator[None]:
    """Turns whatever Megatron's checks of settings raise inside into a :class:`UserError` of one line.

    Args:
        args: those that are checked; the line then begins with the flags that the failed check is about.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except _MISTAKES as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        code = _statement(frame)
        text = re.sub(r" when instantiating \w+", "", " ".join(str(error).split()))
        if not isinstance(error, AssertionError | ValueError | RuntimeError):
            text = f"Megatron fails at them ({type(error).__name__}: {text}; {code})"
        # Where an assertion has no text, the condition that failed says most.
        text = text or f"Megatron requires {code.removeprefix('assert ')}"
        flags = _flags_named_in(f"{text} {code}", args) if args is not None else ""
        raise UserError(f"{flags}: {text}" if flags else text) from error


def _statement(frame: traceback.FrameSummary) -> str:
    """The source of a statement in one line, without the text that an assertion has."""
    lines = [linecache.getline(frame.filename, number) for number in range(frame.lineno, (frame.end_lineno or 0) + 1)]
    source = " ".join("".join(lines).split())
    try:
        statement = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return source
    return f"assert {ast.unparse(statement.test)}" if isinstance(statement, ast.Assert) else source


def _flags_named_in(text: str, args: argparse.Namespace) -> str:
    """The settings a text names, as typed: those of the command line, or else those that differ from their default."""
    defaults = parser_defaults()
    words = dict.fromkeys(re.findall(r"[a-z][a-z0-9_]+", text.lower().replace("-", "_")))
    in_code = re.findall(r"\bargs\.(\w+)", text)
    names = [name for name in {**words, **dict.fromkeys(in_code)} if name in defaults and hasattr(args, name)]
    names = [name for name in names if "_" in name or name in in_code]  # "load" may be a word of a sentence
    typed = {word.split("=", 1)[0] for word in sys.argv[1:]}
    given = [name for name in names if typed.intersection(megatron_flags.spellings(name))]
    changed = [name for name in names if getattr(args, name) != defaults[name]]
    return ", ".join(as_typed(name, getattr(args, name)) for name in given or changed or names)
