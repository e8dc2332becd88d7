"""Computes the mixture by torch.compile: forward and backward each fused into one function.

Gates are plain PyTorch here. autograd.py has the autograd functions around both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.mixture import lowering, reference
from megatron_moa.mixture.autograd import GateInputs, MixtureInputs
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.cpu_functions import on_cpu
from megatron_moa.mixture.grouped_products import (
    group_of_rows,
    grouped_linear,
    grouped_linear_input_gradient,
    grouped_linear_weight_gradient,
    grouped_sum,
)
from megatron_moa.mixture.lowering import Basis, lower, lowered, raised

_OPTIONS = {
    # By default inductor stores what several sums share, a tensor of fc1's size here, to compute it once; to compute
    # it again in the one loop is cheaper, and keeps memory at SwiGLU's (docs/design/log.md).
    "realize_opcount_threshold": 1_000_000,
    "realize_reads_threshold": 1_000_000,
    # Products and sums in one instruction, rounded once; by default inductor forbids the compiler that.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Otherwise each process first compiles and starts programs to see whether vector instructions work: seconds.
    "cpp.vec_isa_ok": True,
}


def mixture_forward(inputs: MixtureInputs, mixture: MixtureConfig) -> Tensor:
    """See :class:`megatron_moa.mixture.autograd.Backend`."""
    *tokens, width = inputs.z.shape
    inputs = _uniform(inputs)
    out = _forward_function(mixture.form, mixture.activations, inputs.z.device.type, _kind(inputs))(inputs)
    return _in_shape(out, (*tokens, width // 2 if mixture.gated else width))


def mixture_backward(
    inputs: MixtureInputs, mixture: MixtureConfig, grad: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See :class:`megatron_moa.mixture.autograd.Backend`."""
    shaped = (inputs.z, inputs.coefficients, inputs.per_token_scale)
    inputs, grad = _uniform(inputs), _two_or_more(_rows(grad))
    function = _backward_function(mixture.form, mixture.activations, inputs.z.device.type, _kind(inputs), needed)
    torch._dynamo.maybe_mark_dynamic(grad, 0)
    grads = function(inputs, grad)
    return tuple(None if own is None else _in_shape(own, of.shape) for own, of in zip(grads, shaped, strict=True))


def _rows(tensor: Tensor) -> Tensor:
    """[..., n] as [t, n]"""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _two_or_more(rows: Tensor) -> Tensor:
    """Pads [t, n] or [t] with zeros to two rows: the compiler would specialise to none and one."""
    missing = 2 - len(rows)
    return rows if missing <= 0 else F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing))


