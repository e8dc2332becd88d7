"""Makes Triton functions of the activations in activations.py.

The code is the same, with ``torch`` read as Triton.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from megatron_moa.mixture import activations, approximations
from megatron_moa.mixture.activations import read_as
from megatron_moa.mixture.approximations import APPROXIMATIONS
from megatron_moa.mixture.lowering import lower
from megatron_moa.mixture.triton_backend.tile_sizes import exact_everywhere

VECTOR = 8  # columns a thread holds next to each other: 16 bytes of bf16, the widest load there is


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def inverse(y):
    """1 / y for y >= 1, an instruction of NVIDIA's; 0 beyond 2^126."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def coarse_tanh(x):
    """tanh to a relative error of 2^-11, an instruction of NVIDIA's."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


# Their twins for other GPUs and for Triton's interpreter are the functions they stand for.
_INSTRUCTIONS = {activations.inverse: inverse, approximations.coarse_tanh: coarse_tanh}


_HAS_INSTRUCTIONS = torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


class Target(NamedTuple):
    """What activations become Triton functions for.

    Attributes:
        exact: to float32's accuracy; else as accurate as bfloat16 can show.
        nvidia: with instructions of NVIDIA's GPUs.
    """

    exact: bool
    nvidia: bool


def target_of(dtype: torch.dtype) -> Target:
    """The target for inputs of this dtype here."""
    return Target(dtype != torch.bfloat16 or exact_everywhere(), _HAS_INSTRUCTIONS)


@functools.cache
def triton_function(function: FunctionType, target: Target) -> triton.JITFunction:
    """A function of megatron_moa.mixture.activations for use inside kernels, with all that it calls."""
    if not target.exact:
        function = APPROXIMATIONS.get(function, function)
    if function is activations.relu:
        return relu
    if target.nvidia and function in _INSTRUCTIONS:
        return _INSTRUCTIONS[function]
    copy = read_as(function, lambda meaning: _in_triton(meaning, target))
    copy.__globals__.update(tl=tl, Tensor=tl.tensor)
    return triton.jit(copy)


def _in_triton(meaning: Any, target: Target) -> Any:
    if meaning is torch:
        return tl
    if isinstance(meaning, FunctionType):
        return triton_function(meaning, target)
    return tl.constexpr(meaning)


@dataclass(frozen=True, repr=False)
class Terms:
    """A dictionary's terms (megatron_moa.mixture.lowering.Basis) with Triton's functions.

    Kernels take such an object as a constant.

    Attributes:
        linear, powers, matrix: as in Basis.
        factors: F_j and its derivative.
        levels: G_j and its derivative.
        alone: the terms of each activation alone.
    """

    linear: bool
    powers: tuple[int, ...]
    factors: tuple[tuple[triton.JITFunction, triton.JITFunction], ...]
    levels: tuple[tuple[triton.JITFunction, triton.JITFunction], ...]
    matrix: tuple[tuple[float, ...], ...]
    alone: tuple[Terms, ...]

    def __repr__(self) -> str:
        return f"Terms_{self.cache_key}"

    @functools.cached_property
    def cache_key(self) -> str:
        """What Triton keeps a compiled kernel under: the functions' own keys hold their source."""
        functions = [function.cache_key for pair in self.factors + self.levels for function in pair]
        text = repr((self.linear, self.powers, self.matrix, self.alone, functions))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def terms_of(dictionary: tuple[str, ...], target: Target) -> Terms:
    """The terms of these activations."""
    basis = lower(dictionary)
    factors, levels = (
        tuple(
            (triton_function(function.value, target), triton_function(function.derivative, target))
            for function in functions
        )
        for functions in (basis.factors, basis.levels)
    )
    alone = tuple(terms_of((name,), target) for name in dictionary) if len(dictionary) > 1 else ()
    return Terms(basis.linear, basis.powers, factors, levels, basis.matrix, alone)


@triton.jit
def widened(x, NVIDIA: tl.constexpr):
    """Returns x in float32.

    bfloat16 is the upper half of float32. With NVIDIA, one instruction a number puts it there; Triton's own conversion
    takes more.
    """
    if NVIDIA and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        ).to(tl.float32, bitcast=True)
    else:  # noqa: RET505, Triton compiles what follows a return
        return x.to(tl.float32)


