"""Shared fixtures: Megatron set up in this process, on one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported whether its kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A pool of compiling processes, each of which imports torch, costs more than it gives here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from megatron_moa.cpu.switch import enable
from tests.support.instructions import load_once

load_once()


@pytest.fixture(autouse=True)
def _what_processes_inherit_stays() -> Iterator[None]:
    """Restores the environment and the import path after each test, since later tests start processes.

    Our script sets RANK and MASTER_PORT, Megatron's check of arguments sets NVTE_*, and transformers puts the folder of
    a model's own code on the path.
    """
    environment, path = dict(os.environ), sys.path.copy()
    yield
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path


@pytest.fixture(scope="session")
def megatron() -> Iterator[None]:
    """Megatron's process groups and random streams on one rank, gloo where there is no GPU."""
    on_cpu = enable()
    from megatron.core import parallel_state, tensor_parallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
