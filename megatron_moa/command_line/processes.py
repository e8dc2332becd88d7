"""Ends processes that a tool has started, and those that they have started themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress


def end_processes(processes: Sequence[subprocess.Popen], seconds: float = 5) -> None:
    """Ends processes and all that they have started: by SIGTERM, and by SIGKILL what is left after some seconds.

    Args:
        processes: each started with ``start_new_session=True``, and not known to have ended.
        seconds: to wait for all of them; an exception, such as another Ctrl-C, shortens the wait.
    """
    try:
        _send(processes, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        _send(processes, signal.SIGKILL)


def _send(processes: Sequence[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):  # nothing of the group is left, or (macOS) zombies alone
            os.killpg(process.pid, number)
