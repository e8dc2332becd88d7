"""Switches a process without a CUDA device to the CPU.

    from megatron_moa.cpu.switch import enable
    from megatron_moa.megatron_fixes.single_process import single_process_environment

    single_process_environment()  # for a start without torchrun
    enable()                      # before or after importing megatron, but before its arguments are parsed

The scripts of this project call :func:`megatron_moa.startup.prepare`, which does both.  What is replaced lasts as long
as the process.
"""

import torch

from megatron_moa.cpu import collectives, compilation, factories, fake_cuda, flags, host_stream, megatron_parts
from megatron_moa.cpu.messages import print_rank_0
from megatron_moa.megatron_fixes import expected_warnings, from_pypi

_PATCHES = (
    compilation.RULES,
    *fake_cuda.PATCHES,
    *factories.PATCHES,
    *host_stream.PATCHES,
    *collectives.PATCHES,
    *megatron_parts.PATCHES,
    *flags.PATCHES,
    compilation.FUSER,
)

_enabled = False


def is_enabled() -> bool:
    """Whether :func:`enable` has switched this process to the CPU."""
    return _enabled


def enable() -> bool:
    """Switches this process to the CPU if it has no CUDA device; says whether it did.

    Calling it again changes nothing.  It imports Megatron (about 5 seconds) and may be called before or after the
    caller does, but before Megatron's arguments are parsed.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    print_rank_0("No CUDA device found: Megatron runs on CPU over gloo.")
    expected_warnings.expect_no_gpu()
    import megatron.training.training  # noqa: F401

    for change in _PATCHES:
        change.install()
    from_pypi.install()
    _enabled = True
    return True