@triton.jit
def load_branch(z, bias, row_start, column, inside, HAS_BIAS: tl.constexpr, NVIDIA: tl.constexpr):
    """z + bias, float32, at these columns of the row that starts at ``row_start``."""
    x = widened(tl.load(z + row_start + column, mask=inside, other=0.0), NVIDIA)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def tile_columns(start, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Returns the columns from ``start`` on as [BLOCK / VECTOR, VECTOR].

    A row has VECTOR neighbours, which one thread holds.
    """
    return start + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of COUNT accumulators [SIZE]."""
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros([SIZE], tl.float32),)
    return made


@triton.jit
def plus(total, part):
    """``total + part``; ``part`` alone where there is no total yet."""
    return part if total is None else total + part


@triton.jit
def lowered(c, TERMS: tl.constexpr, FIRST: tl.constexpr):
    """The coefficients of the terms, a tuple, from those of the activations, which begin at ``c[FIRST]``."""
    made = ()
    for term in tl.static_range(len(TERMS.matrix[0])):
        total = None
        for k in tl.static_range(len(TERMS.matrix)):
            if TERMS.matrix[k][term] != 0.0:
                total = plus(total, TERMS.matrix[k][term] * c[FIRST + k])
        made = made + (total,)
    return made


@triton.jit
def polynomial(r, a, TERMS: tl.constexpr, LOWEST: tl.constexpr, DERIVATIVE: tl.constexpr):
    """Returns sum_p a_p r^(p - LOWEST) over powers p from LOWEST on, or None without any.

    For DERIVATIVE each summand is multiplied by p - 1.
    """
    highest: tl.constexpr = TERMS.powers[len(TERMS.powers) - 1]
    total = None
    for power in tl.static_range(highest, LOWEST - 1, -1):
        if total is not None:
            total *= r
        for index in tl.static_range(len(TERMS.powers)):
            if TERMS.powers[index] == power:
                part = a[TERMS.linear + index]
                total = plus(total, (power - 1.0) * part if DERIVATIVE and power > 2 else part)
    return total


@triton.jit
def weighted(x, a, TERMS: tl.constexpr, LEVELS: tl.constexpr, DERIVATIVE: tl.constexpr):
    """sum_j a_j F_j(x), or of LEVELS sum_j a_j G_j(x), or of their derivatives; None without any."""
    functions: tl.constexpr = TERMS.levels if LEVELS else TERMS.factors
    first: tl.constexpr = TERMS.linear + len(TERMS.powers) + (len(TERMS.factors) if LEVELS else 0)
    total = None
    for j in tl.static_range(len(functions)):
        total = plus(total, a[first + j] * functions[j][DERIVATIVE](x))
    return total


@triton.jit
def value(x, a, TERMS: tl.constexpr):
    """m(x) by the coefficients ``a`` of its terms (megatron_moa.mixture.lowering)."""
    total = weighted(x, a, TERMS, True, False)
    slope = weighted(x, a, TERMS, False, False)
    if TERMS.linear:
        slope = plus(slope, a[0])
    if slope is not None:
        total = plus(total, x * slope)
    if len(TERMS.powers) > 0:
        r = relu(x)
        total = plus(total, r * polynomial(r, a, TERMS, 1, False))
    return total


@triton.jit
def value_and_derivative(x, a, TERMS: tl.constexpr):
    """m(x) and m'(x). They share x's slopes, so relu's part is one of these, chosen by x's sign."""
    total = weighted(x, a, TERMS, True, False)
    derivative = weighted(x, a, TERMS, True, True)
    slope = weighted(x, a, TERMS, False, False)
    if len(TERMS.powers) > 0 and TERMS.powers[0] == 1:
        if TERMS.linear:
            slope = plus(slope, tl.where(x > 0.0, a[0] + a[1], a[0]))
        else:
            slope = plus(slope, tl.where(x > 0.0, a[0], 0.0))
    elif TERMS.linear:
        slope = plus(slope, a[0])
    if len(TERMS.powers) > 0 and TERMS.powers[len(TERMS.powers) - 1] > 1:
        r = relu(x)
        slope = plus(slope, r * polynomial(r, a, TERMS, 2, False))
        derivative = plus(derivative, r * polynomial(r, a, TERMS, 2, True))
    if slope is not None:
        total = plus(total, x * slope)
        derivative = plus(derivative, slope)
    if len(TERMS.factors) > 0:
        derivative = plus(derivative, x * weighted(x, a, TERMS, False, True))
    return total, derivative


@triton.jit
def times_power(x, r, COUNT: tl.constexpr):
    """x r^COUNT"""
    for _ in tl.static_range(COUNT):
        x *= r
    return x


