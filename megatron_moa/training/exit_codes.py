"""Ends a run early, on a signal or a lost rank, with a telling exit code.

A checkpoint is saved where possible. docs/reliability.md has the table of exit codes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megatron_moa.megatron_fixes.patching import patch

EXIT_NOT_FINITE = 17  # Megatron's own code for a result that failed its validation: starting again gives it again
EXIT_SAVED_ON_SIGNAL = 75  # sysexits.h, EX_TEMPFAIL: start again and it goes on
EXIT_LOST_RANK = 76  # sysexits.h, EX_PROTOCOL: another rank is gone; start again from the last checkpoint

# What Slurm sends at the end of a time limit, on preemption, and with --signal=USR2@SECONDS.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def report(message: str) -> None:
    """One line on stderr with this rank in it.

    Written in one piece, past Python's buffers: signal handlers call it too, and other ranks write to the same file.
    """
    line = f"{os.path.basename(sys.argv[0])}: rank {os.environ.get('RANK', '0')}: {message}\n"
    os.write(2, line.encode())


class StopSignals:
    """Takes the place of Megatron's ``DistributedSignalHandler``, which knows one signal.

    A signal on any rank lets all ranks finish their iteration, save, and leave together.  Before the first iteration it
    waits until there is something to save; during a save or an evaluation, until that is done.  A second one changes
    nothing.

    Args:
        args: Megatron's parsed args; --exit-signal is caught beside :data:`STOP_SIGNALS`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._saves = args.save is not None
        self._received = False
        self.agreed = False  # whether any rank had one when all asked for the last time
        self._numbers = {*STOP_SIGNALS, args.exit_signal}
        for number in self._numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._received:
            self._received = True
            then = "saves after this iteration and leaves" if self._saves else "leaves after this iteration, unsaved,"
            report(f"{signal.Signals(number).name} received: {then} with exit code {EXIT_SAVED_ON_SIGNAL}")

    def ignore_from_now(self) -> None:
        """Ignores the signals from now on, for a rank that is done.

        Python gives signals their default back while it shuts down, and the rank would be killed.
        """
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def signals_received(self) -> list[bool]:
        """Whether any rank has received one; all ranks call it, after each iteration.

        One all-reduce; Megatron's gathers a tensor of every rank and reads them one by one.
        """
        received = torch.tensor([self._received], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        self.agreed = bool(received.item())
        return [self.agreed]


def catch_stop_signals(args: argparse.Namespace) -> StopSignals | None:
    """Catches them if --exit-signal-handler asks for it; called once Megatron's global variables are set."""
    if not args.exit_signal_handler:
        return None
    from megatron.training import global_vars

    _HANDLER.install(args)
    return global_vars.get_signal_handler()


def _in_place_of(handler: Any, args: argparse.Namespace) -> StopSignals:
    handler.release()
    signals = StopSignals(args)
    if getattr(handler, "_signal_received", False):  # while there was no other
        signals._receive(args.exit_signal, None)
    return signals


_HANDLER = patch(
    "megatron.training.global_vars._GLOBAL_SIGNAL_HANDLER",
    _in_place_of,
    why="it knows one signal, gathers a tensor of every rank after each step, and the run ends with exit code 0",
    version="0.19.2",
    remove_when="Megatron catches several signals and leaves with a code that says so",
)


def hold_timeout(models: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Makes --distributed-timeout-minutes hold for every process group there is.

    Megatron 0.19.2 leaves it out for EXPERT_DATA_PARALLEL_GROUP_GLOO, and so does torch for groups made without one: 30
    minutes.  A post-wrap hook, so it returns the models as they came.
    """
    from megatron.training import get_args

    args = get_args()
    if not args.fake_process_group:
        timeout = timedelta(minutes=args.distributed_timeout_minutes)
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timeout, group)
    return models


@contextmanager
def exit_codes(stop: StopSignals | None) -> Iterator[None]:
    """Gives what ends a training inside its exit code.

    Megatron leaves with 0 after a signal, as if the training were done.  A rank that can no longer reach another one
    says so in one line, and goes at once: an orderly end would wait for the connections.
    """
    try:
        yield
    except SystemExit as leaving:
        if stop is not None and stop.agreed and leaving.code in (0, None):
            raise SystemExit(EXIT_SAVED_ON_SIGNAL) from None
        raise
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        where = traceback.extract_tb(error.__traceback__)
        callers = [frame for frame in where if "megatron" in frame.filename] or where
        report(
            f"another rank is gone, or does not answer within --distributed-timeout-minutes; its log says why. "
            f"Noticed in {callers[-1].name}: {' '.join(str(error).split())[-300:]}; exit code {EXIT_LOST_RANK}"
        )
        sys.stdout.flush()
        os._exit(EXIT_LOST_RANK)
    finally:
        if stop is not None:
            stop.ignore_from_now()


def is_lost_rank(error: BaseException) -> bool:
    """Whether it says that another rank is gone.

    NCCL's and the store's errors have types; gloo's have the file that raised them in their text.
    """
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)
