"""Computes the four forms, forward and backward: one row of tokens a program (LA's backward: a few).

Bytes that must move, in activation-sized tensors [t, f]: type1 two forward (z, out) and three backward (z, grad, grad
of z); the gated forms three and five. These kernels move no others: backward computes the activations again from z,
fc1's output, whose halves are z1 = W1 x and z2 = W2 x (type1: z1 alone). One-sided evaluates its dictionary on z2
only, and silu on z1.

A row's gradients of its coefficients are sums over f. Tiles are [BLOCK / 8, 8], a thread holds whole rows of eight, so
the sum over the eight stays inside it and only one addition per eight numbers reaches an accumulator; what the threads
hold is summed once, at the end of the row (MoA) or of all rows of the program (LA, whose programs each write one row
of partial sums). No atomics: two runs give the same bits.

The quadratic form has K (K + 1) / 2 sums, too many for the registers of one program where K is large: a launch takes
MOST_SUMS of them, and the last one gives the gradient of z, too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moa.mixture.autograd import MixtureInputs
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.triton_backend.language import (
    VECTOR,
    Target,
    add_pairs,
    add_terms,
    alone,
    bilinear,
    each,
    load_all,
    load_branch,
    lowered,
    store_raised,
    store_sums,
    target_of,
    terms_of,
    tile_columns,
    times,
    value,
    value_and_derivative,
    widened,
    zeros,
)
from megatron_moa.mixture.triton_backend.launch import launch, row_stride
from megatron_moa.mixture.triton_backend.tile_sizes import Configuration, configuration

MOST_SUMS = 28  # of the quadratic form in one launch: all of seven activations


@triton.jit
def _mixture_forward_kernel(
    z,
    coefficients,
    bias,
    scale,
    out,
    z_stride,
    coefficient_stride,
    FORM: tl.constexpr,
    TERMS: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = load_all(coefficients + row * coefficient_stride, N)
    if FORM != "quadratic":
        a = lowered(c, TERMS, 0)
    if FORM == "bi-sided":
        a2 = lowered(c, TERMS, K)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        z1 = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS, NVIDIA)
        if FORM == "type1":
            mixed = value(z1, a, TERMS)
        else:
            z2 = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS, NVIDIA)
            if FORM == "one-sided":
                mixed = alone(z1, SILU, 0, False) * value(z2, a, TERMS)
            elif FORM == "bi-sided":
                mixed = value(z1, a, TERMS) * value(z2, a2, TERMS)
            else:
                mixed = bilinear(c, each(z1, TERMS, False), each(z2, TERMS, False), K)
        if HAS_SCALE:
            mixed *= tl.load(scale + row).to(tl.float32)
        tl.store(out + row * F + column, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mixture_backward_kernel(
    grad,
    z,
    coefficients,
    bias,
    scale,
    grad_z,
    grad_coefficients,
    grad_scale,
    tokens,
    grad_stride,
    z_stride,
    grad_z_stride,
    coefficient_stride,
    FORM: tl.constexpr,
    TERMS: tl.constexpr,
    SILU: tl.constexpr,
    PAIRS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    F: tl.constexpr,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NVIDIA: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_COEFFICIENTS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sums = zeros(SUMS, BLOCK // VECTOR)
    for index in range(ROWS):
        row = program * ROWS + index
        c = load_all(coefficients + row * coefficient_stride, N)
        if FORM != "quadratic":
            a = lowered(c, TERMS, 0)
        if FORM == "bi-sided":
            a2 = lowered(c, TERMS, K)
        s = 1.0
        if HAS_SCALE:
            s = tl.load(scale + row, mask=row < tokens, other=0.0).to(tl.float32)
        out_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in range(0, F, BLOCK):
            column = tile_columns(start, BLOCK, VECTOR)
            inside = column < F
            if ROWS > 1:
                inside &= row < tokens
            g_out = widened(tl.load(grad + row * grad_stride + column, mask=inside, other=0.0), NVIDIA)
            g = g_out * s
            z1 = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS, NVIDIA)
            if FORM != "type1":
                z2 = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS, NVIDIA)
            if FORM == "type1":
                mixed, derivative = value_and_derivative(z1, a, TERMS)
                g_z1 = g * derivative
                if NEED_COEFFICIENTS:
                    sums = add_terms(sums, g, z1, TERMS, 0)
            elif FORM == "quadratic":
                values1 = each(z1, TERMS, False)
                values2 = each(z2, TERMS, False)
                mixed = bilinear(c, values1, values2, K)
                g_values1 = times(g, values1)
                g_z1 = bilinear(c, each(z1, TERMS, True), times(g, values2), K)
                g_z2 = bilinear(c, g_values1, each(z2, TERMS, True), K)
                if NEED_COEFFICIENTS:
                    sums = add_pairs(sums, g_values1, values2, PAIRS, FIRST)
            else:
                if FORM == "one-sided":
                    first = alone(z1, SILU, 0, False)
                    first_derivative = alone(z1, SILU, 0, True)
                    second, second_derivative = value_and_derivative(z2, a, TERMS)
                else:
                    first, first_derivative = value_and_derivative(z1, a, TERMS)
                    second, second_derivative = value_and_derivative(z2, a2, TERMS)
                mixed = first * second
                g1 = g * second
                g2 = g * first
                g_z1 = g1 * first_derivative
                g_z2 = g2 * second_derivative
                if NEED_COEFFICIENTS and FORM == "one-sided":
                    sums = add_terms(sums, g2, z2, TERMS, 0)
                elif NEED_COEFFICIENTS:
                    sums = add_terms(sums, g1, z1, TERMS, 0)
                    sums = add_terms(sums, g2, z2, TERMS, SUMS // 2)
            if NEED_SCALE:
                out_sum += tl.sum(g_out * mixed, axis=1)
            if NEED_Z:
                out = grad_z + row * grad_z_stride
                tl.store(out + column, g_z1.to(out.dtype.element_ty), mask=inside)
                if FORM != "type1":
                    tl.store(out + F + column, g_z2.to(out.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            tl.store(grad_scale + row, tl.sum(out_sum, axis=0).to(grad_scale.dtype.element_ty), mask=row < tokens)
    if NEED_COEFFICIENTS:
        row_sums = grad_coefficients + program * N + FIRST
        if FORM == "quadratic":
            store_sums(row_sums, sums)
        else:
            store_raised(row_sums, sums, TERMS, 0)
            if FORM == "bi-sided":
                store_raised(row_sums + K, sums, TERMS, SUMS // 2)


def forward(inputs: MixtureInputs, mixture: MixtureConfig) -> Tensor:
    """``mixture_forward`` of :class:`megatron_moa.mixture.autograd.Backend`: one launch."""
    z, coefficients, bias, scale = inputs
    *tokens, width = z.shape
    f = width // 2 if mixture.gated else width
    out = z.new_empty(*tokens, f)
    chosen = configuration("forward", mixture.form, f, z.device)
    arguments = (*inputs, out, row_stride(z), row_stride(coefficients))
    constants = _forward_constants(mixture, f, target_of(z.dtype), bias is not None, scale is not None, chosen)
    launch(_mixture_forward_kernel, (out.numel() // f,), arguments, constants, chosen.warps)
    return out


def backward(
    inputs: MixtureInputs, mixture: MixtureConfig, grad: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes ``mixture_backward`` of :class:`megatron_moa.mixture.autograd.Backend`.

    It takes one launch (LA: and one sum over programs), for the quadratic form one for every MOST_SUMS coefficients.
    """
    z, coefficients, bias, scale = inputs
    need_z, need_coefficients, need_scale = needed
    f = grad.shape[-1]
    tokens = grad.numel() // f
    n = mixture.num_coefficients
    per_token = coefficients.dim() > 1
    chosen = configuration("backward", mixture.form, f, z.device)
    rows = 1 if per_token else chosen.rows
    programs = -(-tokens // rows)
    grad_z = None
    if need_z:
        grad_z = z if mixture.overwrite else torch.empty_like(z)
        if mixture.overwrite:  # whoever else has saved z is refused by autograd
            torch.autograd.graph.increment_version(z)
    grad_scale = torch.empty_like(scale) if need_scale else None
    sums = None
    if need_coefficients:
        if per_token:
            sums = torch.empty_like(coefficients)
        else:
            sums = coefficients.new_empty(programs, n, dtype=torch.float32)
    arguments = (
        grad,
        *inputs,
        grad_z,
        sums,
        grad_scale,
        tokens,
        row_stride(grad),
        row_stride(z),
        row_stride(grad_z) if need_z else 0,
        row_stride(coefficients),
    )
    launches = _backward_constants(
        mixture, f, target_of(z.dtype), bias is not None, scale is not None, chosen, tuple(needed), rows
    )
    for constants in launches:
        launch(_mixture_backward_kernel, (programs,), arguments, constants, chosen.warps)
    if need_coefficients and not per_token:
        sums = sums.sum(0).to(coefficients.dtype)
    return grad_z, sums, grad_scale


@functools.cache
def _forward_constants(
    mixture: MixtureConfig, f: int, target: Target, has_bias: bool, has_scale: bool, chosen: Configuration
) -> dict[str, object]:
    """What the forward kernel is compiled for."""
    return {
        "FORM": mixture.form,
        "TERMS": terms_of(mixture.activations, target),
        "SILU": terms_of(("silu",), target),
        "K": mixture.num_activations,
        "N": mixture.num_coefficients,
        "F": f,
        "HAS_BIAS": has_bias,
        "HAS_SCALE": has_scale,
        "NVIDIA": target.nvidia,
        "BLOCK": chosen.block,
    }


@functools.cache
def _backward_constants(
    mixture: MixtureConfig,
    f: int,
    target: Target,
    has_bias: bool,
    has_scale: bool,
    chosen: Configuration,
    needed: tuple[bool, bool, bool],
    rows: int,
) -> list[dict[str, object]]:
    """What the backward kernel is compiled for, at each launch; the last may write over z."""
    need_z, need_coefficients, need_scale = needed
    common = _forward_constants(mixture, f, target, has_bias, has_scale, chosen)
    if mixture.form == "quadratic":  # sums are the coefficients' gradients themselves
        parts = mixture.num_coefficients
        most = MOST_SUMS if need_coefficients else parts
    else:  # of the terms, by which one launch gives all
        most = parts = len(common["TERMS"].matrix[0]) * (2 if mixture.form == "bi-sided" else 1)
    return [
        {
            **common,
            "PAIRS": mixture.pairs,
            "FIRST": first,
            "SUMS": min(most, parts - first),
            "NEED_Z": need_z and first + most >= parts,
            "NEED_COEFFICIENTS": need_coefficients,
            "NEED_SCALE": need_scale and first + most >= parts,
            "ROWS": rows,
            "VECTOR": VECTOR,
        }
        for first in range(0, parts, most)
    ]
