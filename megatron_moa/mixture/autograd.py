"""Defines the autograd functions of all fast backends: what is saved for backward, who gets a gradient.

Autograd over plain PyTorch saves every activation of the dictionary, K tensors of fc1's size. Here the mixture saves
what came in (fc1's output, which SwiGLU saves too, the coefficients, bias and scale), and a gate saves its input (which
fc1 saves too) and the coefficients it gave; all else is computed again. A backend is a module with the four functions
of :class:`Backend`: megatron_moa.mixture.compile_backend or megatron_moa.mixture.triton_backend.backend.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.grouped_products import group_of_rows, grouped_sum

_Context = torch.autograd.function.FunctionCtx


class Backend(Protocol):
    """The arithmetic of a fused backend; t tokens, at least one; other letters as in docs/mixture.md."""

    @staticmethod
    def mixture_forward(
        z: Tensor, coefficients: Tensor, bias: Tensor | None, scale: Tensor | None, mixing: MixtureConfig
    ) -> Tensor:
        """The mixture of ``z + bias`` times ``scale``: [t, f], z's dtype.

        Args:
            z: [t, f] (type1) or [t, 2f], fc1's output, rows at any distance.
            coefficients: [n] or [t, n], float32.
            bias: [f] or [2f].
            scale: [t].
        """

    @staticmethod
    def mixture_backward(
        grad: Tensor,
        z: Tensor,
        coefficients: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        mixing: MixtureConfig,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of z, coefficients and scale, where ``needed``, each shaped as its tensor.

        Args:
            grad: that of the result, [t, f], rows at any distance.
            mixing: with ``overwrite`` z's gradient is written into z itself.
        """

    @staticmethod
    def gate_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        amplitude: Tensor | None,
        scale: Tensor | None,
        group_ends: Tensor | None,
        mixing: MixtureConfig,
    ) -> Tensor:
        """The coefficients [t, n] of x [t, h], float32; arguments as in functional.gate_coefficients."""

    @staticmethod
    def gate_backward(
        grad: Tensor,
        coefficients: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        amplitude: Tensor | None,
        scale: Tensor | None,
        group_ends: Tensor | None,
        mixing: MixtureConfig,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight (where ``needed``), bias and amplitude (where they are), in their tensors' dtypes."""


def mixed_activation(
    backend: Backend,
    preactivation: Tensor,
    coefficients: Tensor,
    mixing: MixtureConfig,
    bias: Tensor | None,
    per_token_scale: Tensor | None,
    group_ends: Tensor | None,
) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.mixed_activation`."""
    per_token = coefficients.dim() > 1 and group_ends is None
    mixed = _Mixture.apply(
        preactivation.flatten(0, -2),
        coefficients.flatten(0, -2) if per_token else coefficients,
        bias,
        None if per_token_scale is None else per_token_scale.flatten(),
        group_ends,
        mixing,
        backend,
    )
    return mixed.unflatten(0, preactivation.shape[:-1])


def gate_coefficients(
    backend: Backend,
    x: Tensor,
    weight: Tensor,
    mixing: MixtureConfig,
    bias: Tensor | None,
    amplitude: Tensor | None,
    scale: Tensor | None,
    group_ends: Tensor | None,
) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.gate_coefficients`."""
    coefficients = _Gate.apply(x.flatten(0, -2), weight, bias, amplitude, scale, group_ends, mixing, backend)
    return coefficients.unflatten(0, x.shape[:-1])


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        z: Tensor,
        coefficients: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        group_ends: Tensor | None,
        mixing: MixtureConfig,
        backend: Backend,
    ) -> Tensor:
        if z.stride(-1) != 1:
            z = z.contiguous()
        ctx.save_for_backward(z, coefficients, bias, scale, group_ends)
        ctx.settings = mixing, backend
        ctx.overwritten = False
        if z.shape[0] == 0:
            return z.new_empty(0, z.shape[1] // (2 if mixing.gated else 1))
        return backend.mixture_forward(z, _rows(coefficients, group_ends, z), bias, _contiguous(scale), mixing)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, coefficients, bias, scale, group_ends = ctx.saved_tensors
        mixing, backend = ctx.settings
        need_z, need_coefficients, need_bias, need_scale = ctx.needs_input_grad[:4]
        if ctx.overwritten:
            raise RuntimeError(
                "--moa-overwrite-preactivation: a second backward through the same mixture, whose input is gone; "
                "drop the flag"
            )
        if z.shape[0] == 0:
            zeros = [
                torch.zeros_like(tensor) if need else None
                for tensor, need in zip((z, coefficients, bias, scale), ctx.needs_input_grad, strict=False)
            ]
            return *zeros, None, None, None
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        ctx.overwritten = mixing.overwrite
        grad_z, grad_coefficients, grad_scale = backend.mixture_backward(
            grad,
            z,
            _rows(coefficients, group_ends, z),
            bias,
            _contiguous(scale),
            mixing,
            (need_z or need_bias, need_coefficients, need_scale),
        )
        if need_coefficients and group_ends is not None:
            grad_coefficients = grouped_sum(grad_coefficients, group_ends)
        grad_bias = None
        if need_bias:
            total = torch.promote_types(bias.dtype, torch.float32)
            grad_bias = grad_z.sum(0, dtype=total).to(bias.dtype)
        return grad_z if need_z else None, grad_coefficients, grad_bias, grad_scale, None, None, None


def _rows(coefficients: Tensor, group_ends: Tensor | None, z: Tensor) -> Tensor:
    """[n] or [t, n]; those of groups [groups, n] are spread over their rows here, so that only [groups, n] is saved."""
    if group_ends is not None:
        return coefficients[group_of_rows(group_ends, z.shape[0])]
    return coefficients.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        amplitude: Tensor | None,
        scale: Tensor | None,
        group_ends: Tensor | None,
        mixing: MixtureConfig,
        backend: Backend,
    ) -> Tensor:
        ctx.settings = mixing, backend
        if x.shape[0] == 0:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            coefficients = x.new_empty(0, weight.shape[-2], dtype=dtype)
        else:
            coefficients = backend.gate_forward(x, weight, bias, amplitude, scale, group_ends, mixing)
        ctx.save_for_backward(x, weight, bias, amplitude, scale, group_ends, coefficients)
        return coefficients

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, amplitude, scale, group_ends, coefficients = ctx.saved_tensors
        mixing, backend = ctx.settings
        needed = tuple(ctx.needs_input_grad[:2])
        if x.shape[0] == 0:
            zeros = [None if tensor is None else torch.zeros_like(tensor) for tensor in (x, weight, bias, amplitude)]
            return *zeros, None, None, None, None
        grads = backend.gate_backward(grad, coefficients, x, weight, bias, amplitude, scale, group_ends, mixing, needed)
        return *grads, None, None, None, None
