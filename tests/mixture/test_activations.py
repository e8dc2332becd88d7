"""Each activation's value against its formula, each derivative against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moa.mixture.activations import ACTIVATIONS, LEAKY_RELU_SLOPE
from megatron_moa.mixture.config import ACTIVATION_NAMES
from megatron_moa.mixture.reference import DEFINITIONS
from tests.support.equations import SIGMA

POINTS = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([1e-9, -1e-9]).double()])
# Of the kernels' formulas in float32, relative to 1 + |value|: a few roundings of 6e-8.
TOLERANCE = 4e-7


def test_every_activation_has_a_formula_here() -> None:
    assert set(SIGMA) == set(ACTIVATIONS) == set(DEFINITIONS) == set(ACTIVATION_NAMES)
    assert LEAKY_RELU_SLOPE == 0.01


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_definition_is_the_formula(name: str) -> None:
    formula = torch.tensor([SIGMA[name](x) for x in POINTS.tolist()], dtype=torch.float64)
    torch.testing.assert_close(DEFINITIONS[name](POINTS), formula, rtol=1e-12, atol=1e-12)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs() / (1 + expected.abs())).max().item()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative_are_the_definition_s(name: str) -> None:
    x = torch.cat([POINTS, torch.zeros(1, dtype=torch.float64)]).float()
    exact = x.double().requires_grad_()
    value = DEFINITIONS[name](exact)
    # Plus zero times x: a constant has no graph of its own.
    (derivative,) = torch.autograd.grad((value + 0 * exact).sum(), exact)
    assert _error(ACTIVATIONS[name].value(x), value.detach()) < TOLERANCE
    assert _error(ACTIVATIONS[name].derivative(x), derivative) < TOLERANCE


def test_exact_gelu_is_exact_to_bf16_rounding_in_the_tail() -> None:
    """Where Phi(x) is tiny its relative error counts: below a hundredth of bfloat16's rounding down to x = -12."""
    x = torch.linspace(-12, 0, 2001)
    exact = x.double() * 0.5 * torch.erfc(-x.double() / math.sqrt(2))
    relative = ((ACTIVATIONS["gelu"].value(x).double() - exact) / exact)[:-1].abs().max().item()
    assert relative < 1.5e-4


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_inputs_stay_finite_and_nan_stays(name: str) -> None:
    x = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4])
    for function in (ACTIVATIONS[name].value, ACTIVATIONS[name].derivative):
        assert function(x).dtype == torch.float32
        assert function(x).isfinite().all()
    assert ACTIVATIONS[name].value(torch.tensor([float("nan")])).isnan().all()
