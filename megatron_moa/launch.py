"""Runs torchrun, sends the scheduler's signals to the ranks, and ends with the ranks' exit code.

    python -m megatron_moa.launch --nproc-per-node 8 pretrain_gpt_moa.py ... --exit-signal-handler

takes torchrun's arguments and differs from it, as of torch 2.11, in four things.  SIGTERM and SIGUSR2 go to the
training processes, which then have the time they need to save; torchrun kills them after 30 seconds, and dies of a
SIGUSR2.  It leaves with their exit code, where torchrun's is always 1.  Of a process that was killed it leaves
nothing behind.  And without --master-port one node takes a free port, torchrun always 29500.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import (
    config_from_args,
    determine_local_world_size,
    get_args_parser,
    parse_min_max_nnodes,
    run,
)

from megatron_moa.errors import UserError, fail, one_line, one_line_errors
from megatron_moa.megatron_fixes.single_process import free_port
from megatron_moa.training.exit_codes import EXIT_NOT_FINITE, EXIT_SAVED_ON_SIGNAL, STOP_SIGNALS

PROGRAM = "megatron_moa.launch"
_MOST_PROCESSES = 1024  # of a node
_MASTER_PORT = 29500  # torchrun's, which all nodes know
_FINAL = (2, EXIT_NOT_FINITE)  # another start would end the same way


class _Forwarding:
    """A signal handler that sends a stop signal on to the processes that torchrun has started."""

    def __init__(self) -> None:
        self.received: set[int] = set()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        workers = children(os.getpid())
        if not workers:  # nothing has begun
            raise SystemExit(EXIT_SAVED_ON_SIGNAL)
        for pid in workers:
            os.kill(pid, number)


def children(parent: int) -> list[int]:
    """The ids of a process's children, from Linux' /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # after the command's name, which may hold anything
        except OSError:  # gone meanwhile
            continue
        state, ppid = fields[:2]
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def exit_code(codes: list[int], received: set[int]) -> int:
    """Returns the training's exit code, from those of this node's processes that failed.

    Args:
        codes: in the order of failing, as subprocess has them: a negative one is the signal that ended the process.
        received: stop signals that were sent on to them; a process that was still starting has died of one.
    """
    for code in codes:
        if code in _FINAL:
            return code
    if received and all(code == EXIT_SAVED_ON_SIGNAL or -code in received for code in codes):
        return EXIT_SAVED_ON_SIGNAL
    return codes[0] if codes[0] > 0 else 128 - codes[0]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """torchrun's arguments.

    Raises:
        UserError: torchrun could not start with them.
    """
    parser = get_args_parser()
    if "PET_MASTER_PORT" not in os.environ:
        parser.set_defaults(master_port=0)
    parser.error = lambda message: fail(PROGRAM, f"{message}; see python -m {PROGRAM} --help")
    options = parser.parse_args(arguments)
    processes, nodes = options.nproc_per_node, options.nnodes
    try:
        in_range = 1 <= determine_local_world_size(processes) <= _MOST_PROCESSES
    except ValueError:  # no number, no word of torchrun's, or a kind of device that is not here
        in_range = False
    if not in_range:
        raise UserError(f"--nproc-per-node {processes}: give 1 to {_MOST_PROCESSES}, cpu, or gpu where there are GPUs")
    try:
        least, most = parse_min_max_nnodes(nodes)
    except (ValueError, RuntimeError):
        least = most = 0
    if not 1 <= least <= most:
        raise UserError(f"--nnodes {nodes}: no number of nodes; give 1 or more, or a range such as 1:4")
    if options.rdzv_backend == "static" and not options.standalone and not 0 <= options.node_rank < most:
        raise UserError(
            f"--node-rank {options.node_rank}: out of range; give 0 to {most - 1}, as --nnodes {nodes} has it"
        )
    if options.master_port == 0:
        options.master_port = free_port() if most == 1 else _MASTER_PORT
    try:
        config_from_args(options)
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise _refused(error) from None
    return options


def _refused(error: Exception) -> UserError:
    """What torchrun says of its arguments."""
    return UserError(f"torchrun: {one_line(error).rstrip('.')}; see python -m {PROGRAM} --help")


@one_line_errors(PROGRAM)
def main(arguments: list[str] | None = None) -> None:
    """torchrun's, with our exit code."""
    forward = _Forwarding()
    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    options = parse(arguments)
    # torchrun installs its handlers, which raise, for these only.
    options.signals_to_handle = ",".join(
        name for name in options.signals_to_handle.split(",") if name not in {s.name for s in STOP_SIGNALS}
    )
    try:
        run(options)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        code = exit_code([failure.exitcode for _, failure in failures], forward.received)
        for _, failure in failures:
            # What a killed process has started itself, such as Megatron's helper for saving, would stay for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(failure.pid, signal.SIGKILL)
        ends = ", ".join(f"rank {rank} with {failure.exitcode}" for rank, failure in failures)
        print(f"{PROGRAM}: the processes of this node ended: {ends}; exit code {code}", file=sys.stderr)
        raise SystemExit(code) from None
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"--master-port {options.master_port}: something else listens there; give another, the same on all nodes"
        ) from None
    except ValueError as error:  # of the rendezvous: nothing has begun
        raise _refused(error) from None


if __name__ == "__main__":
    main()
