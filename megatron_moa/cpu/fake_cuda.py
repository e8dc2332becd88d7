"""Gives the CPU's answers to what Megatron asks of torch.cuda.

Megatron asks about devices, memory, streams, events and random numbers.
"""

import contextlib
import os
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from megatron_moa.cpu.patching import replaced
from megatron_moa.errors import UserError


def nothing(*args: Any, **kwargs: Any) -> None:
    """For calls that only steer a GPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """For memory counters."""
    return 0


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager:
    """For ``with torch.cuda.stream(...)`` and ``with torch.cuda.device(...)``."""
    return contextlib.nullcontext()


class CpuStream:
    """Stands in for ``torch.cuda.Stream``, with nothing to wait for.

    CPU work is done when the call returns.
    """

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = nothing

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        event = event or CpuEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class CpuEvent:
    """Stands in for ``torch.cuda.Event``: remembers when it was recorded, so that timings are right."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    wait = synchronize = nothing

    def record(self, stream: CpuStream | None = None) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        return (end._seconds - self._seconds) * 1000


_STREAM = CpuStream()


def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """The state of the CPU generator, as a copy."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Sets the CPU generator; a state of another size was written by a GPU's generator."""
    if new_state.numel() != torch.default_generator.get_state().numel():
        raise UserError(
            f"the checkpoint holds random number states of {new_state.numel()} bytes, written on a GPU: "
            "they mean nothing to a CPU; add --no-load-rng"
        )
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _device_properties(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """Claims the newest architecture: older ones make Megatron ask for CUDA_DEVICE_MAX_CONNECTIONS=1."""
    return SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=os.cpu_count())


_CPU = torch.device("cpu")

PATCHES = (
    replaced("torch.cuda.current_device", lambda: _CPU, "Megatron puts it into device=..."),
    replaced(
        "torch.cuda.device_count", lambda: 1, "with 0 Megatron sets up no process groups and no random number streams"
    ),
    replaced("torch.cuda.get_device_properties", _device_properties, "checks of the architecture"),
    replaced("torch.cuda.get_device_capability", lambda *_: (10, 0), "checks of the architecture"),
    replaced("torch.cuda.get_device_name", lambda *_: "cpu", "logging"),
    replaced("torch.cuda.set_device", nothing, "one device"),
    replaced("torch.cuda.device", _no_context, "one device"),
    replaced("torch.cuda.synchronize", nothing, "the CPU is always done"),
    replaced("torch.cuda.empty_cache", nothing, "no caching allocator"),
    replaced("torch.cuda.ipc_collect", nothing, "no caching allocator"),
    replaced("torch.cuda.reset_peak_memory_stats", nothing, "no caching allocator"),
    replaced("torch.cuda.memory_stats", lambda *_: defaultdict(int), "logging"),
    replaced("torch.cuda.memory_allocated", _zero, "logging"),
    replaced("torch.cuda.memory_reserved", _zero, "logging"),
    replaced("torch.cuda.max_memory_allocated", _zero, "logging"),
    replaced("torch.cuda.max_memory_reserved", _zero, "logging"),
    replaced("torch.cuda.device_memory_used", _zero, "logging"),
    replaced("torch.cuda.mem_get_info", lambda *_: (0, 0), "logging"),
    replaced("torch.cuda.Stream", CpuStream, "no streams"),
    replaced("torch.cuda.Event", CpuEvent, "no streams; timers"),
    replaced("torch.cuda.stream", _no_context, "no streams"),
    replaced("torch.cuda.set_stream", nothing, "no streams"),
    replaced("torch.cuda.current_stream", lambda *_: _STREAM, "no streams"),
    replaced("torch.cuda.default_stream", lambda *_: _STREAM, "no streams"),
    replaced("torch.cuda.is_current_stream_capturing", lambda: False, "no CUDA graphs"),
    replaced("torch.cuda.nvtx.range_push", nothing, "no profiler ranges"),
    replaced("torch.cuda.nvtx.range_pop", nothing, "no profiler ranges"),
    replaced("torch.cuda.default_generators", (torch.default_generator,), "the CPU generator serves both"),
    replaced("torch.cuda.get_rng_state", get_rng_state, "the CPU generator serves both"),
    replaced("torch.cuda.set_rng_state", set_rng_state, "the CPU generator serves both"),
    replaced("torch.cuda.random.get_rng_state", get_rng_state, "the CPU generator serves both"),
    replaced("torch.cuda.random.set_rng_state", set_rng_state, "the CPU generator serves both"),
    replaced("torch.cuda.manual_seed", _manual_seed, "the CPU generator serves both"),
    replaced("torch.cuda.manual_seed_all", _manual_seed, "the CPU generator serves both"),
    *(
        replaced(f"torch.cuda.{name}Tensor", getattr(torch, f"{name}Tensor"), "called, and used in isinstance")
        for name in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
    replaced("torch.Tensor.cuda", lambda self, *_, **__: self, "one device"),
    replaced("torch.nn.Module.cuda", lambda self, *_, **__: self, "one device"),
    replaced("torch.Tensor.pin_memory", lambda self, *_: self, "needs a GPU's driver"),
    replaced("torch.Tensor.record_stream", nothing, "no streams"),
)
