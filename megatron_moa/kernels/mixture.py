"""All forms forward, one program a row; type1, one-sided and bi-sided backward, one or a few rows a program.

Bytes that must move, in activation-sized tensors [t, f]: type1 two forward (z, out) and three backward (z, grad, grad
of z); the gated forms three and five. These kernels move no others: backward computes the activations again from z.

A row's gradients of its coefficients are sums over f. Tiles are [BLOCK / 8, 8], a thread holds whole rows of eight, so
the sum over the eight stays inside it and only one addition per eight numbers reaches an accumulator; what the threads
hold is summed once, at the end of the row (MoA) or of all rows of the program (LA, whose programs each write one row
of partial sums). No atomics: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_moa.config import MixingConfig
from megatron_moa.kernels.configurations import configuration
from megatron_moa.kernels.language import (
    VECTOR,
    add_terms,
    derivatives,
    load_all,
    load_branch,
    store_sums,
    tile_columns,
    values,
    weighted_sum,
    zeros,
)
from megatron_moa.kernels.quadratic import bilinear


@triton.jit
def _forward(
    z,
    coefficients,
    bias,
    scale,
    out,
    z_stride,
    coefficient_stride,
    FORM: tl.constexpr,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    N: tl.constexpr = K * K if FORM == "quadratic" else 2 * K if FORM == "bi-sided" else K
    c = load_all(coefficients + row * coefficient_stride, N)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        x = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS)
        if FORM == "type1":
            mixed = weighted_sum(x, c, VALUES, K, 0)
        else:
            y = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS)
            if FORM == "quadratic":
                mixed = bilinear(x, y, c, VALUES, VALUES, K)
            else:
                if FORM == "bi-sided":
                    y = weighted_sum(y, c, VALUES, K, K)
                mixed = weighted_sum(x, c, VALUES, K, 0) * y
        if HAS_SCALE:
            mixed *= tl.load(scale + row).to(tl.float32)
        tl.store(out + row * F + column, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
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
    VALUES: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_COEFFICIENTS: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    N: tl.constexpr = 2 * K if FORM == "bi-sided" else K
    program = tl.program_id(0).to(tl.int64)
    sums = zeros(N, BLOCK // VECTOR)
    for index in range(ROWS):
        row = program * ROWS + index
        c = load_all(coefficients + row * coefficient_stride, N)
        s = 1.0
        if HAS_SCALE:
            s = tl.load(scale + row, mask=row < tokens, other=0.0).to(tl.float32)
        out_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in range(0, F, BLOCK):
            column = tile_columns(start, BLOCK, VECTOR)
            inside = (column < F) & (row < tokens)
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            x = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS)
            first = weighted_sum(x, c, VALUES, K, 0)
            if FORM != "type1":
                y = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS)
                second = y
                if FORM == "bi-sided":
                    second = weighted_sum(y, c, VALUES, K, K)
            # d out / d first and d out / d second, times the gradient of out
            g_first = g * s
            if FORM != "type1":
                g_second = g_first * first
                g_first *= second
            if NEED_SCALE:
                if FORM != "type1":
                    out_sum += tl.sum(g * first * second, axis=1)
                else:
                    out_sum += tl.sum(g * first, axis=1)
            if NEED_COEFFICIENTS:
                sums = add_terms(sums, g_first, x, VALUES, K, 0, N)
                if FORM == "bi-sided":
                    sums = add_terms(sums, g_second, y, VALUES, K, K, N)
            if NEED_Z:
                out = grad_z + row * grad_z_stride
                g_x = g_first * weighted_sum(x, c, DERIVATIVES, K, 0)
                tl.store(out + column, g_x.to(out.dtype.element_ty), mask=inside)
                if FORM != "type1":
                    g_y = g_second
                    if FORM == "bi-sided":
                        g_y *= weighted_sum(y, c, DERIVATIVES, K, K)
                    tl.store(out + F + column, g_y.to(out.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            tl.store(grad_scale + row, tl.sum(out_sum, axis=0).to(grad_scale.dtype.element_ty), mask=row < tokens)
    if NEED_COEFFICIENTS:
        store_sums(grad_coefficients + program * N, sums, N)


def forward(z: Tensor, coefficients: Tensor, bias: Tensor | None, scale: Tensor | None, mixing: MixingConfig) -> Tensor:
    """``mixture_forward`` of :class:`megatron_moa.fused.Backend`."""
    tokens, f = z.shape[0], z.shape[1] // (2 if mixing.gated else 1)
    out = z.new_empty(tokens, f)
    chosen = configuration("forward", mixing.form, f, z.device)
    _forward[(tokens,)](
        z,
        coefficients,
        bias,
        scale,
        out,
        z.stride(0),
        coefficients.stride(0) if coefficients.dim() > 1 else 0,
        FORM=mixing.form,
        VALUES=values(mixing.activations),
        K=mixing.num_activations,
        F=f,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        BLOCK=chosen.block,
        num_warps=chosen.warps,
    )
    return out


def backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    mixing: MixingConfig,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``mixture_backward`` of :class:`megatron_moa.fused.Backend` for these three forms."""
    need_z, need_coefficients, need_scale = needed
    tokens, f = grad.shape
    per_token = coefficients.dim() > 1
    chosen = configuration("backward", mixing.form, f, z.device)
    rows = 1 if per_token else chosen.rows
    programs = triton.cdiv(tokens, rows)
    grad_z = (z if mixing.overwrite else torch.empty_like(z)) if need_z else None
    grad_scale = torch.empty_like(scale) if need_scale else None
    sums = None
    if need_coefficients:
        sums = torch.empty(programs, mixing.num_coefficients, dtype=torch.float32, device=z.device)
    _backward[(programs,)](
        grad,
        z,
        coefficients,
        bias,
        scale,
        grad_z,
        sums,
        grad_scale,
        tokens,
        grad.stride(0),
        z.stride(0),
        grad_z.stride(0) if need_z else 0,
        coefficients.stride(0) if per_token else 0,
        FORM=mixing.form,
        VALUES=values(mixing.activations),
        DERIVATIVES=derivatives(mixing.activations),
        K=mixing.num_activations,
        F=f,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        NEED_Z=need_z,
        NEED_COEFFICIENTS=need_coefficients,
        NEED_SCALE=need_scale,
        ROWS=rows,
        BLOCK=chosen.block,
        VECTOR=VECTOR,
        num_warps=chosen.warps,
    )
    if need_coefficients and not per_token:
        sums = sums.sum(0)
    return grad_z, sums, grad_scale
