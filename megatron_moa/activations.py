"""The dictionary of activations: each one's value and derivative, written once for the whole package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_RELU_SLOPE = 0.01
SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717

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


def _relu(x: Tensor) -> Tensor:
    return torch.clamp_min(x, 0)


def _step(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _leaky_relu_derivative(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, LEAKY_RELU_SLOPE).to(x.dtype)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(x)
    return 1 - t * t


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * _SQRT_HALF))


def _gelu_derivative(x: Tensor) -> Tensor:
    # Phi(x) + x phi(x)
    return _normal_cdf(x) + x * torch.exp(-0.5 * x * x) * _INV_SQRT_2PI


def _gelu_tanh_argument(x: Tensor) -> Tensor:
    return _GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(_gelu_tanh_argument(x)))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(_gelu_tanh_argument(x))
    inner = _GELU_TANH_SCALE * (1 + 3 * _GELU_TANH_CUBIC * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _exp_linear(x: Tensor, negative: float) -> Tensor:
    # The exponent is clamped so that large x neither overflows nor puts inf * 0 into a gradient.
    return torch.where(x > 0, x, negative * torch.expm1(torch.clamp_max(x, 0)))


def _exp_linear_derivative(x: Tensor, negative: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), negative * torch.exp(torch.clamp_max(x, 0)))


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


def _mish_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x: x, torch.ones_like),
    "gelu": Activation(lambda x: x * _normal_cdf(x), _gelu_derivative),
    "silu": Activation(lambda x: x * torch.sigmoid(x), _silu_derivative),
    "relu": Activation(_relu, _step),
    "leaky_relu": Activation(lambda x: torch.where(x > 0, x, LEAKY_RELU_SLOPE * x), _leaky_relu_derivative),
    "relu2": Activation(lambda x: _relu(x) * _relu(x), lambda x: 2 * _relu(x)),
    "tanh": Activation(torch.tanh, _tanh_derivative),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_derivative),
    "elu": Activation(lambda x: _exp_linear(x, 1.0), lambda x: _exp_linear_derivative(x, 1.0)),
    "selu": Activation(
        lambda x: SELU_SCALE * _exp_linear(x, SELU_ALPHA),
        lambda x: SELU_SCALE * _exp_linear_derivative(x, SELU_ALPHA),
    ),
    "mish": Activation(_mish, _mish_derivative),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
    "relu3": Activation(lambda x: _relu(x) * _relu(x) * _relu(x), lambda x: 3 * _relu(x) * _relu(x)),
    "one": Activation(torch.ones_like, torch.zeros_like),
}
