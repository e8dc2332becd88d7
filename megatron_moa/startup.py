"""Prepares a process for Megatron, on any machine: the first thing that a script of this project does."""

import os
import sys

from megatron_moa.command_line.processes import end_forks_with_this_process
from megatron_moa.cpu.switch import enable, is_enabled
from megatron_moa.megatron_fixes import from_pypi
from megatron_moa.megatron_fixes.single_process import single_process_environment, slurm_gpus


def prepare() -> None:
    """Prepares the process, before Megatron's arguments are parsed.

    Sets what torchrun would set, mends Megatron from PyPI, and switches to the CPU where there is no CUDA device.
    """
    end_forks_with_this_process()
    single_process_environment()
    if not enable():  # which mends it, too
        from_pypi.install()


def check_given_gpus() -> None:
    """Ends a training that Slurm gave GPUs, none of which torch can use.

    The whole allocation would compute on a CPU. Exit code 1 and not 2: the node is at fault, and another one may do.
    """
    given = slurm_gpus(os.environ)
    if given and is_enabled():
        print(
            f"SLURM_GPUS_ON_NODE is {given}, but torch finds no CUDA device on {os.uname().nodename}: python -m "
            "megatron_moa.doctor says why; to compute on the CPU all the same set CUDA_VISIBLE_DEVICES=",
            file=sys.stderr,
        )
        raise SystemExit(1)
