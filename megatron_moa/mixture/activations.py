"""Defines the activations once, for torch.compile and Triton alike.

Each activation is a sum of a few terms that the activations share. A mixture of K activations costs less as one of its
terms: identity, relu and leaky_relu are two slopes, gelu and silu each x times one function. lowering.py turns a
dictionary's coefficients into those of its terms.

The functions use only words that mean the same in ``torch`` and in ``triton.language``: ``torch.exp2``, ``torch.abs``,
``torch.where`` and arithmetic. triton_backend/language.py makes Triton functions of them by reading ``torch`` as
``triton.language``; cpu_functions.py puts others in the place of some. Tests hold them to PyTorch's own, which
reference.py uses.

They are for float32. Each calls what it is made of by name (:func:`_exp_minus`, :func:`sigmoid`,
:func:`normal_density`), and both compilers compute that once for all terms of the same x: two exponentials and three
reciprocals serve sigmoid, tanh and Phi, value and derivative. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from megatron_moa.mixture.reference import LEAKY_RELU_SLOPE

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717

_LOG2_E = 1.4426950408889634
SQRT_2PI = 2.5066282746310002
_LOG2_SQRT_2PI = 1.3257480647361595
_GELU_TANH_SCALE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_TANH_CUBIC = 0.044715

# Upper tail of the normal distribution over exp(-x^2 / 2), as t p(t) with t = 1 / (1 + _TAIL_AT |x|): a minimax fit of
# this project's. Error of Phi: 5e-8 absolute, below half of float32's epsilon, and 1e-4 relative down to Phi(-13). Here
# times sqrt(2 pi), so that the density is the only exponential.
_TAIL_AT = 0.29
_TAIL_1 = SQRT_2PI * 0.11696728310800117
_TAIL_2 = SQRT_2PI * 0.09988001693775483
_TAIL_3 = SQRT_2PI * 0.18219617785753034
_TAIL_4 = SQRT_2PI * -0.09715191994821235
_TAIL_5 = SQRT_2PI * 0.28770521961177253
_TAIL_6 = SQRT_2PI * -0.08959682045018938


def inverse(y: Tensor) -> Tensor:
    """1 / y for y >= 1; in Triton one instruction of NVIDIA's GPUs."""
    return 1.0 / y


def _exp_minus(x: Tensor) -> Tensor:
    # exp(-x); infinite below -88, of which the reciprocal is 0 as it should be
    return torch.exp2(-_LOG2_E * x)


def decay(x: Tensor) -> Tensor:
    """exp(-|x|), at most 1"""
    return torch.exp2(-_LOG2_E * torch.abs(x))


def normal_density(x: Tensor) -> Tensor:
    """phi(x)"""
    return torch.exp2(-0.5 * _LOG2_E * x * x - _LOG2_SQRT_2PI)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)"""
    return torch.where(x <= 0.0, 0.0, x)


def one(x: Tensor) -> Tensor:
    """The constant 1."""
    return torch.where(x == x, 1.0, x)


def one_derivative(x: Tensor) -> Tensor:
    """0"""
    return torch.where(x == x, 0.0, x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    return inverse(1.0 + _exp_minus(x))


def sigmoid_derivative(x: Tensor) -> Tensor:
    """s (1 - s)"""
    s = sigmoid(x)
    return s * (1.0 - s)


def tanh(x: Tensor) -> Tensor:
    """2 / (1 + exp(-2x)) - 1, by sigmoid's exponential"""
    e = _exp_minus(x)
    return 2.0 * inverse(1.0 + e * e) - 1.0


def tanh_derivative(x: Tensor) -> Tensor:
    """1 - t^2"""
    t = tanh(x)
    return 1.0 - t * t


def normal_distribution(x: Tensor) -> Tensor:
    """Phi(x)"""
    t = inverse(1.0 + _TAIL_AT * torch.abs(x))
    p = _TAIL_1 + t * (_TAIL_2 + t * (_TAIL_3 + t * (_TAIL_4 + t * (_TAIL_5 + t * _TAIL_6))))
    tail = normal_density(x) * (t * p)
    return torch.where(x > 0.0, 1.0 - tail, tail)


def _gelu_tanh_argument(x: Tensor) -> Tensor:
    return 2.0 * _GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x)


def gelu_tanh_factor(x: Tensor) -> Tensor:
    """(1 + tanh(u)) / 2 = s(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)"""
    argument = _gelu_tanh_argument(x)
    e = decay(argument)
    return torch.where(argument > 0.0, 1.0, e) * inverse(1.0 + e)


