"""Tests of the doctor's estimate of which runs are bound by the host."""

from __future__ import annotations

import pytest

from megatron_moa.doctor.examine import check_host
from megatron_moa.doctor.host import judge_host, layer_times


def flags(hidden: int, ffn: int, batch: int, *further: str, sequence: int = 1024) -> list[str]:
    """Of a gated layer in bf16."""
    sizes = ["--hidden-size", hidden, "--num-attention-heads", hidden // 64, "--ffn-hidden-size", ffn]
    sizes += ["--seq-length", sequence, "--micro-batch-size", batch]
    return [*map(str, sizes), "--swiglu", "--bf16", *further]


EXPERTS = ["--num-experts", "32", "--moe-router-topk", "4", "--moe-ffn-hidden-size", "704"]


@pytest.mark.parametrize(
    ("given", "bound"),
    [
        (flags(2048, 8192, 4, sequence=2048), False),
        (flags(768, 3072, 16), True),
        (flags(1024, 2816, 4, *EXPERTS, "--moe-grouped-gemm", sequence=2048), True),
    ],
    ids=["h 2048", "h 768", "small MoE"],
)
def test_models_measured_on_an_h200(given: list[str], bound: bool) -> None:
    assert layer_times(given).is_host_bound == bound


def test_flops_of_a_layer() -> None:
    given = [*flags(2048, 8192, 4, sequence=2048), "--tensor-model-parallel-size", "2"]
    weights = 4 * 2048**2 + 3 * 2048 * 8192
    products = 6 * weights + 6 * 2048 * 2048
    assert layer_times(given).gpu == pytest.approx(products * 8192 / 2 / 600e12)


def test_float32_waits_less() -> None:
    given = [flag for flag in flags(768, 3072, 16) if flag != "--bf16"]
    assert not layer_times(given).is_host_bound


def test_what_helps_is_named() -> None:
    assert "--moe-grouped-gemm" not in judge_host(flags(768, 3072, 16)).remedy
    finding = judge_host(flags(1024, 2816, 4, *EXPERTS, "--tensor-model-parallel-size", "2"))
    assert finding.state == "check"
    assert "GPUs likely wait for Python" in finding.text
    assert "estimate" in finding.text
    for flag in ("--moe-grouped-gemm", "--micro-batch-size", "--tensor-model-parallel-size"):
        assert flag in finding.remedy
    assert "\n" not in finding.text + finding.remedy


def test_the_batch_that_is_named_suffices() -> None:
    finding = judge_host(flags(768, 3072, 16))
    enough = int(finding.remedy.split("from about ")[1].split(",")[0])
    assert not layer_times(flags(768, 3072, enough)).is_host_bound
    assert layer_times(flags(768, 3072, enough - 1)).is_host_bound


def test_flags_without_sizes_are_not_judged() -> None:
    finding = judge_host(["--swiglu"])
    assert (finding.state, finding.text[:13]) == ("ok", "not estimated")


def test_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_host("dense-0.12b").state == "check"
    monkeypatch.setenv("MICRO_BATCH_SIZE", "64")
    assert check_host("dense-0.12b").state == "ok"
