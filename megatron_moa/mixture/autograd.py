"""Defines the autograd functions of all fast backends: what they take and save for backward, who gets a gradient.

Autograd over plain PyTorch saves every activation of the dictionary, K tensors of fc1's size. Here the mixture saves
what came in (fc1's output, which SwiGLU saves too, the coefficients, bias and scale), and a gate saves its input (which
fc1 saves too) and the coefficients it gave; all else is computed again. A backend is a module with the four functions
of :class:`Backend`: megatron_moa.mixture.compile_backend or megatron_moa.mixture.triton_backend.backend.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.grouped_products import group_of_rows, grouped_sum

_Context = torch.autograd.function.FunctionCtx


class MixtureInputs(NamedTuple):
    """What the mixture of ``z + bias`` times ``scale`` is computed from; t tokens, other letters as in docs/mixture.md.

    Attributes:
        z: [t, f] (type1) or [t, 2f], fc1's output, rows at any distance.
        coefficients: [n] or [t, n], float32.
        bias: [f] or [2f], or None.
        scale: [t], or None.
    """

    z: Tensor
    coefficients: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


class GateInputs(NamedTuple):
    """What a gate's coefficients are computed from; with groups, each has a weight, bias and amplitude of its own.

    Attributes:
        x: [t, h], fc1's input.
        weight: u [n, h] or [groups, n, h].
        bias: b [n] or [groups, n], or None.
        amplitude: a [n] or [groups, n], or None for fixed amplitude.
        scale: [1], a constant, or None for 1.
        group_ends: [groups] int32 (megatron_moa.mixture.grouped_products), or None.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    amplitude: Tensor | None = None
    scale: Tensor | None = None
    group_ends: Tensor | None = None


class Backend(Protocol):
    """The arithmetic of a fused backend, for at least one token."""

    @staticmethod
    def mixture_forward(inputs: MixtureInputs, mixing: MixtureConfig) -> Tensor:
        """The mixture: [t, f], z's dtype."""

    @staticmethod
    def mixture_backward(
        inputs: MixtureInputs, mixing: MixtureConfig, grad: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of z, coefficients and scale, where ``needed``, each shaped as its tensor.

        Args:
            mixing: with ``overwrite`` z's gradient is written into z itself.
            grad: that of the result, [t, f], rows at any distance.
        """

    @staticmethod
    def gate_forward(inputs: GateInputs, mixing: MixtureConfig) -> Tensor:
        """The coefficients: [t, n], float32."""

    @staticmethod
    def gate_backward(
        inputs: GateInputs, mixing: MixtureConfig, grad: Tensor, coefficients: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight (where ``needed``), bias and amplitude (where they are), in their tensors' dtypes.

        Args:
            grad: that of the coefficients, [t, n].
            coefficients: what ``gate_forward`` gave.
        """


def mixed_activation(
    backend: Backend, inputs: MixtureInputs, mixing: MixtureConfig, group_ends: Tensor | None
) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.mixed_activation`; inputs with dimensions [...] in place of t."""
    return _Mixture.apply(backend, mixing, group_ends, *inputs)


def gate_coefficients(backend: Backend, inputs: GateInputs, mixing: MixtureConfig) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.gate_coefficients`; inputs with dimensions [...] in place of t."""
    return _Gate.apply(backend, mixing, *inputs)


# Autograd sees tensors among the arguments of ``apply`` alone, so the inputs are passed one by one. Dimensions become
# rows in here, not before: each view outside costs the host a node of autograd's, forward and backward.


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, backend: Backend, mixing: MixtureConfig, group_ends: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        inputs = MixtureInputs(*tensors)
        z = inputs.z
        if z.stride(-1) != 1:
            z = z.contiguous()
            inputs = inputs._replace(z=z)
        ctx.save_for_backward(*inputs, group_ends)
        ctx.settings = backend, mixing
        ctx.overwritten = False
        shape = (*z.shape[:-1], z.shape[-1] // (2 if mixing.gated else 1))
        if z.numel() == 0:
            return z.new_empty(shape)
        return backend.mixture_forward(_by_rows(inputs, group_ends), mixing).view(shape)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, group_ends = ctx.saved_tensors
        inputs = MixtureInputs(*tensors)
        backend, mixing = ctx.settings
        needed = ctx.needs_input_grad[3:]
        need_z, need_coefficients, need_bias, need_scale = needed
        if ctx.overwritten:
            raise RuntimeError(
                "--moa-overwrite-preactivation: a second backward through the same mixture, whose input is gone; "
                "drop the flag"
            )
        z, coefficients, bias, scale = inputs
        if z.numel() == 0:
            zeros = [torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, needed, strict=True)]
            return None, None, None, *zeros
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        ctx.overwritten = mixing.overwrite
        grad_z, grad_coefficients, grad_scale = backend.mixture_backward(
            _by_rows(inputs, group_ends),
            mixing,
            _rows(grad),
            (need_z or need_bias, need_coefficients, need_scale),
        )
        if need_coefficients:
            if group_ends is not None:
                grad_coefficients = grouped_sum(grad_coefficients, group_ends)
            grad_coefficients = grad_coefficients.view(coefficients.shape)
        grad_bias = None
        if need_bias:
            total = torch.promote_types(bias.dtype, torch.float32)
            grad_bias = grad_z.sum(0, dtype=total).to(bias.dtype)
        grad_z = grad_z.view(z.shape) if need_z else None
        grad_scale = grad_scale.view(scale.shape) if need_scale else None
        return None, None, None, grad_z, grad_coefficients, grad_bias, grad_scale


def _by_rows(inputs: MixtureInputs, group_ends: Tensor | None) -> MixtureInputs:
    """Tokens' dimensions as one; spreads coefficients of groups over their rows, here, so that only [groups, n] is
    saved; makes scales dense.
    """
    z, coefficients, bias, scale = inputs
    z = _rows(z)
    if group_ends is not None:
        coefficients = coefficients[group_of_rows(group_ends, z.shape[0])]
    elif coefficients.dim() > 1:
        coefficients = _rows(coefficients)
    return MixtureInputs(z, coefficients.contiguous(), bias, None if scale is None else scale.reshape(-1).contiguous())


def _rows(tensor: Tensor) -> Tensor:
    """[..., n] as [t, n]"""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, backend: Backend, mixing: MixtureConfig, *tensors: Tensor | None) -> Tensor:
        inputs = GateInputs(*tensors)
        x, weight = inputs[:2]
        ctx.settings = backend, mixing
        shape = (*x.shape[:-1], weight.shape[-2])
        if x.numel() == 0:
            coefficients = x.new_empty(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        else:
            coefficients = backend.gate_forward(inputs._replace(x=_rows(x)), mixing).view(shape)
        ctx.save_for_backward(*inputs, coefficients)
        return coefficients

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, coefficients = ctx.saved_tensors
        inputs = GateInputs(*tensors)
        backend, mixing = ctx.settings
        x = inputs.x
        if x.numel() == 0:
            grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in inputs[:4]]
            return None, None, *grads, None, None
        needed = ctx.needs_input_grad[2:4]
        rows = inputs._replace(x=_rows(x))
        grad_x, *others = backend.gate_backward(rows, mixing, _rows(grad), _rows(coefficients), needed)
        return None, None, grad_x.view(x.shape) if needed[0] else None, *others, None, None
