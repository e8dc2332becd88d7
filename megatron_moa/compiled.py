"""The ``compile`` backend: forward and backward of the mixture, each fused into one function by torch.compile.

Autograd would save every activation of the dictionary, K tensors of fc1's size. Here only what came in is saved
(fc1's output, the coefficients, bias and scale); backward computes the activations again, inside the fused function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa import reference
from megatron_moa.activations import ACTIVATIONS
from megatron_moa.config import MixingConfig
from megatron_moa.grouped import (
    group_of_rows,
    grouped_linear,
    grouped_linear_input_gradient,
    grouped_linear_weight_gradient,
    grouped_sum,
)


def mixed_activation(
    preactivation: Tensor,
    coefficients: Tensor,
    mixing: MixingConfig,
    bias: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """See :func:`megatron_moa.functional.mixed_activation`."""
    tokens = preactivation.shape[:-1]
    if group_ends is not None:
        coefficients = coefficients[group_of_rows(group_ends, len(preactivation))]
    if tokens.numel() <= 1:
        # A compiled function specialises to sizes 0 and 1: not worth compiling for what costs nothing.
        return reference.mixed_activation(preactivation, coefficients, mixing, bias, per_token_scale)
    mixed = _Mixture.apply(
        preactivation.flatten(0, -2),
        coefficients.flatten(0, -2) if coefficients.dim() > 1 else coefficients,
        None if per_token_scale is None else per_token_scale.flatten(),
        bias,
        mixing.form,
        mixing.activations,
    )
    return mixed.unflatten(0, tokens)


def gate_coefficients(
    x: Tensor,
    weight: Tensor,
    mixing: MixingConfig,
    bias: Tensor | None = None,
    amplitude: Tensor | None = None,
    scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """See :func:`megatron_moa.functional.gate_coefficients`."""
    coefficients = _Gate.apply(x.flatten(0, -2), weight, bias, amplitude, scale, group_ends, mixing)
    return coefficients.unflatten(0, x.shape[:-1])


class _Gate(torch.autograd.Function):
    """Saves its input as it came (no float32 copy), the parameters and the coefficients: fc1 keeps the first too, the
    mixture the last, so a gate adds nothing to what a layer saves for backward.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,  # [t, h]
        weight: Tensor,  # [n, h] or [groups, n, h]
        bias: Tensor | None,  # [n] or [groups, n]
        amplitude: Tensor | None,  # likewise
        scale: Tensor | None,  # [1]
        group_ends: Tensor | None,  # [groups]
        mixing: MixingConfig,
    ) -> Tensor:
        logits = _logits(x, weight, bias, group_ends)
        amplitude_rows = _per_row(amplitude, group_ends, logits)
        coefficients = reference.gate(logits, mixing, amplitude_rows)
        if scale is not None:
            coefficients = coefficients * scale
        ctx.save_for_backward(x, weight, bias, amplitude, scale, group_ends, coefficients)
        ctx.mixing = mixing
        return coefficients

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, amplitude, scale, group_ends, coefficients = ctx.saved_tensors
        mixing: MixingConfig = ctx.mixing
        grad_amplitude = grad_bias = grad_x = grad_weight = None
        if scale is not None:
            grad, coefficients = grad * scale, coefficients / scale
        psi = coefficients
        if amplitude is not None:
            # Coefficients cannot be divided by an amplitude of 0, so psi is computed again.
            rows = _per_row(amplitude, group_ends, grad)
            one = torch.ones_like(rows)
            psi_hat = reference.gate(_logits(x, weight, bias, group_ends), mixing, one)
            grad_amplitude = _summed(grad * psi_hat, group_ends, amplitude)
            slope, offset = mixing.psi_hat
            grad, psi = grad * rows * slope, (psi_hat - offset) / slope
        grad = _gate_derivative(grad, psi, mixing)
        if bias is not None:
            grad_bias = _summed(grad, group_ends, bias)
        need_x, need_weight = ctx.needs_input_grad[:2]
        wide = weight.to(grad.dtype)
        if need_x:
            grad_x = grad @ wide if group_ends is None else grouped_linear_input_gradient(grad, wide, group_ends)
        if need_weight:
            rows = x.to(grad.dtype)
            if group_ends is None:
                grad_weight = grad.t() @ rows
            else:
                grad_weight = grouped_linear_weight_gradient(grad, rows, group_ends)
        grad_x, grad_weight = _to(grad_x, x), _to(grad_weight, weight)
        return grad_x, grad_weight, grad_bias, grad_amplitude, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, group_ends: Tensor | None) -> Tensor:
    """[t, n], at least float32"""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    x = x.to(weight.dtype)
    logits = F.linear(x, weight) if group_ends is None else grouped_linear(x, weight, group_ends)
    bias = _per_row(bias, group_ends, logits)
    return logits if bias is None else logits + bias


