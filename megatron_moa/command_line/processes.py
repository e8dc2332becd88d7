"""Starts processes that a tool can end whenever it is stopped, and ends them.

What these processes have started ends with them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start_process(command: Sequence[str], **settings: Any) -> subprocess.Popen:
    """subprocess.Popen in a session of its own, in the main thread.

    Ctrl-C or SIGTERM that comes while it starts ends the process, too: nobody else knows it yet.
    """
    process = None
    try:
        with signals_held():
            process = subprocess.Popen(command, start_new_session=True, **settings)
    except BaseException:
        if process is not None:
            end_processes([process])
        raise
    return process


@contextmanager
def signals_held() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the end of the block, in the main thread.

    A signal mask would not do: another thread may take the signal.
    """
    caught: list[int] = []
    owner = os.getpid()

    def hold(number: int, _: object) -> None:
        if os.getpid() != owner:
            # A process just forked in the block, before it has handlers of its own.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    previous = {number: signal.signal(number, hold) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for number in caught[:1]:
            signal.raise_signal(number)


def end_processes(processes: Sequence[subprocess.Popen], seconds: float = 5) -> None:
    """Ends processes and all that they have started.

    It sends SIGTERM, and after some seconds SIGKILL to what is left.

    Args:
        processes: each of :func:`start_process`, and not known to have ended.
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


def end_with_parent() -> None:
    """In a process just made: it is killed when the thread that made it ends, whatever way (Linux alone)."""
    if sys.platform == "linux":
        parent = os.getppid()
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be told
            os.kill(os.getpid(), signal.SIGKILL)


@cache
def end_forks_with_this_process() -> None:
    """From now on, what this process forks in its main thread is killed when it is, whatever way.

    Megatron forks a server (multiprocessing.Manager) when it saves, which would wait for ever for a killed trainer.
    """
    owner, main = os.getpid(), threading.main_thread().ident

    def tell() -> None:
        # A fork has the identifier of the thread that made it. Another thread may end long before the process does.
        if os.getppid() == owner and threading.get_ident() == main:
            end_with_parent()

    os.register_at_fork(after_in_child=tell)
