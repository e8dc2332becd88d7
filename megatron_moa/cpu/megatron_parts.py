"""Replaces the parts of Megatron that cannot run, or run well, without a GPU."""

import functools
from typing import Any

import torch

from megatron_moa.cpu.fake_cuda import get_rng_state, nothing, set_rng_state
from megatron_moa.cpu.patching import replaced, wrapped


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The original turns only CUDA tensors into numpy arrays, yet its callers need arrays as split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _allowing_no_cuda(defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lets ``initialize_megatron`` start without CUDA, by the default of its argument of that name.

    The default is changed in place, so that it holds however the function was imported.
    """
    from megatron.training.initialize import initialize_megatron

    first, *others = defaults
    assert first in (False, True)
    assert initialize_megatron.__code__.co_varnames[0] == "allow_no_cuda"
    return (True, *others)


PATCHES = (
    replaced("megatron.core.tensor_parallel.random._get_cuda_rng_state", get_rng_state, "the original needs CUDA"),
    replaced("megatron.core.tensor_parallel.random._set_cuda_rng_state", set_rng_state, "the original waits for CUDA"),
    replaced(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu", _as_numpy, "split sizes as numpy"
    ),
    replaced("megatron.training.initialize._warmup_jit_function", nothing, "warms up fusions that do not run here"),
    wrapped(
        "megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
        lambda original: functools.partial(original, mp_mode="fork"),
        "CUDA does not survive a fork, so it starts anew and imports Megatron for one queue: 8 s of the first save",
    ),
    wrapped(
        "megatron.training.initialize.init_persistent_async_worker",
        lambda original: lambda rank, mp_mode: original(rank, "fork"),
        "--async-save's writer, started anew, would look for CUDA devices, fail, and be waited for for ever",
    ),
    wrapped(
        "megatron.training.initialize.initialize_megatron.__defaults__",
        _allowing_no_cuda,
        "without allow_no_cuda it asserts that there is CUDA",
    ),
)
