"""Each activation's value against its formula, each derivative against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moa.mixture import lowering
from megatron_moa.mixture.activations import ACTIVATIONS, LEAKY_RELU_SLOPE
from megatron_moa.mixture.config import ACTIVATION_NAMES, DICTIONARIES
from megatron_moa.mixture.lowering import lower
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


def value_and_derivative(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    basis = lower((name,))
    return [part + torch.zeros_like(x) for part in lowering.value_and_derivative(x, basis.matrix[0], basis)]


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs() / (1 + expected.abs())).max().item()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative_are_the_definition_s(name: str) -> None:
    x = torch.cat([POINTS, torch.zeros(1, dtype=torch.float64)]).float()
    exact = x.double().requires_grad_()
    value = DEFINITIONS[name](exact)
    # Plus zero times x: a constant has no graph of its own.
    (derivative,) = torch.autograd.grad((value + 0 * exact).sum(), exact)
    for actual, expected in zip(value_and_derivative(name, x), (value.detach(), derivative), strict=True):
        assert _error(actual, expected) < TOLERANCE


def test_exact_gelu_is_exact_to_bf16_rounding_in_the_tail() -> None:
    """Bounds the relative error of gelu, which counts where Phi(x) is tiny.

    The error stays below a hundredth of bfloat16's rounding down to x = -12.
    """
    x = torch.linspace(-12, 0, 2001)
    exact = x.double() * 0.5 * torch.erfc(-x.double() / math.sqrt(2))
    relative = ((value_and_derivative("gelu", x)[0].double() - exact) / exact)[:-1].abs().max().item()
    assert relative < 1.5e-4


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_inputs_stay_finite_and_nan_stays(name: str) -> None:
    x = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4])
    for result in value_and_derivative(name, x):
        assert result.dtype == torch.float32
        assert result.isfinite().all()
    assert value_and_derivative(name, torch.tensor([float("nan")]))[0].isnan().all()


@pytest.mark.parametrize("dictionary", [*DICTIONARIES.values(), tuple(ACTIVATIONS), ("selu", "leaky_relu", "relu3")])
def test_a_dictionary_of_terms_is_the_sum_of_its_activations(dictionary: tuple[str, ...]) -> None:
    """Value, derivative and what stands for coefficients' gradients, in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(len(dictionary), generator=generator, dtype=torch.float64, requires_grad=True)
    right = sum(c[k] * DEFINITIONS[name](x) for k, name in enumerate(dictionary))
    weights = torch.randn(50, generator=generator, dtype=torch.float64)
    slope, gradient = torch.autograd.grad(right, (x, c), weights)
    basis = lower(dictionary)
    with torch.no_grad():
        value, derivative = lowering.value_and_derivative(x, lowering.lowered(c, basis), basis)
        sums = [(weights * term).sum() for term in lowering.terms(x, basis)]
        close = {"rtol": 1e-5, "atol": 1e-6}  # Phi and the exponentials are float32's
        torch.testing.assert_close(value, right, **close)
        torch.testing.assert_close(weights * derivative, slope, **close)
        torch.testing.assert_close(torch.stack(lowering.raised(sums, basis)), gradient, **close)


def test_a_dictionary_has_no_more_terms_than_activations() -> None:
    """Checks that lowering never costs: no dictionary gets more terms than it has activations.

    The default dictionaries even lose one, since relu and leaky_relu share theirs.
    """
    for form, dictionary in DICTIONARIES.items():
        terms = len(lower(dictionary).matrix[0])
        assert terms == len(dictionary) - (form in ("one-sided", "bi-sided")), form
