"""Defines each activation's value and derivative once, for torch.compile and Triton alike.

The functions use only words that mean the same in ``torch`` and in ``triton.language``: ``torch.exp2``,
``torch.rsqrt``, ``torch.abs``, ``torch.where`` and arithmetic. triton_backend/language.py makes Triton functions of
them by reading ``torch`` as ``triton.language``. Tests hold them to PyTorch's own, which reference.py uses.

They are for float32. Each calls the terms it is made of by name (:func:`_decay`, :func:`_reciprocal`,
:func:`_gaussian`), and both compilers compute a term once for all activations of the same x: two exponentials and two
reciprocals serve sigmoid, silu, tanh, elu, selu, mish and gelu, value and derivative. Comparisons are such that NaN
stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.mixture.reference import LEAKY_RELU_SLOPE

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717

_LOG2_E = 1.4426950408889634
_INV_SQRT_2PI = 0.3989422804014327
_GELU_TANH_SCALE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_TANH_CUBIC = 0.044715

# Upper tail of the normal distribution over its density, as t p(t) with t = 1 / (1 + _TAIL_AT |x|): a minimax fit of
# this project's. Error of Phi: 5e-8 absolute, below half of float32's epsilon, and 1e-4 relative down to Phi(-13).
_TAIL_AT = 0.29
_TAIL_1 = 0.11696728310800117
_TAIL_2 = 0.09988001693775483
_TAIL_3 = 0.18219617785753034
_TAIL_4 = -0.09715191994821235
_TAIL_5 = 0.28770521961177253
_TAIL_6 = -0.08959682045018938


@dataclass(frozen=True)
class Activation:
    """One entry of the dictionary.

    Attributes:
        value: sigma(x), elementwise, float32 in and out.
        derivative: sigma'(x), elementwise; at a kink PyTorch's choice (0 for relu).
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _inverse(y: Tensor) -> Tensor:
    # 1 / y for y >= 1. On GPUs this is two instructions, a division several.
    root = torch.rsqrt(y)
    return root * root


def _decay(x: Tensor) -> Tensor:
    return torch.exp2(-_LOG2_E * torch.abs(x))


def _reciprocal(x: Tensor) -> Tensor:
    # One for sigmoid and tanh: 1 / ((1 + e) (1 + e^2)), e = exp(-|x|)
    e = _decay(x)
    return _inverse((1.0 + e) * (1.0 + e * e))


def _gaussian(x: Tensor) -> Tensor:
    return torch.exp2(-0.5 * _LOG2_E * x * x)


def _normal_distribution(x: Tensor) -> Tensor:
    t = _inverse(1.0 + _TAIL_AT * torch.abs(x))
    p = _TAIL_1 + t * (_TAIL_2 + t * (_TAIL_3 + t * (_TAIL_4 + t * (_TAIL_5 + t * _TAIL_6))))
    tail = _gaussian(x) * (t * p)
    return torch.where(x < 0.0, tail, 1.0 - tail)


def one(x: Tensor) -> Tensor:
    """The constant 1."""
    return torch.where(x == x, 1.0, x)


def one_derivative(x: Tensor) -> Tensor:
    """0"""
    return torch.where(x == x, 0.0, x)


def identity(x: Tensor) -> Tensor:
    """x"""
    return x


def relu(x: Tensor) -> Tensor:
    """max(x, 0)"""
    return torch.where(x < 0.0, 0.0, x)


def relu_derivative(x: Tensor) -> Tensor:
    """1 for x > 0, else 0"""
    return torch.where(x > 0.0, 1.0, 0.0)


def leaky_relu(x: Tensor) -> Tensor:
    """x for x > 0, else 0.01 x"""
    return torch.where(x < 0.0, LEAKY_RELU_SLOPE * x, x)


