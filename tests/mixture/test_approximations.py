"""Tests what stands in for activations where bfloat16 goes in.

Errors are below bfloat16's own, at the instructions' worst.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_moa.mixture import approximations, lowering
from megatron_moa.mixture.approximations import APPROXIMATIONS
from megatron_moa.mixture.config import DICTIONARIES
from megatron_moa.mixture.lowering import Basis, lower

ULP = 2.0**-7  # of bfloat16, relative to the number, at most
F = 4096


def rounded(x: Tensor) -> Tensor:
    """To 11 bits, nearest: what tanh.approx.f32 typically gives."""
    mantissa, exponent = torch.frexp(torch.tanh(x.double()))
    return torch.ldexp(torch.round(mantissa * 2.0**11) / 2.0**11, exponent).float()


# PTX's manual: a relative error of at most 2^-11.
INSTRUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "typical": rounded,
    "too large": lambda x: (torch.tanh(x.double()) * (1 + 2.0**-11)).float(),
    "too small": lambda x: (torch.tanh(x.double()) * (1 - 2.0**-11)).float(),
}


@pytest.fixture(params=INSTRUCTIONS)
def instruction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(approximations, "coarse_tanh", INSTRUCTIONS[request.param])
    return request.param


def approximated(basis: Basis) -> Basis:
    """With the functions that kernels take for bfloat16."""
    return basis.with_functions(lambda function: APPROXIMATIONS.get(function, function))


def numbers(rows: int, std: float, seed: int) -> Tensor:
    return std * torch.randn(rows, F, generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor) -> Tensor:
    return x.double().norm()


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("form", DICTIONARIES)
def test_added_error_is_a_fraction_of_bfloat16_s_rounding(instruction: str, form: str, std: float) -> None:
    basis = lower(DICTIONARIES[form])
    x = numbers(16, std, 1).bfloat16().float()
    c = [torch.rand(16, 1, generator=torch.Generator().manual_seed(k)) for k in range(len(DICTIONARIES[form]))]
    exact = lowering.value_and_derivative(x.double(), lowering.lowered([k.double() for k in c], basis), basis)
    actual = lowering.value_and_derivative(x, lowering.lowered(c, basis), approximated(basis))
    for right, found in zip(exact, actual, strict=True):
        rounding = norm(right.bfloat16().double() - right)
        assert norm(found.double() - right) < 0.1 * rounding
        large = right.abs() > right.square().mean().sqrt() / 10
        worst = ((found.double() - right) / right)[large].abs().max()
        assert worst < ULP


@pytest.mark.parametrize("form", DICTIONARIES)
def test_gradients_of_coefficients_lose_less_than_by_rounding_what_came_in(instruction: str, form: str) -> None:
    """Shows why gradients of coefficients may have a floor of 2^-9 (kernel_errors.py).

    The upstream gradient was rounded to bfloat16 before.
    """
    basis = lower(DICTIONARIES[form])
    x = numbers(8, 1.0, 2).bfloat16().float()
    wide = numbers(8, 1.0, 3).double()
    came_in = wide.bfloat16().double()

    def gradients(g: Tensor, x: Tensor, basis: Basis) -> Tensor:
        return torch.stack(lowering.raised([(g * term).sum(-1) for term in lowering.terms(x, basis)], basis))

    right = gradients(came_in, x.double(), basis)
    approximate = gradients(came_in, x, approximated(basis)) - right
    rounding = gradients(wide, x.double(), basis) - right
    assert norm(approximate) < norm(rounding)
    assert approximate.abs().max() / right.abs().max() < 2.0**-9


def test_far_out_they_are_what_the_functions_are() -> None:
    x = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    for function, other in APPROXIMATIONS.items():
        torch.testing.assert_close(other(x), function(x), rtol=0, atol=2e-7)
        assert other(torch.tensor([torch.nan])).isnan().all()