def _per_row(parameter: Tensor | None, group_ends: Tensor | None, rows: Tensor) -> Tensor | None:
    """A parameter [n] as it is, one of groups [groups, n] as [t, n]; in the dtype of ``rows``."""
    if parameter is None:
        return None
    parameter = parameter.to(rows.dtype)
    return parameter if group_ends is None else parameter[group_of_rows(group_ends, len(rows))]


def _summed(rows: Tensor, group_ends: Tensor | None, parameter: Tensor) -> Tensor:
    """[t, n] summed over the rows that share a parameter, [n] or [groups, n]; in the same order at every call."""
    total = rows.sum(0) if group_ends is None else grouped_sum(rows, group_ends)
    return total.to(parameter.dtype)


def _gate_derivative(grad: Tensor, psi: Tensor, mixing: MixingConfig) -> Tensor:
    """The logits' gradient, from that of psi and from psi itself, [t, n]."""
    if mixing.gate == "sigmoid":
        return grad * psi * (1 - psi)
    if mixing.gate == "tanh":
        return grad * (1 - psi * psi)
    grad, psi = (tensor.unflatten(-1, (-1, mixing.softmax_size)) for tensor in (grad, psi))
    return (psi * (grad - (grad * psi).sum(-1, keepdim=True))).flatten(-2)


