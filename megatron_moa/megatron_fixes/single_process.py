"""Lets Megatron start as one process, without torchrun, by setting what torchrun would set."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Mapping

from megatron_moa.errors import UserError

TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # srun's, Open MPI's, MPICH's and Intel's


def check_started_once() -> None:
    """Refuses one of several trainings that a launcher has started, each for itself.

    Raises:
        UserError: a launcher says that it started several processes, and RANK is not set.
    """
    if "RANK" in os.environ:
        return
    for name in TASK_COUNTS:
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise UserError(
                f"{name} is {count} but RANK is not set: {count} trainings that know nothing of each other; start one "
                "launcher a node, as in srun --ntasks-per-node=1 python -m megatron_moa.launch ... (docs/slurm.md), or "
                f"for trainings of their own unset {name}"
            )


def slurm_gpus(environment: Mapping[str, str]) -> int:
    """Returns how many GPUs of this node Slurm gave the job; 0 where CUDA_VISIBLE_DEVICES hides them.

    NoDevFiles is what Slurm itself sets for a step without GPUs.
    """
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")
    return int(given) if given.isdecimal() and not hidden else 0


def single_process_environment() -> None:
    """Sets the variables that torchrun would set, so that ``python script.py`` runs as one process.

    Raises:
        UserError: WORLD_SIZE asks for more processes, and RANK is not set.
    """
    if "RANK" in os.environ:
        return
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise UserError(f"WORLD_SIZE is {world_size} but RANK is not set: start the script with torchrun")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def free_port() -> int:
    """Returns a port that will still be free when it is used, seconds later.

    The port is drawn from below those that the system hands out by itself (from 32768 on Linux), so that no connection
    takes it meanwhile and two runs hardly ever meet.
    """
    draw = random.Random(os.urandom(8))
    while True:
        port = draw.randrange(20000, 32768)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
