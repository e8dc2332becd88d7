"""Each activation's value against its formula, each derivative against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType

import pytest
import torch

from megatron_moa.mixture import lowering
from megatron_moa.mixture.activations import ACTIVATIONS, LEAKY_RELU_SLOPE
from megatron_moa.mixture.config import ACTIVATION_NAMES, DICTIONARIES
from megatron_moa.mixture.cpu_functions import on_cpu
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


def as_written(function: FunctionType) -> FunctionType:
    return function


BOTH = pytest.mark.parametrize("functions", [as_written, on_cpu])
Functions = Callable[[FunctionType], FunctionType]


def value_and_derivative(name: str, x: torch.Tensor, functions: Functions = as_written) -> list[torch.Tensor]:
    basis = lower((name,)).with_functions(functions)
    return [part + torch.zeros_like(x) for part in lowering.value_and_derivative(x, basis.matrix[0], basis)]


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs() / (1 + expected.abs())).max().item()


@BOTH
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative_are_the_definition_s(name: str, functions: Functions) -> None:
    x = torch.cat([POINTS, torch.zeros(1, dtype=torch.float64)]).float()
    exact = x.double().requires_grad_()
    value = DEFINITIONS[name](exact)
    # Plus zero times x: a constant has no graph of its own.
    (derivative,) = torch.autograd.grad((value + 0 * exact).sum(), exact)
    for actual, expected in zip(value_and_derivative(name, x, functions), (value.detach(), derivative), strict=True):
        assert _error(actual, expected) < TOLERANCE


def test_exact_gelu_is_exact_to_bf16_rounding_in_the_tail() -> None:
    """Bounds the relative error of gelu, which counts where Phi(x) is tiny.

    The error stays below a hundredth of bfloat16's rounding down to x = -12.
    """
    x = torch.linspace(-12, 0, 2001)
    exact = x.double() * 0.5 * torch.erfc(-x.double() / math.sqrt(2))
    relative = ((value_and_derivative("gelu", x)[0].double() - exact) / exact)[:-1].abs().max().item()
    assert relative < 1.5e-4


def test_on_cpus_gelu_is_exact_to_bf16_rounding_as_far_as_float32_shows_it() -> None:
    """Down to x = -5; beyond, gelu is less than 2e-6, and as far off as a millionth of that."""
    x = torch.linspace(-12, 0, 2001)
    exact = x.double() * 0.5 * torch.erfc(-x.double() / math.sqrt(2))
    error = (value_and_derivative("gelu", x, on_cpu)[0].double() - exact).abs()
    near = x >= -5
    assert (error / exact.abs())[near][:-1].max() < 1.5e-4
    assert error[~near].max() < 5e-10


@BOTH
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_inputs_stay_finite_and_nan_stays(name: str, functions: Functions) -> None:
    x = torch.tensor([-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4])
    exact = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(DEFINITIONS[name](exact).sum() + 0 * exact.sum(), exact)
    for result, right in zip(value_and_derivative(name, x, functions), (DEFINITIONS[name](exact), slope), strict=True):
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        torch.testing.assert_close(result, right.float(), rtol=1e-6, atol=TOLERANCE)
    assert value_and_derivative(name, torch.tensor([float("nan")]), functions)[0].isnan().all()


@BOTH
@pytest.mark.parametrize("dictionary", [*DICTIONARIES.values(), tuple(ACTIVATIONS), ("selu", "leaky_relu", "relu3")])
def test_a_dictionary_of_terms_is_the_sum_of_its_activations(dictionary: tuple[str, ...], functions: Functions) -> None:
    """Value, derivative and what stands for coefficients' gradients, in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    c = torch.randn(len(dictionary), generator=generator, dtype=torch.float64, requires_grad=True)
    right = sum(c[k] * DEFINITIONS[name](x) for k, name in enumerate(dictionary))
    weights = torch.randn(50, generator=generator, dtype=torch.float64)
    slope, gradient = torch.autograd.grad(right, (x, c), weights)
    basis = lower(dictionary).with_functions(functions)
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
