"""The activations (megatron_moa.activations) as Triton functions: the same code, with ``torch`` read as Triton."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_moa.activations import ACTIVATIONS


@functools.cache
def triton_function(function: FunctionType) -> triton.JITFunction:
    """A function of megatron_moa.activations for use inside kernels, with all that it calls."""
    words: dict[str, Any] = {"tl": tl, "Tensor": tl.tensor}
    for name in function.__code__.co_names:
        if name in function.__globals__:
            words[name] = _in_triton(function.__globals__[name])
    copy = FunctionType(function.__code__, words, function.__name__)
    copy.__module__ = function.__module__
    return triton.jit(copy)


def _in_triton(meaning: Any) -> Any:
    if meaning is torch:
        return tl
    if isinstance(meaning, FunctionType):
        return triton_function(meaning)
    return tl.constexpr(meaning)


@functools.cache
def values(activations: tuple[str, ...]) -> tuple[triton.JITFunction, ...]:
    """The functions sigma_k of a dictionary, in its order."""
    return tuple(triton_function(ACTIVATIONS[name].value) for name in activations)


@functools.cache
def derivatives(activations: tuple[str, ...]) -> tuple[triton.JITFunction, ...]:
    """The functions sigma_k' of a dictionary, in its order."""
    return tuple(triton_function(ACTIVATIONS[name].derivative) for name in activations)


@triton.jit
def load_all(pointer, COUNT: tl.constexpr):
    """COUNT numbers from a pointer on, as a tuple of float32 scalars."""
    loaded = ()
    for index in tl.static_range(COUNT):
        loaded = loaded + (tl.load(pointer + index).to(tl.float32),)
    return loaded


@triton.jit
def weighted_sum(x, coefficients, FUNCTIONS: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """sum_k coefficients[FIRST + k] FUNCTIONS[k](x) over COUNT functions."""
    total = coefficients[FIRST] * FUNCTIONS[0](x)
    for k in tl.static_range(1, COUNT):
        total += coefficients[FIRST + k] * FUNCTIONS[k](x)
    return total
