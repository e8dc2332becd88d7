"""Shares tasks among forked workers, which end with this process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from megatron_moa.data.pieces import Piece
from megatron_moa.data.tokenizing import Batch, Settings, tokenize
from megatron_moa.errors import UserError

_PR_SET_PDEATHSIG = 1  # of Linux: a worker must not wait for ever for work from a parent that was killed
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def tokenized(work: Iterator[list[Piece]], settings: Settings, workers: int) -> Iterator[Batch]:
    """Yields the batches of all tasks in their order, from this process or from ``workers`` forked ones."""
    if workers == 1:
        for task in work:
            yield tokenize(task, settings)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker, (settings,))
    pending: deque[Future[Batch]] = deque()
    try:
        with signals_held():  # the first submit forks all workers; interrupted, it would lose track of one
            pending.append(pool.submit(tokenize_in_worker, next(work)))
        for task in work:
            pending.append(pool.submit(tokenize_in_worker, task))
            if len(pending) >= 4 * workers:  # a bound on memory; enough that no worker waits
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        for worker in multiprocessing.active_children():
            worker.kill()  # the pool sends SIGTERM, which a process that was just forked can lose, and waits for ever
        raise UserError(f"--workers {workers}: a worker was killed, probably for memory; use fewer workers") from None
    finally:
        with signals_held():
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def signals_held() -> Iterator[None]:
    """Puts Ctrl-C and SIGTERM off until the end of the block.

    A signal mask would not do: another thread may take the signal.
    """
    caught: list[int] = []
    process = os.getpid()

    def hold(number: int, _: object) -> None:
        if os.getpid() != process:
            # A worker just forked: its pool ends it, when another died, before it has handlers of its own.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)

    previous = {number: signal.signal(number, hold) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


_worker_settings: Settings | None = None


def start_worker(settings: Settings) -> None:
    """Keeps the settings in a worker, and lets Ctrl-C and the parent's end stop the worker.

    Forking brought the settings along.
    """
    global _worker_settings
    _worker_settings = settings
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tokenize_in_worker(task: list[Piece]) -> Batch:
    """Tokenizes a task in a forked worker."""
    assert _worker_settings is not None
    return tokenize(task, _worker_settings)
