"""Reports mistakes of users in one line: UserError, and the parser that prints it."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

_MOST = sys.float_info.max


class UserError(ValueError):
    """A mistake in flags or input files; its text names the flag, the value and the remedy in one line."""


def check_is_folder(flag: str, path: Path) -> None:
    """Raises UserError for a path that is there and is no folder, or one that may not be entered."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise UserError(f"{flag} {path}: not a folder; name the folder that --save wrote to")
        os.stat(os.path.join(path, "."))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror}); give a folder you may read") from None


def why_absent(path: str, absent: str = "no such file") -> str:
    """Says why a path is not found: ``absent``, or e.g. that a folder above it may not be entered."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return absent
    except OSError as error:
        return error.strerror
    return absent


def has_types(value: Any, types: Mapping[str, type]) -> bool:
    """Whether JSON that a file held is an object with these keys, their values of these types.

    A float may be a whole number there; true and false are no numbers, and neither is what a float cannot hold.
    """
    if not isinstance(value, dict):
        return False
    for key, kind in types.items():
        held = value.get(key)
        if kind in (int, float):
            fits = isinstance(held, (int, kind)) and not isinstance(held, bool) and -_MOST < held < _MOST
        else:
            fits = isinstance(held, kind)
        if not fits:
            return False
    return True


def fail(program: str, message: str) -> NoReturn:
    """Prints ``program: error: message`` in one line and leaves with exit code 2.

    The first rank prints it, and the first of every other node: the mistake may be one of that node alone.
    """
    rank, local = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("LOCAL_RANK", "1")))
    if rank == 0 or local == 0:
        node = f"{os.uname().nodename}: " if rank else ""
        print(f"{program}: error: {node}{printable(message)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Spells out what moves a terminal's cursor or starts another line: a file may have put it there."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def one_line(error: BaseException, *, typed: bool = False) -> str:
    """Returns an error's text in one line, or its type's name where it has no text.

    Args:
        typed: puts the type's name before the text, which is then cut after 200 characters.
    """
    text = printable(" ".join(str(error).split()))
    name = type(error).__name__
    return f"{name}: {text[:200]}" if typed else text or name


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns the import of a missing package inside into a UserError that names its extra of setup.py.

    Raises:
        UserError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; in the project's folder: pip install -c constraints.txt -e '.[{extra}]'"
        ) from None


@contextmanager
def one_line_errors(program: str, left: str = "") -> Iterator[None]:
    """Turns a :class:`UserError` or a full disk inside into one line on stderr and exit code 2.

    No traceback is printed, after Ctrl-C neither, which is exit code 130. Where whoever reads the output leaves early
    (``| head``) the program ends in silence, as by SIGPIPE: exit code 141.

    Args:
        left: what Ctrl-C leaves, for its line, such as ``nothing was written``.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        fail(program, str(error))
    except BrokenPipeError:
        if _is_read(sys.stdout):
            raise  # it is another pipe
        _drop_output()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()  # which may be what found no room
        fail(program, f"{error.filename or 'a file'}: {error.strerror}; make room, and give the same command again")
    except KeyboardInterrupt:
        print(f"{program}: interrupted{left and ', '}{left}", file=sys.stderr)
        raise SystemExit(130) from None


def _drop_output() -> None:
    """What Python still writes as it leaves goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_read(stream: TextIO) -> bool:
    """Whether a pipe's other end is open; true of files."""
    poller = select.poll()
    poller.register(stream, 0)  # errors alone
    return not poller.poll(0)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Prints ``program: error: message`` and leaves with exit code 2."""
        fail(self.prog, f"{message}; see {self.prog} --help")
