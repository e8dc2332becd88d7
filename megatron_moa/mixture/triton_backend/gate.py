"""Computes gates in one launch, for one gate or one per expert.

The launch does product, bias, psi, amplitude and scale.

A program has TOKENS rows of one expert. Which, it finds by counting tiles of the experts before it, so the host need
not know how many tokens each has; experts that end inside a tile leave at most one tile each without work. TF32 holds
half-precision numbers exactly, so their products are exact; the logits' gradients, float32, are rounded to it once, to
2^-12, where what they give is rounded to half precision's 2^-9 or 2^-12 next. Beside float32 weights they are
multiplied as three of TF32's numbers.

Backward: a program owns its rows' gradients of x, and writes its share of those of the parameters to a row of partial
sums, which one further launch for each parameter adds, always in the same order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.triton_backend.launch import launch, row_stride

_TOKENS = 64  # rows a program
_HIDDEN = 64  # columns of x at a time; half as many beyond 64 coefficients
_SLAB = 512  # columns of x whose gradients one program gives
_WARPS = 4
_SUMMED = 32, 128  # partial sums, and columns of them, that a program adds at a time
_FEWEST = 16  # what Triton's product asks for in each direction


@triton.jit
def _rows_of_tile(tokens, group_ends, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """This program's expert, its rows [TOKENS] int64, and which of them it has."""
    tile = tl.program_id(0)
    group = 0
    first = tile * TOKENS
    last = tokens
    if GROUPS > 0:
        first = 0
        last = 0
        begin = 0
        for index in tl.static_range(GROUPS):
            end = tl.load(group_ends + index)
            tiles = tl.cdiv(end - begin, TOKENS)
            here = (tile >= 0) & (tile < tiles)
            group = tl.where(here, index, group)
            first = tl.where(here, begin + tile * TOKENS, first)
            last = tl.where(here, end, last)
            tile -= tiles
            begin = end
    row = (first + tl.arange(0, TOKENS)).to(tl.int64)
    return group, row, row < last


