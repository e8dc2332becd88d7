"""Prepares a process for Megatron, on any machine: the first thing that a script of this project does."""

from megatron_moa.command_line.processes import end_forks_with_this_process
from megatron_moa.cpu.switch import enable
from megatron_moa.megatron_fixes import from_pypi
from megatron_moa.megatron_fixes.single_process import single_process_environment


def prepare() -> None:
    """Prepares the process, before Megatron's arguments are parsed.

    Sets what torchrun would set, mends Megatron from PyPI, and switches to the CPU where there is no CUDA device.
    """
    end_forks_with_this_process()
    single_process_environment()
    if not enable():  # which mends it, too
        from_pypi.install()
