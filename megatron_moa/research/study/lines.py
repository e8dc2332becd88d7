"""Reads the lines of a study's finished runs and of its step times, and checks each of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_moa.command_line.words import flag_values
from megatron_moa.errors import UserError
from megatron_moa.research.study.grid import Cell
from megatron_moa.research.study.values import Count, NotNegative, Positive, filled, fitting

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Run:
    """What is read of a line of results.jsonl (runner.result_of); it may have further keys.

    A line stays a dictionary; this says which of its keys reports read, and of which types they must be.

    Attributes:
        final: validation loss; None: the run diverged.
        loss: the curve, pairs of tokens and loss; of a run that diverged it may be anything.
        text: corpora.Corpus.content of its corpus; None in lines of version 0.2 and before.
    """

    cell: Cell
    final: float | None
    non_embedding: Count
    iterations: Count
    seconds: NotNegative
    loss: list[Any]
    flags: list[str]
    machine: str
    versions: dict[str, str]
    date: str
    text: dict[str, Any] | None = None


@dataclass(frozen=True)
class StepTimes:
    """What is read of a line of timing.jsonl, which may have further keys."""

    size: str
    optimizer: str
    milliseconds: dict[str, Positive]
    equal_time_width: Count
    rounds: Count
    threads: Count
    machine: str
    date: str


def read_results(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file of finished runs, which may be absent.

    A last line that a kill cut off is left out.

    Raises:
        UserError: the file cannot be read, or another line is not one that tools/study.py writes.
    """
    return _read(path, Run)


def read_timings(path: Path) -> list[dict[str, Any]]:
    """As :func:`read_results`, of step times."""
    return _read(path, StepTimes)


def end_last_line(path: Path) -> None:
    """Makes a file ready for further lines.

    A last line without its newline gets one, or goes if it is cut off.
    """
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        start = content.rfind(b"\n") + 1
        with path.open("r+b") as file:  # in place: what is whole is there whenever a kill comes
            file.seek(0, os.SEEK_END)
            if _is_whole(content[start:]):
                file.write(b"\n")
            else:
                file.truncate(start)


def _read(path: Path, kind: type) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name another folder") from None
    *whole, last = content.split(b"\n")
    if _is_whole(last):
        whole.append(last)
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(_checked(f"{path}: line {number}", line, kind))
        except UserError as error:
            raise UserError(f"{error}; delete that line, and tools/study.py makes it anew") from None
    return lines


def _is_whole(line: bytes) -> bool:
    """Whether a line is JSON: no part of an object is."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _checked(where: str, line: bytes, kind: type) -> dict[str, Any]:
    """A line's content, all that is read of it of the right types.

    Raises:
        UserError: something else is there, or nothing.
    """
    if not _is_whole(line):
        raise UserError(f"{where} is not JSON")
    content = fitting(where, json.loads(line), dict[str, Any])
    names = {field.name for field in fields(kind)}
    known = filled(kind, where, {key: value for key, value in content.items() if key in names})
    if isinstance(known, Run):
        if known.final is not None:
            curve = fitting(f"{where}: loss", known.loss, list[tuple[float, float]])
            if not curve:
                raise UserError(f"{where}: loss []: must hold a point")
        _check_flags(f"{where}: flags", known.flags)
    return {**content, **asdict(known)}


def _check_flags(where: str, flags: list[str]) -> None:
    """What reports read off a run's flags."""
    if flags and not flags[0].startswith("--"):
        raise UserError(f"{where} {flags[0]!r}: must begin with a flag")
    given = flag_values(flags)
    if "--hidden-size" not in given and {"--init-method-std", "--moa-gate-init-std"} & given.keys():
        raise UserError(f"{where}: --hidden-size: is missing")
    for flag, hint in (
        ("--hidden-size", Count),
        ("--init-method-std", NotNegative),
        ("--lr", Positive),
        ("--min-lr", NotNegative),
    ):
        if flag in given:
            try:
                number: Any = float(given[flag])
            except ValueError:
                number = given[flag]
            fitting(f"{where}: {flag}", number, hint)
    if "--min-lr" in given and "--lr" not in given:
        raise UserError(f"{where}: --lr: is missing")
