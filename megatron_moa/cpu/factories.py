"""Lets tensors that are asked for on a GPU be made on the CPU."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_moa.cpu.patching import wrapped


def _is_cuda(device: Any) -> bool:
    """True for ``"cuda"``, ``"cuda:1"``, ``torch.device("cuda")`` and the bare index of a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(original: Callable) -> Callable:
    """``device=<a GPU>`` becomes the CPU, and memory is not pinned, which needs a GPU's driver.

    The functions are wrapped one by one instead of with one TorchFunctionMode: a mode holds in one thread only, and
    slows every operator down and costs torch.compile a second compilation per thread.
    """

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _to_cpu(original: Callable) -> Callable:
    """``tensor.to("cuda")`` stays on the CPU."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to


def _cuda_type_name(original: Callable) -> Callable:
    """Tells Megatron that a tensor's ``type()`` on the CPU is that of a CUDA tensor.

    Megatron's optimizers compare ``tensor.type()`` with "torch.cuda.FloatTensor"; only modules of Megatron's are told
    so.
    """

    @functools.wraps(original)
    def type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            dtype = dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            name = name.replace("torch.", "torch.cuda.", 1)
        return name

    return type


# Asked for before any function is replaced: torch keeps this set for `with torch.device("meta")`.
FACTORIES = sorted(
    {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    | {"empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"}
)

PATCHES = (
    *(wrapped(f"torch.{name}", _on_cpu, 'device="cuda"') for name in FACTORIES),
    wrapped("torch.Tensor.to", _to_cpu, '.to("cuda")'),
    wrapped("torch.Tensor.new_tensor", _on_cpu, 'device="cuda"'),
    wrapped("torch.Tensor.new_empty", _on_cpu, 'device="cuda"'),
    wrapped("torch.Tensor.new_zeros", _on_cpu, 'device="cuda"'),
    wrapped("torch.Tensor.new_ones", _on_cpu, 'device="cuda"'),
    wrapped("torch.Tensor.new_full", _on_cpu, 'device="cuda"'),
    wrapped("torch.Tensor.type", _cuda_type_name, "optimizers compare it with CUDA's names"),
)
