"""Tells what Megatron's own checks of settings find in one line that names the flags."""

from __future__ import annotations

import argparse
import ast
import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.training.exit_codes import is_lost_rank
from megatron_moa.training.parser import parser_defaults

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
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except _MISTAKES as error:
        if is_lost_rank(error):
            raise
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
    """Returns the settings that a text names, as typed.

    They are those of the command line, or else those that differ from their default, or else all.
    """
    defaults = parser_defaults()
    words = dict.fromkeys(re.findall(r"[a-z][a-z0-9_]+", text.lower().replace("-", "_")))
    in_code = re.findall(r"\bargs\.(\w+)", text)
    names = [name for name in {**words, **dict.fromkeys(in_code)} if name in defaults and hasattr(args, name)]
    names = [name for name in names if "_" in name or name in in_code]  # "load" may be a word of a sentence
    given = [name for name in names if megatron_flags.is_typed(name)]
    changed = [name for name in names if getattr(args, name) != defaults[name]]
    return ", ".join(as_typed(name, getattr(args, name)) for name in given or changed or names)