def gelu_tanh_factor_derivative(x: Tensor) -> Tensor:
    """s(2u) (1 - s(2u)) 2u' = e / (1 + e)^2 2u', e = exp(-|2u|): u' is large where 1 - s is tiny"""
    e = decay(_gelu_tanh_argument(x))
    s = inverse(1.0 + e)
    slope = 2.0 * _GELU_TANH_SCALE * (1.0 + 3.0 * _GELU_TANH_CUBIC * x * x)
    return e * s * s * slope


def expm1_below(x: Tensor) -> Tensor:
    """exp(x) - 1 for x < 0, else 0"""
    return torch.where(x > 0.0, 0.0, decay(x) - 1.0)


def expm1_below_derivative(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, else 0"""
    return torch.where(x > 0.0, 0.0, decay(x))


# tanh(softplus(x)) = n / (n + 2w) with n = (1 + exp(x))^2 - 1 and w = 1, both times exp(-2x) for x > 0
def _mish_n(x: Tensor) -> Tensor:
    e = decay(x)
    return torch.where(x > 0.0, 1.0 + 2.0 * e, e * (e + 2.0))


def _mish_w(x: Tensor) -> Tensor:
    return torch.where(x > 0.0, decay(x) * decay(x), 1.0)


def mish_factor(x: Tensor) -> Tensor:
    """tanh(softplus(x))"""
    return _mish_n(x) * inverse(_mish_n(x) + 2.0 * _mish_w(x))


def mish_factor_derivative(x: Tensor) -> Tensor:
    """(1 - t^2) s(x), t = tanh(softplus(x)); 1 - t^2 = 4 w (n + w) / (n + 2w)^2"""
    n = _mish_n(x)
    w = _mish_w(x)
    r = inverse(n + 2.0 * w)
    return sigmoid(x) * (4.0 * w * r) * ((n + w) * r)


def read_as(function: FunctionType, meaning: Callable[[Any], Any]) -> FunctionType:
    """A copy of a function, in which each name it uses stands for ``meaning`` of what it stood for."""
    known = function.__globals__
    words = {name: meaning(known[name]) for name in function.__code__.co_names if name in known}
    # Without __name__: torch.compile would look words up in the module of that name.
    copy = FunctionType(function.__code__, words | {"__builtins__": known["__builtins__"]}, function.__name__)
    copy.__module__ = function.__module__
    return copy


@dataclass(frozen=True)
class Function:
    """A function of x, float32 in and out, elementwise, and its derivative; at a kink PyTorch's choice."""

    value: FunctionType
    derivative: FunctionType


# The terms: x itself ("x"), the powers of max(x, 0) ("relu", "relu2", "relu3"), and these.
POWERS = ("relu", "relu2", "relu3")
# x times a function:
FACTORS = {
    "silu": Function(sigmoid, sigmoid_derivative),
    "gelu": Function(normal_distribution, normal_density),
    "gelu_tanh": Function(gelu_tanh_factor, gelu_tanh_factor_derivative),
    "mish": Function(mish_factor, mish_factor_derivative),
}
# A function alone:
LEVELS = {
    "one": Function(one, one_derivative),
    "sigmoid": Function(sigmoid, sigmoid_derivative),
    "tanh": Function(tanh, tanh_derivative),
    "expm1_below": Function(expm1_below, expm1_below_derivative),
}

ACTIVATIONS: dict[str, dict[str, float]] = {
    "identity": {"x": 1.0},
    "gelu": {"gelu": 1.0},
    "silu": {"silu": 1.0},
    "relu": {"relu": 1.0},
    "leaky_relu": {"x": LEAKY_RELU_SLOPE, "relu": 1.0 - LEAKY_RELU_SLOPE},
    "relu2": {"relu2": 1.0},
    "tanh": {"tanh": 1.0},
    "gelu_tanh": {"gelu_tanh": 1.0},
    "elu": {"relu": 1.0, "expm1_below": 1.0},
    "selu": {"relu": _SELU_SCALE, "expm1_below": _SELU_SCALE * _SELU_ALPHA},
    "mish": {"mish": 1.0},
    "sigmoid": {"sigmoid": 1.0},
    "relu3": {"relu3": 1.0},
    "one": {"one": 1.0},
}
"""Each activation as a sum of terms."""