def _in_shape(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Without the rows that :func:`_two_or_more` added."""
    return rows.view(-1)[: math.prod(shape)].view(shape)


def _uniform(inputs: MixtureInputs) -> MixtureInputs:
    """Returns the inputs by rows, alike in all that the compiler specialises to.

    So the compiler compiles once. Calls would differ otherwise: the number of tokens changes from call to call in a
    MoE, evaluation may ask for no gradient, and an expert's scales are a view into all experts' with an offset of its
    own.
    """
    z, coefficients, bias, scale = (None if tensor is None else tensor.detach() for tensor in inputs)
    z = _two_or_more(_rows(z))
    coefficients = _two_or_more(_rows(coefficients)) if coefficients.dim() > 1 else coefficients
    scale = None if scale is None else _two_or_more(scale.flatten().clone())  # [t], small
    for tensor in (z, scale, coefficients if coefficients.dim() > 1 else None):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return MixtureInputs(z, coefficients, bias, scale)


def _kind(inputs: MixtureInputs) -> tuple[object, ...]:
    """What one compiled function is for: all of its inputs' dtypes and sizes but the number of tokens."""
    return tuple(
        None if tensor is None else (tensor.dtype, tensor.dim(), tensor.shape[-1]) for tensor in inputs[:3]
    ) + (None if inputs.per_token_scale is None else inputs.per_token_scale.dtype,)


@functools.cache
def _forward_function(
    form: str, activations: tuple[str, ...], device: str, kind: tuple[object, ...]
) -> Callable[..., Any]:
    del kind  # each has a function of its own
    bases = _bases(activations, device)

    def forward(inputs: MixtureInputs) -> Tensor:
        out = _evaluate(form, bases, inputs).out
        if inputs.per_token_scale is not None:
            out = out * inputs.per_token_scale.float()[:, None]
        return out.to(inputs.z.dtype)

    return _compile(forward, "mixture_forward", form)


@functools.cache
def _backward_function(
    form: str,
    activations: tuple[str, ...],
    device: str,
    kind: tuple[object, ...],
    needed: tuple[bool, bool, bool],
) -> Callable[..., Any]:
    del kind  # each has a function of its own
    need_z, need_coefficients, need_scale = needed
    bases = _bases(activations, device)

    def backward(inputs: MixtureInputs, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, coefficients, _, scale = inputs
        evaluated = _evaluate(form, bases, inputs)
        grad = grad.float()
        grad_z = grad_coefficients = grad_scale = None
        if need_scale:
            grad_scale = (grad * evaluated.out).sum(-1).to(scale.dtype)
        if scale is not None:
            grad = grad * scale.float()[:, None]
        if need_coefficients:
            # One row per token, no atomics; LA's then summed over tokens in a second step.
            sums = evaluated.raised([(grad * term).sum(-1) for term in evaluated.terms()])
            rows = torch.stack(sums, dim=-1)  # [t, n]
            grad_coefficients = rows if coefficients.dim() > 1 else rows.sum(0)
        if need_z:
            grad_z = torch.cat([grad * partial for partial in evaluated.partials()], dim=-1).to(z.dtype)
        return grad_z, grad_coefficients, grad_scale

    return _compile(backward, "mixture_backward", form)


@dataclass
class _Evaluated:
    """The mixture at one point: its value, and on demand its partial derivatives.

    Attributes:
        out: [t, f]
        partials: d out / d z, one [t, f] for each of fc1's halves.
        terms: d out / d a_j, one [t, f] for each a_j that lowering.py makes of the coefficients (of quadratic for each
            coefficient itself).
        raised: turns the gradients of the a_j, [t] each, into those of the n coefficients, [t] each.
    """

    out: Tensor
    partials: Callable[[], list[Tensor]]
    terms: Callable[[], list[Tensor]]
    raised: Callable[[list[Tensor]], list[Tensor]]


class _Bases(NamedTuple):
    """What activations are lowered to, outside of what is compiled."""

    whole: Basis
    alone: tuple[Basis, ...]
    silu: Basis


def _bases(activations: tuple[str, ...], device: str) -> _Bases:
    # tanh needs exp2's accuracy, and sigmoid shares that with it: beside tanh, other functions would cost more.
    stand_in = on_cpu if device == "cpu" and "tanh" not in activations else lambda function: function

    def basis(*dictionary: str) -> Basis:
        return lower(dictionary).with_functions(stand_in)

    return _Bases(basis(*activations), tuple(basis(name) for name in activations), basis("silu"))


def _evaluate(form: str, bases: _Bases, inputs: MixtureInputs) -> _Evaluated:
    z = inputs.z.float()
    if inputs.bias is not None:
        z = z + inputs.bias.float()
    c = [column.unsqueeze(-1) for column in inputs.coefficients.unbind(-1)]
    basis, alone, silu = bases
    k = len(alone)

    if form == "type1":
        out, derivative = lowering.value_and_derivative(z, lowered(c, basis), basis)
        return _Evaluated(
            out,
            lambda: [derivative],
            lambda: lowering.terms(z, basis),
            lambda sums: raised(sums, basis),
        )
    z1, z2 = z.chunk(2, dim=-1)
    if form == "one-sided":
        first, first_derivative = lowering.value_and_derivative(z1, silu.matrix[0], silu)
        second, second_derivative = lowering.value_and_derivative(z2, lowered(c, basis), basis)
        return _Evaluated(
            first * second,
            lambda: [first_derivative * second, first * second_derivative],
            lambda: [first * term for term in lowering.terms(z2, basis)],
            lambda sums: raised(sums, basis),
        )
    if form == "bi-sided":
        first, first_derivative = lowering.value_and_derivative(z1, lowered(c[:k], basis), basis)
        second, second_derivative = lowering.value_and_derivative(z2, lowered(c[k:], basis), basis)
        return _Evaluated(
            first * second,
            lambda: [first_derivative * second, first * second_derivative],
            lambda: (
                [term * second for term in lowering.terms(z1, basis)]
                + [first * term for term in lowering.terms(z2, basis)]
            ),
            lambda sums: raised(sums[: len(sums) // 2], basis) + raised(sums[len(sums) // 2 :], basis),
        )
    # Quadratic: c_kl, row-major over k <= l, of products of activations.
    values1, derivatives1 = zip(*[lowering.value_and_derivative(z1, b.matrix[0], b) for b in alone], strict=True)
    values2, derivatives2 = zip(*[lowering.value_and_derivative(z2, b.matrix[0], b) for b in alone], strict=True)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    by_pair = dict(zip(pairs, c, strict=True))
    rows = [[by_pair[i, j] for j in range(i, k)] for i in range(k)]
    columns = [[by_pair[i, j] for i in range(j + 1)] for j in range(k)]
    by_first = [_dot(row, values2[i:]) for i, row in enumerate(rows)]  # sum_{l >= k} c_kl sigma_l(z2), one for each k
    by_second = [_dot(column, values1[: j + 1]) for j, column in enumerate(columns)]
    return _Evaluated(
        _dot(by_first, values1),
        lambda: [_dot(by_first, derivatives1), _dot(by_second, derivatives2)],
        lambda: [values1[i] * values2[j] for i, j in pairs],
        lambda sums: sums,
    )


def _dot(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def _compile(function: Callable[..., Any], name: str, form: str) -> Callable[..., Any]:
    """Compiles a function under a code object of its own, so that it has a recompile limit of its own.

    Beyond the limit it begins anew: the compiler compiles for each of torch's global states (threads, inference mode,
    deterministic algorithms, ...) and for some strides, of which a long program may see more.
    """

    def compiled_anew() -> Callable[..., Any]:
        code = function.__code__.replace(co_name=f"{name}_{form.replace('-', '_')}")
        own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
        return torch.compile(own, fullgraph=True, options=_OPTIONS)

    compiled = compiled_anew()

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            compiled = compiled_anew()
            return compiled(*arguments)

    return call


def gate_forward(inputs: GateInputs, mixture: MixtureConfig) -> Tensor:
    """See :class:`megatron_moa.mixture.autograd.Backend`."""
    logits = _logits(inputs)
    coefficients = reference.gate(logits, mixture, _per_row(inputs.amplitude, inputs.group_ends, logits))
    coefficients = coefficients if inputs.scale is None else coefficients * inputs.scale
    return coefficients.view(*inputs.x.shape[:-1], -1)


def gate_backward(
    inputs: GateInputs, mixture: MixtureConfig, grad: Tensor, coefficients: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See :class:`megatron_moa.mixture.autograd.Backend`."""
    shape = inputs.x.shape
    inputs, grad, coefficients = inputs._replace(x=_rows(inputs.x)), _rows(grad), _rows(coefficients)
    x, weight, bias, amplitude, scale, group_ends = inputs
    grad_x = grad_weight = grad_bias = grad_amplitude = None
    if scale is not None:
        grad, coefficients = grad * scale, coefficients / scale
    psi = coefficients
    if amplitude is not None:
        # Coefficients cannot be divided by an amplitude of 0, so psi is computed again.
        rows = _per_row(amplitude, group_ends, grad)
        slope, offset = mixture.psi_hat
        psi = reference.gate(_logits(inputs), mixture)
        grad_amplitude = _summed(grad * (slope * psi + offset), group_ends, amplitude)
        grad = grad * rows * slope
    grad = _gate_derivative(grad, psi, mixture)
    if bias is not None:
        grad_bias = _summed(grad, group_ends, bias)
    need_x, need_weight = needed
    if need_x:
        wide = weight.to(grad.dtype)
        grad_x = grad @ wide if group_ends is None else grouped_linear_input_gradient(grad, wide, group_ends)
        grad_x = grad_x.to(x.dtype).view(shape)
    if need_weight:
        wide = x.to(grad.dtype)
        grad_weight = grad.t() @ wide if group_ends is None else grouped_linear_weight_gradient(grad, wide, group_ends)
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_amplitude


def _logits(inputs: GateInputs) -> Tensor:
    """[t, n], float32"""
    x, weight, group_ends = _rows(inputs.x).float(), inputs.weight.float(), inputs.group_ends
    logits = F.linear(x, weight) if group_ends is None else grouped_linear(x, weight, group_ends)
    bias = _per_row(inputs.bias, group_ends, logits)
    return logits if bias is None else logits + bias


def _per_row(parameter: Tensor | None, group_ends: Tensor | None, rows: Tensor) -> Tensor | None:
    """A parameter [n] as it is, one of groups [groups, n] as [t, n]; in the dtype of ``rows``."""
    if parameter is None:
        return None
    parameter = parameter.to(rows.dtype)
    return parameter if group_ends is None else parameter[group_of_rows(group_ends, len(rows))]


def _summed(rows: Tensor, group_ends: Tensor | None, parameter: Tensor) -> Tensor:
    """Sums [t, n] over the rows that share a parameter, to [n] or [groups, n].

    The order is the same at every call.
    """
    total = rows.sum(0) if group_ends is None else grouped_sum(rows, group_ends)
    return total.to(parameter.dtype)


def _gate_derivative(grad: Tensor, psi: Tensor, mixture: MixtureConfig) -> Tensor:
    """The logits' gradient, from that of psi and from psi itself, [t, n]."""
    if mixture.gate == "sigmoid":
        return grad * psi * (1 - psi)
    if mixture.gate == "tanh":
        return grad * (1 - psi * psi)
    assert mixture.gate == "softmax"
    grad, psi = (tensor.unflatten(-1, (-1, mixture.softmax_size)) for tensor in (grad, psi))
    return (psi * (grad - (grad * psi).sum(-1, keepdim=True))).flatten(-2)
