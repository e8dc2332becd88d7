"""Each activation's value against PyTorch's own or its formula, each derivative against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_moa.activations import ACTIVATIONS, LEAKY_RELU_SLOPE

FORMULAS = {
    "identity": lambda x: x,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "relu2": lambda x: torch.where(x > 0, x * x, 0.0),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
    "selu": lambda x: F.selu(x),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "relu3": lambda x: torch.where(x > 0, x**3, 0.0),
    "one": lambda x: x * 0 + 1,
}
POINTS = torch.cat([torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor([1e-9, -1e-9]).double()])


def test_every_activation_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)
    assert LEAKY_RELU_SLOPE == 0.01


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_is_the_formula(name: str) -> None:
    torch.testing.assert_close(ACTIVATIONS[name].value(POINTS), FORMULAS[name](POINTS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_what_autograd_gives(name: str) -> None:
    x = torch.cat([POINTS, torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    # Plus zero times x: a constant has no graph of its own.
    (expected,) = torch.autograd.grad((ACTIVATIONS[name].value(x) + 0 * x).sum(), x)
    torch.testing.assert_close(ACTIVATIONS[name].derivative(x.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtype_is_kept_and_large_inputs_stay_finite(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-30.0, -1.0, 0.0, 1.0, 30.0], dtype=dtype)
    for function in (ACTIVATIONS[name].value, ACTIVATIONS[name].derivative):
        assert function(x).dtype == dtype
        assert function(x).isfinite().all()