@triton.jit
def add_terms(sums, g, x, TERMS: tl.constexpr, FIRST: tl.constexpr):
    """Returns ``sums``, accumulators, with g times each term of x added from FIRST on.

    Each product is summed over a thread's columns.
    """
    powers: tl.constexpr = FIRST + TERMS.linear
    factors: tl.constexpr = powers + len(TERMS.powers)
    levels: tl.constexpr = factors + len(TERMS.factors)
    after: tl.constexpr = levels + len(TERMS.levels)
    gx = g * x
    r = relu(x)
    added = ()
    for index in tl.static_range(len(sums)):
        if index < FIRST or index >= after:
            added = added + (sums[index],)
        else:
            if index >= levels:
                product = g * TERMS.levels[index - levels][0](x)
            elif index >= factors:
                product = gx * TERMS.factors[index - factors][0](x)
            elif index < powers:
                product = gx
            elif TERMS.powers[index - powers] == 1:
                product = g * r
            else:
                product = times_power(gx, r, TERMS.powers[index - powers] - 1)
            added = added + (sums[index] + tl.sum(product, axis=1),)
    return added


@triton.jit
def store_raised(pointer, sums, TERMS: tl.constexpr, FIRST: tl.constexpr):
    """Writes the gradients of a dictionary's coefficients from a pointer on.

    The dictionary's terms have ``sums`` from FIRST on.
    """
    totals = ()
    for term in tl.static_range(len(TERMS.matrix[0])):
        totals = totals + (tl.sum(sums[FIRST + term], axis=0),)
    for k in tl.static_range(len(TERMS.matrix)):
        gradient = None
        for term in tl.static_range(len(TERMS.matrix[0])):
            if TERMS.matrix[k][term] != 0.0:
                gradient = plus(gradient, TERMS.matrix[k][term] * totals[term])
        tl.store(pointer + k, gradient)


@triton.jit
def times(g, values):
    """g times each of ``values``, a tuple."""
    made = ()
    for index in tl.static_range(len(values)):
        made = made + (g * values[index],)
    return made


@triton.jit
def add_pairs(sums, values1, values2, PAIRS: tl.constexpr, FIRST: tl.constexpr):
    """``sums``, with values1[k] values2[l], summed over a thread's columns, for as many pairs from FIRST."""
    added = ()
    for index in tl.static_range(len(sums)):
        product = values1[PAIRS[FIRST + index][0]] * values2[PAIRS[FIRST + index][1]]
        added = added + (sums[index] + tl.sum(product, axis=1),)
    return added


@triton.jit
def store_sums(pointer, sums):
    """Writes each accumulator's sum, one after the other from a pointer on."""
    for index in tl.static_range(len(sums)):
        tl.store(pointer + index, tl.sum(sums[index], axis=0))


@triton.jit
def load_all(pointer, COUNT: tl.constexpr):
    """COUNT numbers from a pointer on, as a tuple of float32 scalars."""
    loaded = ()
    for index in tl.static_range(COUNT):
        loaded = loaded + (tl.load(pointer + index).to(tl.float32),)
    return loaded


@triton.jit
def alone(x, TERMS: tl.constexpr, K: tl.constexpr, DERIVATIVE: tl.constexpr):
    """The value, or derivative, of one activation."""
    terms: tl.constexpr = TERMS.alone[K] if len(TERMS.alone) > 0 else TERMS
    row: tl.constexpr = terms.matrix[0]
    return value_and_derivative(x, row, terms)[1] if DERIVATIVE else value(x, row, terms)


@triton.jit
def each(x, TERMS: tl.constexpr, DERIVATIVE: tl.constexpr):
    """The values, or derivatives, of the activations, a tuple."""
    made = ()
    for k in tl.static_range(len(TERMS.matrix)):
        made = made + (alone(x, TERMS, k, DERIVATIVE),)
    return made


@triton.jit
def row_sum(c, values, K: tl.constexpr, ROW: tl.constexpr):
    """sum_l c_kl values[l] over l >= k = ROW."""
    # Row-major over k <= l, c_kl is the coefficient k K - k (k + 1) / 2 + l.
    first: tl.constexpr = ROW * K - ROW * (ROW + 1) // 2
    total = c[first + ROW] * values[ROW]
    for index in tl.static_range(ROW + 1, K):
        total += c[first + index] * values[index]
    return total


@triton.jit
def bilinear(c, values1, values2, K: tl.constexpr):
    """sum_{k <= l} c_kl values1[k] values2[l]"""
    total = values1[0] * row_sum(c, values2, K, 0)
    for k in tl.static_range(1, K):
        total += values1[k] * row_sum(c, values2, K, k)
    return total
