"""Defines the autograd functions that all fast backends share.

Each says what it takes and saves for backward, and who gets a gradient.

Autograd over plain PyTorch saves every activation of the dictionary, K tensors of fc1's size. Here the mixture saves
what came in (fc1's output, which SwiGLU saves too, the coefficients, bias and scale), and a gate saves its input (which
fc1 saves too) and the coefficients it gave; all else is computed again. A backend is a module with the four functions
of :class:`Backend`: megatron_moa.mixture.compile_backend or megatron_moa.mixture.triton_backend.backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from megatron_moa.mixture.config import MixtureConfig, SettingError
from megatron_moa.mixture.grouped_products import group_of_rows, grouped_sum

_Context = torch.autograd.function.FunctionCtx


class MixtureInputs(NamedTuple):
    """Holds the inputs of ``mix(z + bias) * per_token_scale``.

    Sizes f, h and n are as in docs/mixture.md, z is not: here it is all of fc1's output, there W2's half alone.
    Backends get contiguous tensors of any leading dimensions [...]; only a z of two dimensions may have gaps between
    its rows.

    Attributes:
        z: fc1's output: y [..., f] for type1, else y and z of docs/mixture.md side by side, [..., 2f].
        coefficients: [n] or [..., n], float32; [groups, n] until :func:`_for_backend` gives each row its own.
        bias: [f] or [2f], or None.
        per_token_scale: [...], or None.
    """

    z: Tensor
    coefficients: Tensor
    bias: Tensor | None = None
    per_token_scale: Tensor | None = None


class GateInputs(NamedTuple):
    """Holds the tensors that a gate's coefficients are computed from.

    With groups, each group has a weight, bias and amplitude of its own.

    Attributes:
        x: [..., h], fc1's input, contiguous as z above.
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
    def mixture_forward(inputs: MixtureInputs, mixture: MixtureConfig) -> Tensor:
        """The mixture: [..., f], z's dtype."""

    @staticmethod
    def mixture_backward(
        inputs: MixtureInputs, mixture: MixtureConfig, grad: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of z, coefficients and per_token_scale, where ``needed``, each shaped as its tensor.

        Args:
            mixture: with ``overwrite`` z's gradient is written into z itself.
            grad: that of the result, [..., f], contiguous as z.
        """

    @staticmethod
    def gate_forward(inputs: GateInputs, mixture: MixtureConfig) -> Tensor:
        """The coefficients: [..., n], float32."""

    @staticmethod
    def gate_backward(
        inputs: GateInputs, mixture: MixtureConfig, grad: Tensor, coefficients: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of x, weight, bias and amplitude, in their tensors' dtypes.

        x and weight have one where ``needed``, bias and amplitude where they are not None.

        Args:
            grad: that of the coefficients, [..., n], contiguous.
            coefficients: what ``gate_forward`` gave.
        """


def mixed_activation(
    backend: Backend, inputs: MixtureInputs, mixture: MixtureConfig, group_ends: Tensor | None
) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.mixed_activation`; tokens lie in any dimensions [...]."""
    return _Mixture.apply(backend, mixture, group_ends, *inputs)


def gate_coefficients(backend: Backend, inputs: GateInputs, mixture: MixtureConfig) -> Tensor:
    """See :func:`megatron_moa.mixture.functional.gate_coefficients`; tokens lie in any dimensions [...]."""
    return _Gate.apply(backend, mixture, *inputs)


def gated_mixture(
    backend: Backend,
    gate: GateInputs,
    z: Tensor,
    mixture: MixtureConfig,
    bias: Tensor | None,
    per_token_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`megatron_moa.mixture.functional.gated_mixture`."""
    return _GatedMixture.apply(backend, mixture, z, bias, per_token_scale, *gate)


# Autograd sees tensors among the arguments of ``apply`` alone, so the inputs are passed one by one. No tensor changes
# its dimensions on the way: each view costs the host, and outside of here a node of autograd's, too.


def unserved(mixture: MixtureConfig) -> SettingError:
    """The error for what needs plain PyTorch and was asked of a fused backend."""
    return SettingError(
        f"--moa-backend {mixture.backend}: the fused functions that it takes here serve no torch.func, no "
        "torch.jit.trace, no forward-mode and no second derivatives; take --moa-backend eager"
    )


def _once_differentiable(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """PyTorch's decorator of this name, but it refuses every second derivative, and names a remedy.

    ``backward`` runs without autograd, so a second derivative would lack terms. PyTorch's decorator refuses only where
    the incoming gradient wants a gradient; where that is a constant, a wrong second derivative would pass.
    """

    @functools.wraps(backward)
    def wrapped(ctx: _Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), _autocast_off(grads):
            first = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is with create_graph=True
            return first
        error = unserved(ctx.settings[1])
        refuse = torch._C._functions.DelayedError("; ".join((str(error), *error.__notes__)).encode(), len(first))
        return refuse(*(None if tensor is None else tensor.detach().requires_grad_() for tensor in first))

    return wrapped


def _autocast_off(grads: Sequence[Tensor | None]) -> AbstractContextManager[object]:
    """For a backward called under autocast, which would round the products of the gates' gradients."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    device = next((grad.device.type for grad in grads if grad is not None), "meta")
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)  # which meta has not


class _Fused(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: _Context, *_: Tensor | None) -> NoReturn:
        raise unserved(ctx.settings[1])


class _Mixture(_Fused):
    @staticmethod
    def forward(
        ctx: _Context, backend: Backend, mixture: MixtureConfig, group_ends: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        inputs = MixtureInputs(*tensors)
        inputs = inputs._replace(z=_with_rows(inputs.z))
        ctx.save_for_backward(*inputs, group_ends)
        ctx.settings = backend, mixture
        return _mix(backend, inputs, mixture, group_ends)

    @staticmethod
    @_once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, mixture = ctx.settings
        _refuse_what_is_overwritten(ctx, mixture, ctx.needs_input_grad[3])
        *tensors, group_ends = ctx.saved_tensors
        grads = _mix_backward(backend, MixtureInputs(*tensors), mixture, group_ends, grad, ctx.needs_input_grad[3:])
        return None, None, None, *grads


class _Gate(_Fused):
    @staticmethod
    def forward(ctx: _Context, backend: Backend, mixture: MixtureConfig, *tensors: Tensor | None) -> Tensor:
        inputs = GateInputs(*tensors)
        inputs = inputs._replace(x=_with_rows(inputs.x))
        coefficients = _coefficients(backend, inputs, mixture)
        ctx.save_for_backward(*inputs, coefficients)
        ctx.settings = backend, mixture
        return coefficients

    @staticmethod
    @_once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, coefficients = ctx.saved_tensors
        backend, mixture = ctx.settings
        needed = ctx.needs_input_grad[2:4]
        grads = _coefficients_backward(backend, GateInputs(*tensors), mixture, grad, coefficients, needed)
        return None, None, *grads, None, None


class _GatedMixture(_Fused):
    """Both in one, which spares the host a node of autograd's; saves what both save."""

    @staticmethod
    def forward(
        ctx: _Context,
        backend: Backend,
        mixture: MixtureConfig,
        z: Tensor,
        bias: Tensor | None,
        per_token_scale: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, *others = tensors
        gate = GateInputs(_with_rows(x), *others)
        coefficients = _coefficients(backend, gate, mixture)
        inputs = MixtureInputs(_with_rows(z), coefficients, bias, per_token_scale)
        ctx.save_for_backward(*gate, *inputs)
        ctx.settings = backend, mixture
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        return _mix(backend, inputs, mixture, None), coefficients

    @staticmethod
    @_once_differentiable
    def backward(ctx: _Context, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        backend, mixture = ctx.settings
        _refuse_what_is_overwritten(ctx, mixture, ctx.needs_input_grad[2])
        tensors = ctx.saved_tensors
        gate, inputs = GateInputs(*tensors[:6]), MixtureInputs(*tensors[6:])
        # fc1's output is let go before the gate's gradients are made, as it is where the two are nodes of their own;
        # not if the graph is kept.
        ctx.maybe_clear_saved_tensors()
        _, _, need_z, need_bias, need_scale, *need_gate, _, _ = ctx.needs_input_grad
        needed = need_z, any(need_gate), need_bias, need_scale
        grad_z, grad_coefficients, grad_bias, grad_scale = _mix_backward(backend, inputs, mixture, None, grad, needed)
        coefficients = inputs.coefficients
        del tensors, inputs, grad
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if grad_coefficients is not None:
            grads = _coefficients_backward(backend, gate, mixture, grad_coefficients, coefficients, need_gate[:2])
        return None, None, grad_z, grad_bias, grad_scale, *grads, None, None


def _refuse_what_is_overwritten(ctx: _Context, mixture: MixtureConfig, need_z: bool) -> None:
    if getattr(ctx, "overwritten", False):
        raise RuntimeError(
            "--moa-overwrite-preactivation: a second backward through the same mixture, whose input is gone; "
            "drop the flag"
        )
    ctx.overwritten = mixture.overwrite and need_z


def _with_rows(tensor: Tensor) -> Tensor:
    """The same in dense rows that do not overlap, beyond two dimensions without gaps between them."""
    if tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.size(1)):
        return tensor
    return tensor.contiguous()


def _mix(backend: Backend, inputs: MixtureInputs, mixture: MixtureConfig, group_ends: Tensor | None) -> Tensor:
    """The mixture [..., f]."""
    z = inputs.z
    if z.numel() == 0:
        return z.new_empty(*z.shape[:-1], z.shape[-1] // (2 if mixture.gated else 1))
    return backend.mixture_forward(_for_backend(inputs, group_ends), mixture)


def _mix_backward(
    backend: Backend,
    inputs: MixtureInputs,
    mixture: MixtureConfig,
    group_ends: Tensor | None,
    grad: Tensor,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the inputs, where ``needed``, from that of the result."""
    need_z, need_coefficients, need_bias, need_scale = needed
    if mixture.overwrite and not need_z:  # where a bias alone is trained
        mixture = dataclasses.replace(mixture, overwrite=False)
    if inputs.z.numel() == 0:
        return tuple(torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, needed, strict=True))
    grad_z, grad_coefficients, grad_scale = backend.mixture_backward(
        _for_backend(inputs, group_ends),
        mixture,
        _with_rows(grad),
        (need_z or need_bias, need_coefficients, need_scale),
    )
    if need_coefficients and group_ends is not None:
        grad_coefficients = grouped_sum(grad_coefficients, group_ends)
    # Backends give no gradient of the bias: it is z's, summed over tokens.
    grad_bias = None
    if need_bias:
        bias = inputs.bias
        total = torch.promote_types(bias.dtype, torch.float32)
        grad_bias = grad_z.reshape(-1, bias.shape[0]).sum(0, dtype=total).to(bias.dtype)
    return grad_z if need_z else None, grad_coefficients, grad_bias, grad_scale


def _for_backend(inputs: MixtureInputs, group_ends: Tensor | None) -> MixtureInputs:
    """Spreads coefficients of groups over their rows, here, so that only [groups, n] is saved; fills gaps."""
    z, coefficients, *others = inputs
    if group_ends is not None:
        coefficients = coefficients[group_of_rows(group_ends, z.shape[0])]
    return MixtureInputs(z, coefficients.contiguous(), *map(_without_gaps, others))


def _without_gaps(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _coefficients(backend: Backend, inputs: GateInputs, mixture: MixtureConfig) -> Tensor:
    """The coefficients [..., n]."""
    x, weight = inputs[:2]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.shape[-2], dtype=torch.promote_types(weight.dtype, torch.float32))
    return backend.gate_forward(inputs, mixture)


def _coefficients_backward(
    backend: Backend,
    inputs: GateInputs,
    mixture: MixtureConfig,
    grad: Tensor,
    coefficients: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight (where ``needed``), bias and amplitude, from that of the coefficients."""
    if inputs.x.numel() == 0:
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in inputs[:4])
    return backend.gate_backward(inputs, mixture, grad.contiguous(), coefficients, tuple(needed))