@triton.jit
def _psi(
    x,
    x_stride,
    weight,
    bias,
    group,
    row,
    has_row,
    N: tl.constexpr,
    H: tl.constexpr,
    GATE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """psi(u_k x + b_k), [TOKENS, COLUMNS]; columns from N on are padding."""
    column = tl.arange(0, COLUMNS)
    hidden = tl.arange(0, HIDDEN)
    logits = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, H, HIDDEN):
        at = start + hidden
        x_tile = tl.load(
            x + row[:, None] * x_stride + at[None, :], mask=has_row[:, None] & (at < H)[None, :], other=0.0
        )
        w_tile = tl.load(
            weight + (group * N + column)[None, :] * H + at[:, None],
            mask=(column < N)[None, :] & (at < H)[:, None],
            other=0.0,
        )
        logits = tl.dot(x_tile.to(tl.float32), w_tile.to(tl.float32), logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias + group * N + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GATE == "sigmoid":
        psi = tl.sigmoid(logits)
    elif GATE == "tanh":
        psi = 2.0 * tl.sigmoid(2.0 * logits) - 1.0
    else:
        tl.static_assert(GATE == "softmax")
        psi = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for branch in tl.static_range(N // SOFTMAX):
            inside = ((column >= branch * SOFTMAX) & (column < (branch + 1) * SOFTMAX))[None, :]
            branch_logits = tl.where(inside, logits, float("-inf"))
            powers = tl.exp(branch_logits - tl.max(branch_logits, axis=1)[:, None])
            psi += powers / tl.sum(powers, axis=1)[:, None]
    return psi


@triton.jit
def _rounded_to_tf32(x):
    """The nearest number that TF32's products take as it is; they would cut x off."""
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    rounded = (bits & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # of NVIDIA's NaN, 0x7fffffff, the sum would be -0


@triton.jit
def _gate_forward_kernel(
    x,
    weight,
    bias,
    amplitude,
    scale,
    group_ends,
    coefficients,
    tokens,
    x_stride,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    GATE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    group, row, has_row = _rows_of_tile(tokens, group_ends, GROUPS, TOKENS)
    column = tl.arange(0, COLUMNS)
    c = _psi(
        x, x_stride, weight, bias, group, row, has_row, N, H, GATE, SOFTMAX, HAS_BIAS, PRECISION, COLUMNS,
        TOKENS, HIDDEN,
    )  # fmt: skip
    if HAS_AMPLITUDE:
        a = tl.load(amplitude + group * N + column, mask=column < N, other=0.0).to(tl.float32)
        c = a[None, :] * (SLOPE * c + OFFSET)
    if HAS_SCALE:
        c *= tl.load(scale).to(tl.float32)
    tl.store(coefficients + row[:, None] * N + column[None, :], c, mask=has_row[:, None] & (column < N)[None, :])


@triton.jit
def _gate_backward_kernel(
    grad,
    coefficients,
    x,
    weight,
    bias,
    amplitude,
    scale,
    group_ends,
    grad_x,
    weight_sums,
    bias_sums,
    amplitude_sums,
    tokens,
    x_stride,
    SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_AMPLITUDE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    GATE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLAB: tl.constexpr,
):
    group, row, has_row = _rows_of_tile(tokens, group_ends, GROUPS, TOKENS)
    program = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    hidden = tl.arange(0, HIDDEN)
    inside = has_row[:, None] & (column < N)[None, :]
    g = tl.load(grad + row[:, None] * N + column[None, :], mask=inside, other=0.0)
    s = 1.0
    if HAS_SCALE:
        s = tl.load(scale).to(tl.float32)
        g *= s
    if HAS_AMPLITUDE:
        # Coefficients cannot be divided by an amplitude of 0, so psi is computed again.
        psi = _psi(
            x, x_stride, weight, bias, group, row, has_row, N, H, GATE, SOFTMAX, HAS_BIAS, PRECISION, COLUMNS,
        TOKENS, HIDDEN,
        )  # fmt: skip
        a = tl.load(amplitude + group * N + column, mask=column < N, other=0.0).to(tl.float32)
        if slab == 0:
            sums = tl.sum(g * (SLOPE * psi + OFFSET), axis=0)
            tl.store(amplitude_sums + program * N + column, sums, mask=column < N)
        g *= a[None, :] * SLOPE
    else:
        psi = tl.load(coefficients + row[:, None] * N + column[None, :], mask=inside, other=0.0) / s
    # From psi's gradient to the logits'.
    if GATE == "sigmoid":
        g = g * psi * (1.0 - psi)
    elif GATE == "tanh":
        g = g * (1.0 - psi * psi)
    else:
        tl.static_assert(GATE == "softmax")
        product = g * psi
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for branch in tl.static_range(N // SOFTMAX):
            mine = ((column >= branch * SOFTMAX) & (column < (branch + 1) * SOFTMAX))[None, :]
            total += tl.where(mine, tl.sum(tl.where(mine, product, 0.0), axis=1)[:, None], 0.0)
        g = product - psi * total
    g = tl.where(inside, g, 0.0)
    if HAS_BIAS:  # noqa: SIM102, known at compile time, unlike the other
        if slab == 0:
            tl.store(bias_sums + program * N + column, tl.sum(g, axis=0), mask=column < N)
    if GRADIENT_PRECISION == "tf32":
        g = _rounded_to_tf32(g)
    for start in range(0, SLAB, HIDDEN):
        at = slab * SLAB + start + hidden
        x_inside = has_row[:, None] & (at < H)[None, :]
        if NEED_X:
            w_tile = tl.load(
                weight + (group * N + column)[:, None] * H + at[None, :],
                mask=(column < N)[:, None] & (at < H)[None, :],
                other=0.0,
            )
            g_x = tl.dot(g, w_tile.to(tl.float32), input_precision=GRADIENT_PRECISION)
            tl.store(grad_x + row[:, None] * H + at[None, :], g_x.to(grad_x.dtype.element_ty), mask=x_inside)
        if NEED_WEIGHT:
            x_tile = tl.load(x + row[:, None] * x_stride + at[None, :], mask=x_inside, other=0.0)
            g_w = tl.dot(tl.trans(g), x_tile.to(tl.float32), input_precision=GRADIENT_PRECISION)
            tl.store(
                weight_sums + (program * N + column)[:, None] * H + at[None, :],
                g_w,
                mask=(column < N)[:, None] & (at < H)[None, :],
            )


@triton.jit
def _gate_sum_kernel(
    partial,
    total,
    group_ends,
    programs,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTIALS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sets total[group] to the sum of its programs' rows of partial [programs, SIZE].

    A group without tokens gets 0.
    """
    group = tl.program_id(1)
    begin = tl.full([], 0, tl.int32)
    end = programs
    if GROUPS > 0:
        end = tl.full([], 0, tl.int32)
        start = tl.full([], 0, tl.int32)
        for index in tl.static_range(GROUPS):
            stop = tl.load(group_ends + index)
            begin = tl.where(index == group, end, begin)
            end += tl.where(index <= group, tl.cdiv(stop - start, TOKENS), 0)
            start = stop
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros([PARTIALS, COLUMNS], tl.float32)
    while begin < end:  # not range(), whose bounds the interpreter wants as plain numbers
        row = begin + tl.arange(0, PARTIALS)
        inside = (row < end)[:, None] & (column < SIZE)[None, :]
        sums += tl.load(partial + row.to(tl.int64)[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
        begin += PARTIALS
    out = total + group.to(tl.int64) * SIZE + column
    tl.store(out, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=column < SIZE)


def forward(inputs: GateInputs, mixture: MixtureConfig) -> Tensor:
    """``gate_forward`` of :class:`megatron_moa.mixture.autograd.Backend`: one launch."""
    inputs = _dense(inputs)
    x = inputs.x
    *tokens, h = x.shape
    coefficients = x.new_empty(*tokens, inputs.weight.shape[-2], dtype=torch.float32)
    arguments = (*inputs, coefficients, x.numel() // h, row_stride(x))
    launch(_gate_forward_kernel, (_tiles(inputs),), arguments, _constants(_shape(inputs), mixture), _WARPS)
    return coefficients


def backward(
    inputs: GateInputs, mixture: MixtureConfig, grad: Tensor, coefficients: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Computes ``gate_backward`` of :class:`megatron_moa.mixture.autograd.Backend`.

    It takes one launch, and one for each parameter.
    """
    inputs = _dense(inputs)
    x, weight, bias, amplitude = inputs[:4]
    need_x, need_weight = needed
    programs, (n, h) = _tiles(inputs), weight.shape[-2:]

    def partial_sums(wanted: bool, *shape: int) -> Tensor | None:
        return x.new_empty(programs, *shape, dtype=torch.float32) if wanted else None

    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    sums = partial_sums(need_weight, n, h), partial_sums(bias is not None, n), partial_sums(amplitude is not None, n)
    arguments = (grad, coefficients, *inputs, grad_x, *sums, x.numel() // h, row_stride(x))
    constants = _backward_constants(_shape(inputs), mixture, needed)
    launch(_gate_backward_kernel, (programs, -(-h // _SLAB)), arguments, constants, _WARPS)
    return grad_x, *[_total(*pair, inputs) for pair in zip(sums, inputs[1:4], strict=True)]


def _dense(inputs: GateInputs) -> GateInputs:
    """The same with contiguous parameters; x comes so (autograd._with_rows)."""
    parameters = inputs[1:4]
    if all(tensor is None or tensor.is_contiguous() for tensor in parameters):
        return inputs
    weight, bias, amplitude = (None if tensor is None else tensor.contiguous() for tensor in parameters)
    return inputs._replace(weight=weight, bias=bias, amplitude=amplitude)


def _tiles(inputs: GateInputs) -> int:
    """Programs that surely suffice, however the tokens are spread over the groups."""
    x = inputs.x
    return -(-(x.numel() // x.shape[-1]) // _TOKENS) + _groups(inputs)


def _groups(inputs: GateInputs) -> int:
    return 0 if inputs.group_ends is None else inputs.group_ends.shape[0]


class _Shape(NamedTuple):
    """What of a gate's inputs kernels are compiled for."""

    n: int
    h: int
    groups: int
    x: torch.dtype
    weight: torch.dtype
    has_bias: bool
    has_amplitude: bool
    has_scale: bool


def _shape(inputs: GateInputs) -> _Shape:
    x, weight, bias, amplitude, scale, _ = inputs
    present = bias is not None, amplitude is not None, scale is not None
    return _Shape(*weight.shape[-2:], _groups(inputs), x.dtype, weight.dtype, *present)


@functools.cache
def _constants(shape: _Shape, mixture: MixtureConfig) -> dict[str, object]:
    """What the forward kernel is compiled for."""
    slope, offset = mixture.psi_hat
    exact = torch.float32 in (shape.x, shape.weight) or torch.version.hip
    return {
        "SLOPE": slope,
        "OFFSET": offset,
        "HAS_AMPLITUDE": shape.has_amplitude,
        "HAS_SCALE": shape.has_scale,
        "GROUPS": shape.groups,
        "N": shape.n,
        "H": shape.h,
        "GATE": mixture.gate,
        "SOFTMAX": mixture.softmax_size,
        "HAS_BIAS": shape.has_bias,
        "PRECISION": "ieee" if exact else "tf32",
        "COLUMNS": max(_FEWEST, triton.next_power_of_2(shape.n)),
        "TOKENS": _TOKENS,
        # With 128 columns of coefficients, whole tiles of x ask for 240 KiB of shared memory; an H100 has 227.
        "HIDDEN": _HIDDEN if shape.n <= 64 else _HIDDEN // 2,
    }


@functools.cache
def _backward_constants(shape: _Shape, mixture: MixtureConfig, needed: tuple[bool, bool]) -> dict[str, object]:
    """What the backward kernel is compiled for."""
    constants = dict(_constants(shape, mixture))
    precision = "tf32x3" if shape.weight == torch.float32 else "tf32"
    # Three products of TF32 keep three tiles in shared memory: beyond 64 coefficients more than most GPUs have.
    if shape.x == torch.float32 or torch.version.hip or (precision == "tf32x3" and shape.n > 64):
        precision = "ieee"
    if precision == "tf32x3":
        constants["HIDDEN"] = _HIDDEN // 2
    need_x, need_weight = needed
    further = {"NEED_X": need_x, "NEED_WEIGHT": need_weight, "GRADIENT_PRECISION": precision, "SLAB": _SLAB}
    return {**constants, **further}


def _total(partial: Tensor | None, parameter: Tensor | None, inputs: GateInputs) -> Tensor | None:
    """A parameter's gradient: the sum of the programs' parts, of each group its own."""
    if partial is None:
        return None
    groups = _groups(inputs)
    total = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    size = total.numel() // (groups or 1)
    constants = _sum_constants(groups, size)
    grid = -(-size // _SUMMED[1]), groups or 1
    launch(_gate_sum_kernel, grid, (partial, total, inputs.group_ends, len(partial)), constants, _WARPS)
    return total


@functools.cache
def _sum_constants(groups: int, size: int) -> dict[str, object]:
    return {"GROUPS": groups, "SIZE": size, "TOKENS": _TOKENS, "PARTIALS": _SUMMED[0], "COLUMNS": _SUMMED[1]}
