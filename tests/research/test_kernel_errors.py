"""Derives the limits of kernel_errors.py from what an H200 was off by (docs/results/h200).

That was with earlier dictionaries and forms: the figures used here are those of gates, of which only the number of
coefficients counts (49 of the quadratic form, 7 of the one-sided one), and of type1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.benchmarks import kernel_errors
from tests.support.training import ROOT


def measured(arm: str, dtype: str) -> dict[str, Any]:
    """What the check of the Triton kernels found furthest off."""
    lines = (ROOT / "docs/results/h200/results.jsonl").read_text().splitlines()
    (record,) = (r for r in map(json.loads, lines) if (r["arm"], r.get("dtype")) == (f"{arm} triton", dtype))
    return record


# Sums over h of a gate.


def _cut_off(x: Tensor, bits: Tensor | int) -> Tensor:
    """Float64 numbers cut off, towards zero, below 2^-bits."""
    return torch.ldexp(torch.ldexp(x, bits).trunc(), -bits)


def as_tensor_cores(x: Tensor, weight: Tensor) -> Tensor:
    """Adds up x weight' as tensor cores do: 8 exact products and the sum so far at a time.

    Each of these is cut off 2 bits below the last bit that float32 has of the largest of them, and their sum is cut off
    to float32.
    """
    x, weight = x.double(), weight.double()
    total = x.new_zeros(len(x), len(weight))
    for start in range(0, x.shape[1], 8):
        terms = x[:, None, start : start + 8] * weight[None, :, start : start + 8]
        terms = torch.cat((terms, total[..., None]), dim=-1)
        total = _cut_off(terms, 26 - torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent).sum(-1)
        total = _cut_off(total, 24 - torch.frexp(total).exponent)
    return total.float()


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """x weight' in float32, one product after the other, each rounded with its addition."""
    total = torch.zeros(len(x), len(weight))
    for column, row in zip(x.double().T, weight.double().T, strict=True):
        total = (total.double() + column[:, None] * row).float()
    return total


def error_of_gates(
    psi: Callable[[Tensor], Tensor],
    n: int,
    dtype: torch.dtype,
    add: Callable[[Tensor, Tensor], Tensor],
    tokens: int,
    h: int,
    groups: int,
) -> float:
    """Returns the relative error of gates on check_gate's numbers, the logits added up by ``add``.

    Of ``groups``, if any, the first and last have rows.
    """
    random = kernel_errors._Random(dtype, "cpu", 1)
    shape = (groups, n) if groups else (1, n)
    x = random.normal(tokens, h).detach()
    weight = random.normal(*shape, h, std=h**-0.5).detach()
    parts = [(x, weight[0])]
    if groups:
        parts = [(x[: tokens // 3], weight[0]), (x[tokens // 3 :], weight[-1])]

    def gates(logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([psi(logits(*part)) for part in parts])

    return kernel_errors._relative_error(gates(add), gates(lambda x, weight: x.double() @ weight.double().T))


@pytest.mark.parametrize(
    ("form", "n", "gate", "dtype", "add", "groups"),
    [
        pytest.param("quadratic", 49, "softmax", torch.bfloat16, as_tensor_cores, 5, marks=pytest.mark.slow),
        ("one-sided", 7, "tanh", torch.float16, as_tensor_cores, 5),
        ("type1", 6, "tanh", torch.float16, as_tensor_cores, 0),
        ("quadratic", 49, "softmax", torch.float32, one_by_one, 5),
    ],
)
def test_a_gate_is_off_by_what_its_sum_explains(
    form: str, n: int, gate: str, dtype: torch.dtype, add: Callable[..., Tensor], groups: int
) -> None:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    record = measured(f"moa {form}", names[dtype])
    assert record["worst"].startswith(f"gate {gate} {form} ")
    # In float64 and rounded once: PyTorch's own float32 exponentials differ from one kind of CPU to another.
    psi = {"softmax": lambda logits: logits.double().softmax(-1).to(logits.dtype), "tanh": torch.tanh}[gate]
    assert error_of_gates(psi, n, dtype, add, 128, 512, groups) == pytest.approx(record["error"], rel=1e-3)
    mixture = MixtureConfig(gate=gate, backend="triton")
    elsewhere, on_a_gpu = (
        kernel_errors.FLOORS[torch.float32] + kernel_errors._sum_floor(mixture, dtype, device, 512)
        for device in ("cpu", "cuda")
    )
    found = kernel_errors.Accuracy("result", record["error"], record["same_dtype_error"], elsewhere)
    assert not found.ok
    found = dataclasses.replace(found, floor=on_a_gpu)
    assert found.ok
    assert found.limit < 2 * found.error  # no more room than needed


# A bias' gradient.


def test_a_bias_gradient_adds_up_rounded_gradients() -> None:
    """Checks that a bias gets the sum of rounded gradients, as from a linear layer.

    The kernels round z's gradient to its dtype before the sum.
    """
    record = measured("moa type1", "bf16")
    assert record["worst"].endswith(" [128, 1024] triton bias")
    mixture = MixtureConfig(form="type1", activations=tuple(record["activations"]), backend="eager")
    checks = kernel_errors.check_mixture(mixture, torch.bfloat16, "cpu", tokens=128, width=1024, bias=True, scale=True)
    (bias,) = (check for check in checks if check.name.endswith(" bias"))
    assert bias.error == pytest.approx(record["same_dtype_error"], rel=1e-3)  # the reference rounds the sum alone
    assert bias.same_dtype_error == pytest.approx(record["error"], rel=1e-3)
    assert record["error"] < bias.limit


def test_few_tokens_sum_to_less_than_they_round() -> None:
    """As where tests/test_gpu.py failed while kernels were held to a sum of gradients that nobody rounds."""
    mixture = MixtureConfig(kind="la", form="bi-sided", backend="eager")
    checks = kernel_errors.check_mixture(
        mixture, torch.bfloat16, "cpu", tokens=3, width=127, bias=True, scale=True, seed=3
    )
    (bias,) = (check for check in checks if check.name.endswith(" bias"))
    assert bias.same_dtype_error > kernel_errors.ALLOWED * bias.error + kernel_errors.FLOORS[torch.bfloat16]
