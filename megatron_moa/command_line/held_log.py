"""Holds back the hundreds of lines that Megatron prints where a tool loads a model."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator

from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.errors import UserError


@contextlib.contextmanager
def held_log(*expected: type[Exception]) -> Iterator[None]:
    """Holds back what is printed inside, which only an unexpected failure shows.

    This project's warnings are shown at the end. What is shown goes to standard error: standard output is for results.

    Args:
        expected: failures that the tool tells in one line, beside UserError.
    """
    log = io.StringIO()
    try:
        with quiet_imports(), contextlib.redirect_stdout(log):
            yield
    except (UserError, KeyboardInterrupt, *expected):
        raise
    except BaseException:  # SystemExit too: something of Megatron's may have left
        sys.stderr.write(log.getvalue())
        raise
    for line in log.getvalue().splitlines():
        if line.startswith("WARNING: --"):  # ours
            print(line, file=sys.stderr)
