"""hf: the transformers model computes the logits of Megatron's, for every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import hf_models, launch
from tests.support.training import MOE, ROOT, SWIGLU, TINY

EAGER = ["--moa-backend", "eager"]

LA, STOCK = ["--moa-mixing", "la", *EAGER], ["--moa-mixing", "none"]

MOA = ["--moa-mixing", "moa", *EAGER, "--moa-gate-init-std", "0.3"]

SHARED = "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate".split()

SIGMOID = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 "
    "--moe-router-dtype fp32"
).split()

# Replace flags of the tiny model: the last one counts.
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()

WITH_BIASES, TIED = "--disable-bias-linear", "--untie-embeddings-and-output-weights"


CASES: dict[str, list[str]] = {
    "stock": [*SWIGLU, *STOCK],
    "la one-sided": [*SWIGLU, *LA, *"--moa-form one-sided --moa-init 1 .5 .2 .1 .7 .3 .6".split()],
    "la bi-sided": [*SWIGLU, *LA, *"--moa-init 1 .5 .2 .1 .7 .3 .6 1 0 .1 .2 .3 .4 .5".split()],
    "la quadratic": [*SWIGLU, *LA, *"--moa-form quadratic --moa-init 1 .5 .2 .1 .7 .3 .6 1 0 .1".split()],
    "moa bi-sided": [*SWIGLU, *MOA],
    "moa one-sided, softmax, bias": [*SWIGLU, *MOA, *"--moa-form one-sided --moa-gate softmax --moa-gate-bias".split()],
    "moa quadratic, tanh, amplitude": [
        *SWIGLU,
        *MOA,
        *"--moa-form quadratic --moa-gate tanh --moa-amplitude learned".split(),
    ],
    "moa with SwiGLU's scale": [*SWIGLU, *MOA, "--moa-init-scale", "matched"],
    "la type1, GPT-2-like, biases, tied": [*GPT2, *LA],
    "stock, GPT-2-like, biases, tied": [*GPT2, *STOCK],
    "q/k norm, bias of q, k, v, partial rotation": [
        *SWIGLU,
        *MOA,
        *"--qk-layernorm --add-qkv-bias --rotary-percent 0.5".split(),
    ],
    "LLaMA 3's rope": [*SWIGLU, *MOA, *"--use-rope-scaling --rope-scaling-factor 4 --rotary-base 500000".split()],
    "MoE, moa one-sided, shared expert with gate": [*SWIGLU, *MOE, *SHARED, *MOA, "--moe-router-pre-softmax"],
    "MoE, la one-sided, every second layer": [*SWIGLU, *MOE, *LA, "--moe-layer-freq", "2"],
    "MoE, moa quadratic, sigmoid router with bias": [*SWIGLU, *MOE, *SIGMOID, *MOA, "--moa-form", "quadratic"],
    "MoE, stock": [*SWIGLU, *MOE, *SHARED, *STOCK],
}

QUICK = "MoE, la one-sided, every second layer"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case == QUICK else pytest.param(case, marks=pytest.mark.full) for case in CASES]
)
def test_transformers_model_computes_megatrons_logits(case: str, tmp_path: Path) -> None:
    flags = [flag for flag in TINY if not ("biases, tied" in case and flag in (WITH_BIASES, TIED))]
    # Large initial weights, so that a wrong factor or order shows in the logits.
    flags += [*CASES[case], "--init-method-std", "0.3", "--train-iters", "2", "--save-interval", "2"]
    flags += ["--save", str(tmp_path / "checkpoint")]
    code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, tmp_path)
    assert code == 0, log[-1500:]
    results = tmp_path / "results.json"
    code, log = launch.launch(hf_models.compare, (str(tmp_path / "checkpoint"), str(results)), 1, tmp_path)
    assert code == 0, log[-1500:]
    report = json.loads(results.read_text())
    assert report["spread"] > 0.5
    assert report["difference"] < 1e-5
    assert report["round_trip"]
