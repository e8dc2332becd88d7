"""Launches kernels by looking up the compiled one.

Triton's own launch binds and inspects all arguments again, which takes 11 us.

What is looked up is what Triton compiles anew for: constants, warps, device, each tensor's dtype and whether it is
aligned to 16 bytes, and of each integer whether it is 1, divisible by 16, and beyond 32 bits. The first launch of each
kind is Triton's own, and every launch is where Triton is another version than the one this was written for, on
AMD's GPUs (which know more kinds), in the interpreter, and while a profiler has hooked launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_KNOWN = triton.__version__.startswith("3.6.") and torch.version.hip is None and not knobs.runtime.interpret

# By kind: the compiled kernel, its constants in order, and the objects whose addresses are part of the kind.
_compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...], dict[str, object], triton.JITFunction]] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: Sequence[Tensor | int | None],
    constants: dict[str, object],
    warps: int,
) -> None:
    """Starts a kernel on the current device and stream.

    Args:
        kernel: its parameters are ``arguments``, in order, then ``constants``.
        constants: the same object at every launch of a kind, never changed.
        warps: of a program.
    """
    if not _is_direct():
        kernel[grid](*arguments, **constants, num_warps=warps)
        return
    device = driver.active.get_current_device()
    kind = id(kernel), warps, device, id(constants), _kinds(arguments)
    found = _compiled.get(kind)
    if found is None:
        compiled = kernel[grid](*arguments, **constants, num_warps=warps)
        in_order = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[kind] = compiled, in_order, constants, kernel
        return
    compiled, in_order, *_ = found
    stream = driver.active.get_current_stream(device)
    programs = (*grid, 1, 1)[:3]
    no_hooks = None, None, None
    compiled.run(*programs, stream, compiled.function, compiled.packed_metadata, *no_hooks, *arguments, *in_order)


def row_stride(tensor: Tensor) -> int:
    """From one token's row to the next; 0 for what all tokens share.

    Beyond two dimensions rows follow one another (megatron_moa.mixture.autograd.MixtureInputs). Strides do not say so:
    that of a dimension of size 1 may be anything.
    """
    if tensor.dim() == 2:
        return tensor.stride(0)
    return tensor.shape[-1] if tensor.dim() > 1 else 0


def _kinds(arguments: Sequence[Tensor | int | None]) -> tuple[object, ...]:
    kinds: list[object] = []
    for argument in arguments:  # in one loop: a call each would take as long as all else here
        if argument is None:
            kinds.append(None)
        elif type(argument) is int:
            kinds.append((argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31))
        else:
            kinds.append(argument.dtype)
            kinds.append(argument.data_ptr() % 16)
    return tuple(kinds)


def _is_direct() -> bool:
    return _KNOWN and not knobs.runtime.launch_enter_hook.calls and not knobs.runtime.launch_exit_hook.calls
