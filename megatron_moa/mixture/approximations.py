"""Defines cheaper functions that stand in for those of activations.py where bfloat16 goes in.

They use the words that activations.py uses. Sigmoid's derivative is one multiply-add. Phi is a fit whose tanh is one
instruction of NVIDIA's GPUs. All errors lie below bfloat16's rounding of the results (docs/design/performance.md has
the table; tests/mixture/test_approximations.py holds it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moa.mixture import activations
from megatron_moa.mixture.activations import inverse, sigmoid

_LOG2_E = 1.4426950408889634
# Phi(x) = (1 + tanh(x (PHI_1 + PHI_3 x^2))) / 2, to 1.4e-4: a minimax fit of this project's.
_PHI_1 = 0.79880128
_PHI_3 = 0.035282152


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = sigmoid(x)
    return s - s * s


def coarse_tanh(x: Tensor) -> Tensor:
    """tanh, of which 11 bits suffice: NVIDIA's tanh.approx.f32 has a relative error of at most 2^-11."""
    return 2.0 * inverse(1.0 + torch.exp2(-2.0 * _LOG2_E * x)) - 1.0


def _normal_distribution(x: Tensor) -> Tensor:
    return 0.5 + 0.5 * coarse_tanh(x * (_PHI_1 + _PHI_3 * x * x))


APPROXIMATIONS = {
    activations.sigmoid_derivative: _sigmoid_derivative,
    activations.normal_distribution: _normal_distribution,
}
"""What stands in for what."""
