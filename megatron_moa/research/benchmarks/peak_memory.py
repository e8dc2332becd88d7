"""Measures the memory of what the benchmarks in tools/ compare.

That is its peak, and what is saved for backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.research.benchmarks.timing import Run, no_lap


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most memory a run holds at once above what is held before it, in bytes as requested by tensors.

    On a GPU the caching allocator's count (it rounds up to 512 bytes), on a CPU every allocation of tensor memory, in
    order, from torch's profiler. Warm up first, compilation allocates too; what is there before must stay.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(no_lap)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports that it found no GPU as an error
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        run(no_lap)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class Saved:
    """Storages that are kept for backward.

    A storage that several operations keep, or several views share, is there once.
    """

    storages: tuple[torch.UntypedStorage, ...]

    @property
    def bytes(self) -> int:
        """All of them, in bytes; measured when asked, so that outputs discarded to be recomputed count 0."""
        return sum(storage.nbytes() for storage in self.storages)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Those that hold one of these tensors."""
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(storage.nbytes() for storage in self.storages if storage._cdata in own)


def saved_for_backward(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> Saved:
    """What autograd keeps after a forward: inputs and intermediate results, parameters left out.

    Args:
        forward: runs once, with gradients.
        leave_out: further tensors that do not count; parameters never do.
    """
    outside = {tensor.untyped_storage()._cdata for tensor in leave_out}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in outside:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return Saved(tuple(storages.values()))
