"""The forms type1, one-sided and bi-sided: one program a row going forward, one or a few rows a program going back.

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

from megatron_moa.kernels.configurations import configuration
from megatron_moa.kernels.language import derivatives, load_all, values, weighted_sum

# Numbers a thread holds next to each other: 16 bytes of bf16, the widest load there is.
_VECTOR = 8


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
    c = load_all(coefficients + row * coefficient_stride, 2 * K if FORM == "bi-sided" else K)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < F
        x = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        mixed = weighted_sum(x, c, VALUES, K, 0)
        if FORM != "type1":
            y = tl.load(z + row * z_stride + F + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                y += tl.load(bias + F + column, mask=inside, other=0.0).to(tl.float32)
            if FORM == "bi-sided":
                y = weighted_sum(y, c, VALUES, K, K)
            mixed *= y
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
    sums = _zeros(N, BLOCK // VECTOR)
    for index in range(ROWS):
        row = program * ROWS + index
        c = load_all(coefficients + row * coefficient_stride, N)
        s = 1.0
        if HAS_SCALE:
            s = tl.load(scale + row, mask=row < tokens, other=0.0).to(tl.float32)
        out_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in range(0, F, BLOCK):
            column = start + tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
            inside = (column < F) & (row < tokens)
            g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias + column, mask=column < F, other=0.0).to(tl.float32)
            first = weighted_sum(x, c, VALUES, K, 0)
            slope = weighted_sum(x, c, DERIVATIVES, K, 0)
            if FORM == "type1":
                if NEED_SCALE:
                    out_sum += tl.sum(g * first, axis=1)
                g *= s
                sums = _add_terms(sums, g, x, VALUES, K, 0, N)
                g_x = g * slope
            else:
                y = tl.load(z + row * z_stride + F + column, mask=inside, other=0.0).to(tl.float32)
                if HAS_BIAS:
                    y += tl.load(bias + F + column, mask=column < F, other=0.0).to(tl.float32)
                second = y
                if FORM == "bi-sided":
                    second = weighted_sum(y, c, VALUES, K, K)
                if NEED_SCALE:
                    out_sum += tl.sum(g * first * second, axis=1)
                g *= s
                if NEED_COEFFICIENTS:
                    sums = _add_terms(sums, g * second, x, VALUES, K, 0, N)
                g_x = g * second * slope
                g_y = g * first
                if FORM == "bi-sided":
                    if NEED_COEFFICIENTS:
                        sums = _add_terms(sums, g_y, y, VALUES, K, K, N)
                    g_y *= weighted_sum(y, c, DERIVATIVES, K, K)
                if NEED_Z:
                    tl.store(grad_z + row * grad_z_stride + F + column, g_y.to(grad_z.dtype.element_ty), mask=inside)
            if NEED_Z:
                tl.store(grad_z + row * grad_z_stride + column, g_x.to(grad_z.dtype.element_ty), mask=inside)
        if NEED_SCALE:
            tl.store(grad_scale + row, tl.sum(out_sum, axis=0).to(grad_scale.dtype.element_ty), mask=row < tokens)
    if NEED_COEFFICIENTS:
        for k in tl.static_range(N):
            tl.store(grad_coefficients + program * N + k, tl.sum(sums[k], axis=0))


@triton.jit
def _zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([SIZE], tl.float32),)
    return zeros


@triton.jit
def _add_terms(sums, factor, x, VALUES: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr):
    """``sums`` with factor sigma_k(x), summed over each thread's numbers, added to the K accumulators from FIRST on."""
    added = ()
    for index in tl.static_range(N):
        if index >= FIRST and index < FIRST + K:
            added = added + (sums[index] + tl.sum(factor * VALUES[index - FIRST](x), axis=1),)
        else:
            added = added + (sums[index],)
    return added


def forward(
    z: Tensor, coefficients: Tensor, bias: Tensor | None, scale: Tensor | None, form: str, activations: tuple[str, ...]
) -> Tensor:
    """The mixture of z [t, f] or [t, 2f] with coefficients [n] or [t, n], bias [f] or [2f] and scale [t]: [t, f].

    Rows of z may lie at any distance; all else is contiguous.
    """
    tokens, f = z.shape[0], z.shape[1] // (1 if form == "type1" else 2)
    out = z.new_empty(tokens, f)
    if out.numel() == 0:
        return out
    chosen = configuration("forward", form, f, z.device)
    _forward[(tokens,)](
        z,
        coefficients,
        bias,
        scale,
        out,
        z.stride(0),
        coefficients.stride(0) if coefficients.dim() > 1 else 0,
        FORM=form,
        VALUES=values(activations),
        K=len(activations),
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
    grad_z: Tensor | None,
    need_coefficients: bool,
    need_scale: bool,
    form: str,
    activations: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradient of z into ``grad_z`` (which may be z itself) and gives those of coefficients and scale.

    Args:
        grad: [t, f], rows at any distance, as those of z and grad_z.
        grad_z: as z; None where none is needed.

    Returns:
        Those asked for: of the coefficients, float32 and shaped as they are; of the scale, [t].
    """
    tokens, f = grad.shape
    n = coefficients.shape[-1]
    grad_scale = torch.empty_like(scale) if need_scale else None
    if grad.numel() == 0:
        zero = torch.zeros_like(coefficients) if need_coefficients else None
        return zero, grad_scale.zero_() if need_scale else None
    per_token = coefficients.dim() > 1
    chosen = configuration("backward", form, f, z.device)
    rows = 1 if per_token else chosen.rows
    programs = triton.cdiv(tokens, rows)
    sums = torch.empty(programs, n, dtype=torch.float32, device=z.device) if need_coefficients else None
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
        0 if grad_z is None else grad_z.stride(0),
        coefficients.stride(0) if per_token else 0,
        FORM=form,
        VALUES=values(activations),
        DERIVATIVES=derivatives(activations),
        K=len(activations),
        F=f,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        NEED_Z=grad_z is not None,
        NEED_COEFFICIENTS=need_coefficients,
        NEED_SCALE=need_scale,
        ROWS=rows,
        BLOCK=chosen.block,
        VECTOR=_VECTOR,
        num_warps=chosen.warps,
    )
    if need_coefficients and not per_token:
        sums = sums.sum(0)
    return sums, grad_scale
