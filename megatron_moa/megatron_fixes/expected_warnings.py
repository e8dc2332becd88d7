"""Silences the dozen warnings that torch and Megatron print at import where there is no GPU.

They say that there is no GPU, no Apex, no Transformer Engine, and one generator for both streams of random numbers.

Importing this module does it where there is no GPU, so a script imports it before Megatron. What there is and what runs
fall back to, ``python -m megatron_moa.doctor`` says.
"""

import logging
import warnings

import torch


def expect_no_gpu() -> None:
    """Adds the filters; again, where something has taken them away (pytest does)."""
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is) not installed")
    warnings.filterwarnings("ignore", message=r"Only transformer-engine>=.* supports MoE experts")
    warnings.filterwarnings("ignore", message=r"'pin_memory' argument is set as true but no accelerator is found")
    warnings.filterwarnings("ignore", message=r"When using async grad allreduce it is recommended to set")
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_unexpected)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    expected = "No CUDA runtime is found", "CPU RNG state changed within GPU RNG context"
    return not any(text in str(record.msg) for text in expected)


def _sees_gpu() -> bool:
    # Not is_available(), which starts CUDA: afterwards a script can hide no GPU, and a process forked then has none.
    with warnings.catch_warnings(action="ignore"):  # of a driver's library without a driver
        return torch.cuda.device_count() > 0


if not _sees_gpu():
    expect_no_gpu()
