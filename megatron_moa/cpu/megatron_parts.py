"""Replaces the parts of Megatron that cannot run, or run well, without a GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.cpu.fake_cuda import get_rng_state, nothing, set_rng_state


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The original turns only CUDA tensors into numpy arrays, yet its callers need arrays as split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


REPLACED: tuple[tuple[str, Any, str], ...] = (
    # name, what stands there now, why
    ("megatron.core.tensor_parallel.random._get_cuda_rng_state", get_rng_state, "the original needs CUDA"),
    ("megatron.core.tensor_parallel.random._set_cuda_rng_state", set_rng_state, "the original waits for CUDA"),
    ("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _as_numpy, "split sizes as numpy"),
    ("megatron.training.initialize._warmup_jit_function", nothing, "warms up fusions that do not run here"),
)

WRAPPED: tuple[tuple[str, Callable[[Callable], Callable], str], ...] = (
    # name, wrapper, why
    (
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        lambda original: functools.partial(original, mp_mode="fork"),
        "CUDA does not survive a fork, so it starts anew and imports Megatron for one queue: 8 s of the first save",
    ),
    (
        "megatron.training.initialize.init_persistent_async_worker",
        lambda original: lambda rank, mp_mode: original(rank, "fork"),
        "--async-save's writer, started anew, would look for CUDA devices, fail, and be waited for for ever",
    ),
)


def allow_no_cuda() -> None:
    """Lets ``initialize_megatron`` start without CUDA, by the default of its argument of that name.

    The default is changed in place, so that it holds however the function was imported.
    """
    from megatron.training.initialize import initialize_megatron

    first, *others = initialize_megatron.__defaults__
    assert first in (False, True)
    assert initialize_megatron.__code__.co_varnames[0] == "allow_no_cuda"
    initialize_megatron.__defaults__ = (True, *others)