def _to(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(like.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        z: Tensor,  # [t, f] or [t, 2f]
        coefficients: Tensor,  # [t, n] or [n]
        scale: Tensor | None,  # [t]
        bias: Tensor | None,  # [f] or [2f]
        form: str,
        activations: tuple[str, ...],
    ) -> Tensor:
        ctx.save_for_backward(z, coefficients, scale, bias)
        ctx.mixture = (form, activations)
        return _compiled_forward(form, activations)(*_uniform(z, coefficients, scale, bias))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(ctx.needs_input_grad[:4])
        torch._dynamo.maybe_mark_dynamic(grad, 0)
        grads = _compiled_backward(*ctx.mixture, needed)(grad, *_uniform(*ctx.saved_tensors))
        return (*grads, None, None)


def _uniform(
    z: Tensor, coefficients: Tensor, scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The inputs such that calls do not differ in what the compiler specialises to, so that it compiles once.

    The number of tokens changes from call to call in a MoE, whether a gradient is asked for in evaluation, and an
    expert's scales are a view into all experts' with an offset of its own.
    """
    z, coefficients = z.detach(), coefficients.detach()
    bias = None if bias is None else bias.detach()
    scale = None if scale is None else scale.detach().clone()  # [t], small
    for tensor in (z, scale, coefficients if coefficients.dim() > 1 else None):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return z, coefficients, scale, bias


@functools.cache
def _compiled_forward(form: str, activations: tuple[str, ...]) -> Callable[..., Tensor]:
    def forward(z: Tensor, coefficients: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        mixture = _evaluate(form, activations, z, coefficients, bias)
        out = mixture.out if scale is None else mixture.out * scale.to(mixture.out.dtype)[:, None]
        return out.to(z.dtype)

    return _compile(forward, "mixture_forward", form)


@functools.cache
def _compiled_backward(
    form: str, activations: tuple[str, ...], needed: tuple[bool, bool, bool, bool]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """``needed`` says for which of (z, coefficients, scale, bias) a gradient is asked."""
    need_z, need_coefficients, need_scale, need_bias = needed

    def backward(
        grad: Tensor, z: Tensor, coefficients: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mixture = _evaluate(form, activations, z, coefficients, bias)
        grad = grad.to(mixture.out.dtype)
        grad_scale = (grad * mixture.out).sum(-1).to(scale.dtype) if need_scale else None
        if scale is not None:
            grad = grad * scale.to(grad.dtype)[:, None]
        grad_z = grad_bias = grad_coefficients = None
        if need_z or need_bias:
            exact = torch.cat([grad * partial for partial in mixture.partials()], dim=-1)
            grad_z = exact.to(z.dtype)
            grad_bias = exact.sum(0).to(bias.dtype) if need_bias else None
        if need_coefficients:
            # One row per token, no atomics; LA's then summed over tokens in a second step.
            rows = torch.stack([(grad * term).sum(-1) for term in mixture.terms()], dim=-1)  # [t, n]
            grad_coefficients = (rows if coefficients.dim() > 1 else rows.sum(0)).to(coefficients.dtype)
        return grad_z, grad_coefficients, grad_scale, grad_bias

    return _compile(backward, "mixture_backward", form)


@dataclass
class _Evaluated:
    """The mixture at one point: its value, and on demand its partial derivatives.

    Attributes:
        out: [t, f]
        partials: d out / d z, one [t, f] for each of fc1's halves.
        terms: d out / d c_i, n tensors [t, f].
    """

    out: Tensor
    partials: Callable[[], list[Tensor]]
    terms: Callable[[], list[Tensor]]


def _evaluate(
    form: str, activations: tuple[str, ...], z: Tensor, coefficients: Tensor, bias: Tensor | None
) -> _Evaluated:
    compute_dtype = torch.promote_types(z.dtype, torch.float32)
    z = z.to(compute_dtype)
    if bias is not None:
        z = z + bias.to(compute_dtype)
    c = [column.unsqueeze(-1) for column in coefficients.to(compute_dtype).unbind(-1)]
    k = len(activations)

    def values(x: Tensor) -> list[Tensor]:
        return [ACTIVATIONS[name].value(x) for name in activations]

    def derivatives(x: Tensor) -> list[Tensor]:
        return [ACTIVATIONS[name].derivative(x) for name in activations]

    if form == "type1":
        terms = values(z)
        return _Evaluated(_dot(c, terms), lambda: [_dot(c, derivatives(z))], lambda: terms)

    z1, z2 = z.chunk(2, dim=-1)
    values1 = values(z1)
    if form == "one-sided":
        first = _dot(c, values1)
        return _Evaluated(
            first * z2,
            lambda: [_dot(c, derivatives(z1)) * z2, first],
            lambda: [value * z2 for value in values1],
        )
    values2 = values(z2)
    if form == "bi-sided":
        first, second = _dot(c[:k], values1), _dot(c[k:], values2)
        return _Evaluated(
            first * second,
            lambda: [_dot(c[:k], derivatives(z1)) * second, first * _dot(c[k:], derivatives(z2))],
            lambda: [value * second for value in values1] + [first * value for value in values2],
        )
    rows = [c[i * k : (i + 1) * k] for i in range(k)]  # quadratic: c_kl, row-major
    by_first = [_dot(row, values2) for row in rows]  # sum_l c_kl sigma_l(z2), one for each k
    by_second = [_dot(column, values1) for column in zip(*rows, strict=True)]
    return _Evaluated(
        _dot(by_first, values1),
        lambda: [_dot(by_first, derivatives(z1)), _dot(by_second, derivatives(z2))],
        lambda: [first * second for first in values1 for second in values2],
    )


def _dot(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _compile(function: Callable[..., object], name: str, form: str) -> Callable[..., object]:
    """torch.compile with a code object of its own, so that forms do not share (and exhaust) one recompile limit."""
    code = function.__code__.replace(co_name=f"{name}_{form.replace('-', '_')}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True)
