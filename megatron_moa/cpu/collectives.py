"""Lets gloo gather and scatter tensors of different lengths, as NCCL does."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.cpu.patching import wrapped


def _padded(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with zero rows added, up to ``rows``."""
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def _of_any_sizes(original: Callable) -> Callable:
    """Lets ``all_gather`` and ``reduce_scatter`` take tensors of different lengths under gloo.

    Both have one tensor a rank in a list. NCCL takes different lengths, as experts' ranks have tokens, and ranks of a
    layer-wise optimizer parameters; gloo wants equal ones. With ``async_op`` all is done when the call returns.
    """
    gathers = original.__name__ == "all_gather"

    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors, tensor = args[:2] if gathers else reversed(args[:2])
        rows = {t.shape[0] if t.dim() else None for t in tensors}
        if len(rows) == 1:
            return original(*args, **kwargs)
        own = _padded(tensor, max(rows))
        padded = [_padded(t, max(rows)) for t in tensors]
        work = original(*((padded, own) if gathers else (own, padded)), *args[2:], **kwargs)
        if work is not None:
            work.wait()
        for target, values in zip(tensors, padded, strict=True) if gathers else [(tensor, own)]:
            target.copy_(values[: target.shape[0]])
        return work

    return collective


PATCHES = (
    wrapped("torch.distributed.all_gather", _of_any_sizes, "gloo takes equal sizes only"),
    wrapped("torch.distributed.reduce_scatter", _of_any_sizes, "gloo takes equal sizes only"),
)
