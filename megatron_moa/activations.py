"""The dictionary of activations: each one's value and derivative, written once for the whole package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_RELU_SLOPE = 0.01
_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_GELU_TANH_SCALE = math.sqrt(2 / math.pi)
_GELU_TANH_CUBIC = 0.044715


@dataclass(frozen=True)
class Activation:
    """One entry of the dictionary.

    Attributes:
        value: sigma(x), elementwise; floating dtype in, the same out.
        derivative: sigma'(x), elementwise; at a kink PyTorch's choice (0 for relu).
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu_derivative(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), LEAKY_RELU_SLOPE)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return 1 - t * t


def _gelu_derivative(x: Tensor) -> Tensor:
    # Phi(x) + x phi(x), Phi and phi the standard normal's distribution and density
    return 0.5 * (1 + torch.erf(x * _SQRT_HALF)) + x * torch.exp(-0.5 * x * x) * _INV_SQRT_2PI


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(_GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x))
    inner = _GELU_TANH_SCALE * (1 + 3 * _GELU_TANH_CUBIC * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _exp_linear_derivative(x: Tensor, negative: float) -> Tensor:
    # The exponent is clamped so that large x does not overflow in the branch that is not taken.
    return torch.where(x > 0, torch.ones_like(x), negative * torch.exp(torch.clamp_max(x, 0)))


def _mish_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, torch.ones_like),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "silu": Activation(F.silu, _silu_derivative),
    "relu": Activation(F.relu, _step),
    "leaky_relu": Activation(lambda x: F.leaky_relu(x, LEAKY_RELU_SLOPE), _leaky_relu_derivative),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
    "tanh": Activation(torch.tanh, _tanh_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
    "elu": Activation(F.elu, lambda x: _exp_linear_derivative(x, 1.0)),
    "selu": Activation(F.selu, lambda x: _exp_linear_derivative(x, _SELU_ALPHA) * _SELU_SCALE),
    "mish": Activation(F.mish, _mish_derivative),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
    "relu3": Activation(lambda x: F.relu(x).pow(3), lambda x: 3 * F.relu(x).square()),
    "one": Activation(torch.ones_like, torch.zeros_like),
}
