"""Makes Triton functions of the activations in activations.py: the same code, with ``torch`` read as Triton."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_moa.mixture.activations import ACTIVATIONS

VECTOR = 8  # columns a thread holds next to each other: 16 bytes of bf16, the widest load there is


@functools.cache
def triton_function(function: FunctionType) -> triton.JITFunction:
    """A function of megatron_moa.mixture.activations for use inside kernels, with all that it calls."""
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


silu = triton_function(ACTIVATIONS["silu"].value)
silu_derivative = triton_function(ACTIVATIONS["silu"].derivative)


@triton.jit
def load_branch(z, bias, row_start, column, inside, HAS_BIAS: tl.constexpr):
    """z + bias, float32, at these columns of the row that starts at ``row_start``."""
    x = tl.load(z + row_start + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def tile_columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """[BLOCK / VECTOR, VECTOR]: the columns from ``start`` on, VECTOR neighbours to a row, which one thread holds."""
    return start + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of COUNT accumulators [SIZE]."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros([SIZE], tl.float32),)
    return made


@triton.jit
def add_terms(sums, factor, x, FUNCTIONS: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """``sums``, N accumulators, with factor FUNCTIONS[k](x), summed over a thread's columns, added to K from FIRST."""
    added = ()
    for index in tl.static_range(N):
        if index >= FIRST and index < FIRST + K:
            added = added + (sums[index] + tl.sum(factor * FUNCTIONS[index - FIRST](x), axis=1),)
        else:
            added = added + (sums[index],)
    return added


@triton.jit
def add_pairs(sums, g, x, y, FUNCTIONS: tl.constexpr, PAIRS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``sums``, with g FUNCTIONS[k](x) FUNCTIONS[l](y), summed over a thread's columns, for COUNT pairs from FIRST."""
    added = ()
    for index in tl.static_range(COUNT):
        product = g * FUNCTIONS[PAIRS[FIRST + index][0]](x) * FUNCTIONS[PAIRS[FIRST + index][1]](y)
        added = added + (sums[index] + tl.sum(product, axis=1),)
    return added


@triton.jit
def store_sums(pointer, sums, COUNT: tl.constexpr):
    """Writes each accumulator's sum, one after the other from a pointer on."""
    for index in tl.static_range(COUNT):
        tl.store(pointer + index, tl.sum(sums[index], axis=0))


@triton.jit
def load_all(pointer, COUNT: tl.constexpr):
    """COUNT numbers from a pointer on, as a tuple of float32 scalars."""
    loaded = ()
    for index in tl.static_range(COUNT):
        loaded = loaded + (tl.load(pointer + index).to(tl.float32),)
    return loaded


@triton.jit
def weighted_sum(
    x, coefficients, FUNCTIONS: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, START: tl.constexpr = 0
):
    """sum_k coefficients[FIRST + k] FUNCTIONS[k](x) over START <= k < K"""
    total = coefficients[FIRST + START] * FUNCTIONS[START](x)
    for k in tl.static_range(START + 1, K):
        total += coefficients[FIRST + k] * FUNCTIONS[k](x)
    return total


@triton.jit
def row_sum(x, coefficients, FUNCTIONS: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr):
    """sum_l c_kl FUNCTIONS[l](x) over l >= k = ROW."""
    # Row-major over k <= l, c_kl is the coefficient k K - k (k + 1) / 2 + l.
    return weighted_sum(x, coefficients, FUNCTIONS, K, ROW * K - ROW * (ROW + 1) // 2, ROW)


@triton.jit
def bilinear(x, y, coefficients, FUNCTIONS: tl.constexpr, K: tl.constexpr):
    """sum_{k <= l} c_kl FUNCTIONS[k](x) FUNCTIONS[l](y)"""
    total = FUNCTIONS[0](x) * row_sum(y, coefficients, FUNCTIONS, K, 0)
    for k in tl.static_range(1, K):
        total += FUNCTIONS[k](x) * row_sum(y, coefficients, FUNCTIONS, K, k)
    return total


@triton.jit
def bilinear_gradients(g, x, y, coefficients, FUNCTIONS: tl.constexpr, DERIVATIVES: tl.constexpr, K: tl.constexpr):
    """g times the derivatives of :func:`bilinear` by x and by y."""
    g_x = DERIVATIVES[0](x) * (g * row_sum(y, coefficients, FUNCTIONS, K, 0))
    g_y = g * FUNCTIONS[0](x) * row_sum(y, coefficients, DERIVATIVES, K, 0)
    for k in tl.static_range(1, K):
        g_x += DERIVATIVES[k](x) * (g * row_sum(y, coefficients, FUNCTIONS, K, k))
        g_y += g * FUNCTIONS[k](x) * row_sum(y, coefficients, DERIVATIVES, K, k)
    return g_x, g_y
