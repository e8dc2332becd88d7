"""The quadratic form's backward: one program a row for the gradient of z, and kernels apart for the coefficients'.

K² sums a row are too many accumulators for one program (49 for seven activations), so the coefficients' gradients have
K programs a row, each with the K sums of one k: z and grad are read K times, mostly from the cache.
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


@triton.jit
def bilinear(x, y, c, FIRST: tl.constexpr, SECOND: tl.constexpr, K: tl.constexpr):
    """sum_kl c_kl FIRST[k](x) SECOND[l](y)"""
    total = FIRST[0](x) * weighted_sum(y, c, SECOND, K, 0)
    for k in tl.static_range(1, K):
        total += FIRST[k](x) * weighted_sum(y, c, SECOND, K, k * K)
    return total


@triton.jit
def _backward_z(
    grad,
    z,
    coefficients,
    bias,
    scale,
    grad_z,
    grad_scale,
    grad_stride,
    z_stride,
    grad_z_stride,
    coefficient_stride,
    VALUES: tl.constexpr,
    DERIVATIVES: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = load_all(coefficients + row * coefficient_stride, K * K)
    s = 1.0
    if HAS_SCALE:
        s = tl.load(scale + row).to(tl.float32)
    out_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, F, BLOCK):
        column = tile_columns(start, BLOCK, VECTOR)
        inside = column < F
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS)
        y = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS)
        if NEED_SCALE:
            out_sum += tl.sum(g * bilinear(x, y, c, VALUES, VALUES, K), axis=1)
        if NEED_Z:
            g *= s
            out = grad_z + row * grad_z_stride
            g_x = g * bilinear(x, y, c, DERIVATIVES, VALUES, K)
            g_y = g * bilinear(x, y, c, VALUES, DERIVATIVES, K)
            tl.store(out + column, g_x.to(out.dtype.element_ty), mask=inside)
            tl.store(out + F + column, g_y.to(out.dtype.element_ty), mask=inside)
    if NEED_SCALE:
        tl.store(grad_scale + row, tl.sum(out_sum, axis=0).to(grad_scale.dtype.element_ty))


@triton.jit
def _backward_coefficients(
    grad,
    z,
    bias,
    scale,
    grad_coefficients,
    tokens,
    grad_stride,
    z_stride,
    VALUES: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    mine = tl.program_id(1)  # k
    sums = zeros(K, BLOCK // VECTOR)
    for index in range(ROWS):
        row = program * ROWS + index
        for start in range(0, F, BLOCK):
            column = tile_columns(start, BLOCK, VECTOR)
            inside = (column < F) & (row < tokens)
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_SCALE:
                g *= tl.load(scale + row, mask=row < tokens, other=0.0).to(tl.float32)
            x = load_branch(z, bias, row * z_stride, column, inside, HAS_BIAS)
            y = load_branch(z, bias, row * z_stride, F + column, inside, HAS_BIAS)
            value = VALUES[0](x)
            for k in tl.static_range(1, K):
                value = tl.where(mine == k, VALUES[k](x), value)
            sums = add_terms(sums, g * value, y, VALUES, K, 0, K)
    store_sums(grad_coefficients + (program * K + mine) * K, sums, K)


def backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    mixing: MixingConfig,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``mixture_backward`` of :class:`megatron_moa.fused.Backend` for this form."""
    need_z, need_coefficients, need_scale = needed
    tokens, f = grad.shape
    per_token = coefficients.dim() > 1
    chosen = configuration("backward", mixing.form, f, z.device)
    shared = {
        "VALUES": values(mixing.activations),
        "K": mixing.num_activations,
        "F": f,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "BLOCK": chosen.block,
        "VECTOR": VECTOR,
        "num_warps": chosen.warps,
    }
    sums = grad_z = grad_scale = None
    if need_coefficients:  # first: the other may write over z
        rows = 1 if per_token else chosen.rows
        programs = triton.cdiv(tokens, rows)
        sums = torch.empty(programs, mixing.num_coefficients, dtype=torch.float32, device=z.device)
        _backward_coefficients[(programs, mixing.num_activations)](
            grad, z, bias, scale, sums, tokens, grad.stride(0), z.stride(0), ROWS=rows, **shared
        )
        if not per_token:
            sums = sums.sum(0)
    if need_z or need_scale:
        grad_z = (z if mixing.overwrite else torch.empty_like(z)) if need_z else None
        grad_scale = torch.empty_like(scale) if need_scale else None
        _backward_z[(tokens,)](
            grad,
            z,
            coefficients,
            bias,
            scale,
            grad_z,
            grad_scale,
            grad.stride(0),
            z.stride(0),
            grad_z.stride(0) if need_z else 0,
            coefficients.stride(0) if per_token else 0,
            DERIVATIVES=derivatives(mixing.activations),
            NEED_Z=need_z,
            NEED_SCALE=need_scale,
            **shared,
        )
    return grad_z, sums, grad_scale