def leaky_relu_derivative(x: Tensor) -> Tensor:
    """1 for x > 0, else 0.01"""
    return torch.where(x > 0.0, 1.0, LEAKY_RELU_SLOPE)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2"""
    return relu(x) * relu(x)


def relu2_derivative(x: Tensor) -> Tensor:
    """2 max(x, 0)"""
    return 2.0 * relu(x)


def relu3(x: Tensor) -> Tensor:
    """max(x, 0)^3"""
    return relu(x) * relu2(x)


def relu3_derivative(x: Tensor) -> Tensor:
    """3 max(x, 0)^2"""
    return 3.0 * relu2(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    e = _decay(x)
    return torch.where(x < 0.0, e, 1.0) * ((1.0 + e * e) * _reciprocal(x))


def sigmoid_derivative(x: Tensor) -> Tensor:
    """s (1 - s) = e / (1 + e)^2, e = exp(-|x|)"""
    e = _decay(x)
    s = (1.0 + e * e) * _reciprocal(x)
    return e * s * s


def tanh(x: Tensor) -> Tensor:
    """(1 - exp(-2x)) / (1 + exp(-2x))"""
    e = _decay(x)
    t = (1.0 - e * e) * ((1.0 + e) * _reciprocal(x))
    return torch.where(x < 0.0, -t, t)


def tanh_derivative(x: Tensor) -> Tensor:
    """1 - t^2 = 4 e^2 / (1 + e^2)^2, e = exp(-|x|)"""
    e = _decay(x)
    s = (1.0 + e) * _reciprocal(x)
    return 4.0 * (e * s) * (e * s)


def silu(x: Tensor) -> Tensor:
    """x s(x), s the sigmoid"""
    return x * sigmoid(x)


def silu_derivative(x: Tensor) -> Tensor:
    """s + x s (1 - s)"""
    return sigmoid(x) + x * sigmoid_derivative(x)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), the exact form"""
    return x * _normal_distribution(x)


def gelu_derivative(x: Tensor) -> Tensor:
    """Phi(x) + x phi(x), phi the normal density"""
    return _normal_distribution(x) + x * (_INV_SQRT_2PI * _gaussian(x))


def _gelu_tanh_argument(x: Tensor) -> Tensor:
    return 2.0 * _GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(u)) / 2 = x s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)"""
    return x * sigmoid(_gelu_tanh_argument(x))


def gelu_tanh_derivative(x: Tensor) -> Tensor:
    """s(2u) + x s(2u) (1 - s(2u)) 2u'"""
    slope = 2.0 * _GELU_TANH_SCALE * (1.0 + 3.0 * _GELU_TANH_CUBIC * x * x)
    return sigmoid(_gelu_tanh_argument(x)) + x * sigmoid_derivative(_gelu_tanh_argument(x)) * slope


def elu(x: Tensor) -> Tensor:
    """x for x > 0, else exp(x) - 1"""
    return torch.where(x < 0.0, _decay(x) - 1.0, x)


def elu_derivative(x: Tensor) -> Tensor:
    """1 for x > 0, else exp(x)"""
    return torch.where(x > 0.0, 1.0, _decay(x))


def selu(x: Tensor) -> Tensor:
    """scale (x for x > 0, else alpha (exp(x) - 1))"""
    return torch.where(x < 0.0, _SELU_SCALE * _SELU_ALPHA * (_decay(x) - 1.0), _SELU_SCALE * x)


def selu_derivative(x: Tensor) -> Tensor:
    """scale (1 for x > 0, else alpha exp(x))"""
    return torch.where(x > 0.0, _SELU_SCALE, _SELU_SCALE * _SELU_ALPHA * _decay(x))


# tanh(softplus(x)) = n / (n + 2w) with n = (1 + exp(x))^2 - 1 and w = 1, both times exp(-2x) for x > 0
def _mish_n(x: Tensor) -> Tensor:
    e = _decay(x)
    return torch.where(x < 0.0, e * (e + 2.0), 1.0 + 2.0 * e)


def _mish_w(x: Tensor) -> Tensor:
    return torch.where(x < 0.0, 1.0, _decay(x) * _decay(x))


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))"""
    return x * (_mish_n(x) * _inverse(_mish_n(x) + 2.0 * _mish_w(x)))


def mish_derivative(x: Tensor) -> Tensor:
    """t + x (1 - t^2) s(x), t = tanh(softplus(x)); 1 - t^2 = 4 w (n + w) / (n + 2w)^2"""
    n = _mish_n(x)
    w = _mish_w(x)
    r = _inverse(n + 2.0 * w)
    return n * r + x * sigmoid(x) * (4.0 * w * r) * ((n + w) * r)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(identity, one),
    "gelu": Activation(gelu, gelu_derivative),
    "silu": Activation(silu, silu_derivative),
    "relu": Activation(relu, relu_derivative),
    "leaky_relu": Activation(leaky_relu, leaky_relu_derivative),
    "relu2": Activation(relu2, relu2_derivative),
    "tanh": Activation(tanh, tanh_derivative),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_derivative),
    "elu": Activation(elu, elu_derivative),
    "selu": Activation(selu, selu_derivative),
    "mish": Activation(mish, mish_derivative),
    "sigmoid": Activation(sigmoid, sigmoid_derivative),
    "relu3": Activation(relu3, relu3_derivative),
    "one": Activation(one, one_derivative),
}
