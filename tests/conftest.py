"""Shared fixtures: Megatron set up in this process, on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_moa import cpu


@pytest.fixture(scope="session")
def megatron() -> Iterator[None]:
    """Megatron's process groups and random streams on one rank, gloo where there is no GPU."""
    cpu.single_process_environment()
    on_cpu = cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("gloo" if on_cpu else "nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
