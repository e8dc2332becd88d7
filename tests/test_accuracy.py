"""Where the limits of megatron_moa.accuracy come from: what an H200 was off by (docs/results/h200), computed here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moa import accuracy, reference
from megatron_moa.config import MixingConfig
from tests.training import ROOT


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
    """x weight': 8 exact products and the sum so far at a time, each cut off 2 bits below the last that float32 has of
    the largest of them, and their sum to float32."""
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
    mixing: MixingConfig, dtype: torch.dtype, add: Callable[[Tensor, Tensor], Tensor], tokens: int, h: int, groups: int
) -> float:
    """On check_gate's numbers, the logits added up by ``add``; of ``groups``, if any, the first and last have rows."""
    random = accuracy._Random(dtype, "cpu", 1)
    shape = (groups, mixing.num_coefficients) if groups else (1, mixing.num_coefficients)
    x = random.normal(tokens, h).detach()
    weight = random.normal(*shape, h, std=h**-0.5).detach()
    parts = [(x, weight[0])]
    if groups:
        parts = [(x[: tokens // 3], weight[0]), (x[tokens // 3 :], weight[-1])]

    def gates(logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([reference.gate(logits(*part), mixing) for part in parts])

    return accuracy._relative_error(gates(add), gates(lambda x, weight: x.double() @ weight.double().T))


@pytest.mark.parametrize(
    ("form", "gate", "dtype", "add", "groups", "exactness"),
    [
        pytest.param("quadratic", "softmax", torch.bfloat16, as_tensor_cores, 5, 1e-3, marks=pytest.mark.slow),
        ("one-sided", "tanh", torch.float16, as_tensor_cores, 5, 1e-3),
        ("type1", "tanh", torch.float16, as_tensor_cores, 0, 1e-3),
        ("quadratic", "softmax", torch.float32, one_by_one, 5, 0.1),  # the GPU's exponentials are other ones
    ],
)
def test_a_gate_is_off_by_what_its_sum_explains(
    form: str, gate: str, dtype: torch.dtype, add: Callable[..., Tensor], groups: int, exactness: float
) -> None:
    mixing = MixingConfig(form=form, gate=gate, backend="triton")
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    record = measured(f"moa {form}", names[dtype])
    assert record["worst"].startswith(f"gate {gate} {form} ")
    assert error_of_gates(mixing, dtype, add, 128, 512, groups) == pytest.approx(record["error"], rel=exactness)
    elsewhere, on_a_gpu = (
        accuracy.FLOORS[torch.float32] + accuracy._sum_floor(mixing, dtype, device, 512) for device in ("cpu", "cuda")
    )
    found = accuracy.Accuracy("result", record["error"], record["same_dtype_error"], elsewhere)
    assert not found.ok
    found = dataclasses.replace(found, floor=on_a_gpu)
    assert found.ok
    assert found.limit < 2 * found.error  # no more room than needed


# A bias' gradient.


@pytest.mark.parametrize(
    ("mixing_name", "form", "dtype"),
    [
        ("moa", "one-sided", "bf16"),
        ("moa", "type1", "bf16"),
        pytest.param("moa", "quadratic", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_bias_gradient_adds_up_rounded_gradients(mixing_name: str, form: str, dtype: str) -> None:
    """The kernels round z's gradient to its dtype, and the bias gets the sum of that, as from a linear layer."""
    record = measured(f"{mixing_name} {form}", dtype)
    assert record["worst"].endswith(" [128, 1024] triton bias")
    mixing = MixingConfig(mixing=mixing_name, form=form, backend="eager")
    own = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    checks = accuracy.check_mixture(mixing, own, "cpu", tokens=128, width=1024, bias=True, scale=True)
    (bias,) = (check for check in checks if check.name.endswith(" bias"))
    assert bias.error == pytest.approx(record["same_dtype_error"], rel=1e-3)  # the reference rounds the sum alone
    assert bias.same_dtype_error == pytest.approx(record["error"], rel=1e-3)
    assert record["error"] < bias.limit


def test_few_tokens_sum_to_less_than_they_round() -> None:
    """The case in which tests/test_gpu.py failed while kernels were held to a sum of gradients that nobody rounds."""
    mixing = MixingConfig(mixing="la", form="quadratic", backend="eager")
    checks = accuracy.check_mixture(mixing, torch.bfloat16, "cpu", tokens=3, width=127, bias=True, scale=True)
    (bias,) = (check for check in checks if check.name.endswith(" bias"))
    assert bias.same_dtype_error > accuracy.ALLOWED * bias.error + accuracy.FLOORS[torch.bfloat16]
