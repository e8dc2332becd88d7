"""Computes the functions of activations.py on CPUs with a polynomial in place of the exponential.

In the loops that torch.compile makes for a CPU, each exp2 is a call of a library, which costs more than all else that a
mixture of two exponentials does to an element.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from megatron_moa.mixture import activations
from megatron_moa.mixture.activations import SQRT_2PI, inverse, read_as

# exp(y / 8): a fit of this project's over 0 <= y <= 20, closest near 0. All coefficients are positive, so it goes on
# growing beyond, though less than exp.
_EIGHTH = (
    1.0,
    0.12500008006766417,
    0.007812229671836057,
    0.00032579660397152703,
    1.0052475507950924e-05,
    2.7953203550555674e-07,
    2.6899041149456698e-09,
    2.151537332587508e-10,
)


def growth(y: Tensor) -> Tensor:
    """exp(y) for y >= 0: to 1.1e-6 of it up to y = 4, 1.5e-4 up to 16, ever less than it beyond 24."""
    total = _EIGHTH[-1]
    for coefficient in reversed(_EIGHTH[:-1]):
        total = total * y + coefficient
    return total**8  # three products; spelled out, the compiler would trace the sum for each factor


def normal_density(x: Tensor) -> Tensor:
    """phi(x)"""
    return inverse(SQRT_2PI * growth(0.5 * x * x))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))"""
    s = inverse(1.0 + growth(torch.abs(x)))
    return torch.where(x > 0.0, 1.0 - s, s)


_STAND_INS = {activations.normal_density: normal_density, activations.sigmoid: sigmoid}


@functools.cache
def on_cpu(function: FunctionType) -> FunctionType:
    """A function of activations.py by the functions here, in all that it calls."""
    return _STAND_INS.get(function) or read_as(function, _meaning)


def _meaning(word: Any) -> Any:
    return on_cpu(word) if isinstance(word, FunctionType) else word
