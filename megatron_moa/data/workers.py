"""Shares tasks among forked workers, which end with this process."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_moa.command_line.processes import STOP_SIGNALS, end_with_parent, signals_held
from megatron_moa.data.pieces import Piece
from megatron_moa.data.tokenizing import Batch, Settings, tokenize
from megatron_moa.errors import UserError


def tokenized(work: Iterator[list[Piece]], settings: Settings, workers: int) -> Iterator[Batch]:
    """Yields the batches of all tasks in their order, from this process or from ``workers`` forked ones."""
    if workers == 1:
        for task in work:
            yield tokenize(task, settings)
        return
    first = next(work, None)
    if first is None:
        return  # a part without documents
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker, (settings,))
    pending: deque[Future[Batch]] = deque()
    try:
        with signals_held():  # the first submit forks all workers; interrupted, it would lose track of one
            pending.append(pool.submit(tokenize_in_worker, first))
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


_worker_settings: Settings | None = None


def start_worker(settings: Settings) -> None:
    """Keeps the settings in a worker, and lets Ctrl-C and the parent's end stop the worker.

    Forking brought the settings along.
    """
    global _worker_settings
    _worker_settings = settings
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    end_with_parent()  # or it would wait for ever for work from a parent that was killed


def tokenize_in_worker(task: list[Piece]) -> Batch:
    """Tokenizes a task in a forked worker."""
    assert _worker_settings is not None
    return tokenize(task, _worker_settings)
