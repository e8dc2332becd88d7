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
from megatron_moa.errors import UserError, one_line


def tokenized(work: Iterator[list[Piece]], settings: Settings, workers: int) -> Iterator[Batch]:
    """Yields the batches of all tasks in their order, from this process or from ``workers`` forked ones."""
    if workers == 1:
        for task in work:
            yield tokenize(task, settings)
        return
    first = next(work, None)
    if first is None:
        return  # a part without documents
    pending: deque[Future[Batch]] = deque()
    pool: ProcessPoolExecutor | None = None
    try:
        with signals_held():  # interrupted, it would lose track of a worker
            pool = _started_pool(settings, workers, first, pending)
        for task in work:
            pending.append(pool.submit(tokenize_in_worker, task))
            if len(pending) >= 4 * workers:  # a bound on memory; enough that no worker waits
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        _kill_workers()  # the pool sends SIGTERM, which a process that was just forked can lose, and waits for ever
        raise UserError(f"--workers {workers}: a worker was killed, probably for memory; use fewer workers") from None
    finally:
        with signals_held():
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)


def _started_pool(
    settings: Settings, workers: int, first: list[Piece], pending: deque[Future[Batch]]
) -> ProcessPoolExecutor:
    """Starts all workers, with a first task.

    Raises:
        UserError: the system does not let so many start; none is left.
    """
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_worker, (settings,))
        pending.append(pool.submit(tokenize_in_worker, first))  # which forks them
    except (OSError, RuntimeError) as error:
        started = _kill_workers()  # they would wait for work, and this process for them
        reason = getattr(error, "strerror", None) or one_line(error)
        fewer = max(1, min(started, workers - 1) // 2)
        raise UserError(
            f"--workers {workers}: cannot be started ({reason}); use fewer, e.g. --workers {fewer}"
        ) from None
    return pool


def _kill_workers() -> int:
    """Kills all workers; returns how many there were."""
    found = multiprocessing.active_children()
    for worker in found:
        worker.kill()
    return len(found)


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
