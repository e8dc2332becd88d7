"""Specifies the mixture by the paper's equations (arXiv 2605.26647) in plain PyTorch.

This is the eager backend. Exported models carry this file, so it needs nothing but PyTorch (megatron_moa/hf). Notation
of docs/mixture.md: K activations sigma_k, n coefficients, h the model's width, f the FFN's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from megatron_moa.mixture.config import MixtureConfig

LEAKY_RELU_SLOPE = 0.01

# The dictionary in PyTorch's own functions: what megatron_moa.mixture.activations is held to.
DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, LEAKY_RELU_SLOPE),
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "relu3": lambda x: F.relu(x).pow(3),
    "one": torch.ones_like,
}


def gate(logits: Tensor, mixture: MixtureConfig, amplitude: Tensor | None = None) -> Tensor:
    """Coefficients from gate logits.

    c_k = psi(l_k), or with amplitudes c_k = a_k psi_hat(l_k), psi_hat scaled so that psi_hat(0) = 1
    (sigmoid: 2 sigmoid; softmax: its size times softmax; tanh: 1 + tanh).

    Args:
        logits: [..., n], l_k = u_k x + b_k.
        mixture: which psi; softmax normalises over a branch's K entries, over all K(K+1)/2 of the quadratic form.
        amplitude: [n] or [..., n], or None for fixed amplitude.

    Returns:
        [..., n], the dtype of the logits.
    """
    if mixture.gate == "softmax":
        psi = torch.softmax(logits.unflatten(-1, (-1, mixture.softmax_size)), dim=-1).flatten(-2)
    else:
        psi = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[mixture.gate](logits)
    if amplitude is None:
        return psi
    slope, offset = mixture.psi_hat
    return amplitude * (slope * psi + offset)


def gate_coefficients(
    x: Tensor,
    weight: Tensor,
    mixture: MixtureConfig,
    bias: Tensor | None = None,
    amplitude: Tensor | None = None,
    scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """Returns :func:`gate` of the logits u_k x + b_k, times ``scale``.

    Arguments are as in functional.py's ``gate_coefficients``. All is computed in float32, whatever x is (in float64 for
    a float64 weight).
    """
    if group_ends is not None:
        return torch.cat(
            [
                gate_coefficients(rows, weight[group], mixture, _of(bias, group), _of(amplitude, group), scale)
                for group, rows in enumerate(x.split(_sizes(group_ends)))
            ]
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    bias, amplitude = (None if tensor is None else tensor.to(dtype) for tensor in (bias, amplitude))
    coefficients = gate(F.linear(x.to(dtype), weight.to(dtype), bias), mixture, amplitude)
    return coefficients if scale is None else coefficients * scale


def _sizes(group_ends: Tensor) -> list[int]:
    from megatron_moa.mixture.grouped_products import group_sizes  # here: grouped experts alone need it

    return group_sizes(group_ends)


def _of(tensor: Tensor | None, group: int) -> Tensor | None:
    return None if tensor is None else tensor[group]


def mix(preactivation: Tensor, coefficients: Tensor, mixture: MixtureConfig) -> Tensor:
    """Returns the mixed activation, before the down projection.

    It is W2's input (type1) or W3's, eq. 3 to 10 of the paper.

    | form | value | equations (LA, MoA) |
    | --- | --- | --- |
    | type1 | sum_k c_k sigma_k(y) | 3, 7 |
    | one-sided | silu(y) * sum_k c_k sigma_k(z) | 4, 8 |
    | bi-sided | [sum_k c_k sigma_k(y)] * [sum_l d_l sigma_l(z)] | 5, 9 |
    | quadratic | sum_{k <= l} c_kl sigma_k(y) sigma_l(z) | 6, 10 |

    Args:
        preactivation: y = W1 x as [..., f] for type1; else y and z = W2 x as [..., 2f], y first.
        coefficients: [..., n] per token or [n] for all; bi-sided (c, d), quadratic c_kl row-major over k <= l.

    Returns:
        [..., f]
    """
    names = mixture.activations
    if mixture.form == "type1":
        return _weighted_sum(names, preactivation, coefficients)
    y, z = preactivation.chunk(2, dim=-1)
    if mixture.form == "one-sided":
        return F.silu(y) * _weighted_sum(names, z, coefficients)
    if mixture.form == "bi-sided":
        first, second = coefficients.chunk(2, dim=-1)
        return _weighted_sum(names, y, first) * _weighted_sum(names, z, second)
    rows = coefficients.split(tuple(range(len(names), 0, -1)), dim=-1)  # of one k each: l = k, ..., K
    return sum(
        DEFINITIONS[name](y) * _weighted_sum(names[k:], z, row)
        for k, (name, row) in enumerate(zip(names, rows, strict=True))
    )


def _weighted_sum(names: tuple[str, ...], x: Tensor, coefficients: Tensor) -> Tensor:
    terms = zip(names, coefficients.unbind(-1), strict=True)
    return sum(coefficient.unsqueeze(-1) * DEFINITIONS[name](x) for name, coefficient in terms)


def mixed_activation(
    preactivation: Tensor,
    coefficients: Tensor,
    mixture: MixtureConfig,
    bias: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """:func:`mix` of ``preactivation + bias``, times a scale per token: the ``eager`` backend.

    Half precision is computed in float32 and rounded once, at the end, as every backend must.
    """
    if group_ends is not None:
        sizes = torch.tensor(_sizes(group_ends), device=coefficients.device)
        coefficients = coefficients.repeat_interleave(sizes, dim=0)  # [groups, n] -> [tokens, n]
    compute_dtype = torch.promote_types(preactivation.dtype, torch.float32)
    z = preactivation.to(compute_dtype)
    if bias is not None:
        z = z + bias.to(compute_dtype)
    mixed = mix(z, coefficients.to(compute_dtype), mixture)
    if per_token_scale is not None:
        mixed = mixed * per_token_scale.to(compute_dtype).unsqueeze(-1)
    return mixed.to(preactivation.dtype)


def feed_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    mixture: MixtureConfig,
    *,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    amplitude: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Computes a whole feed-forward layer.

    The layer is f(x) = W2 sigma(W1 x) (Type I) or g(x) = W3 (sigma(W1 x) * W2 x) (Type II).

    Args:
        x: [..., h], normalised.
        fc1_weight: [f, h], or [W1; W2] as [2f, h] for the gated forms.
        fc2_weight: [h, f].
        gate_weight: u [n, h] (MoA), with gate_bias [n] and amplitude [n] where used.
        coefficients: [n] (LA), instead of a gate.

    Returns:
        [..., h]
    """
    if coefficients is None:
        coefficients = gate(F.linear(x, gate_weight, gate_bias), mixture, amplitude)
    return F.linear(mix(F.linear(x, fc1_weight), coefficients, mixture), fc2_weight)
