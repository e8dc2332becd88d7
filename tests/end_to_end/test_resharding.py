"""A checkpoint loads under another split, goes on, and comes back.

A tour starts on one process and hands its checkpoint from split to split, each going on for two steps. At every
leg's start all parameters are those the last leg ended with, bit for bit, and its losses are those of one process that
was never stopped: with an optimizer's state lost or mixed up they would not be.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moa.research.compare_runs import assemble
from tests.support.training import FORM_ARMS, MOE, SWIGLU, TWO_KINDS, record, recorded

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]  # a tour has up to nine runs

LEG = 2  # steps
TOLERANCE = 1e-5  # relative

_BASE = (
    "--num-layers 4 --num-query-groups 4 --micro-batch-size 1 --moa-backend eager --ckpt-format torch_dist "
    f"--exit-interval {LEG} --save-interval 100 --train-iters"
)
_TP2 = "--tensor-model-parallel-size 2"
_EP2 = "--expert-model-parallel-size 2"
SPLITS = {
    "one": (1, ""),
    "tp2-sp": (2, f"{_TP2} --sequence-parallel"),
    "tp4": (4, "--tensor-model-parallel-size 4"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2": (2, ""),
    "tp2-pp2": (4, f"{_TP2} --pipeline-model-parallel-size 2"),
    "pp2-virtual": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "ep2": (2, _EP2),
    "ep4": (4, "--expert-model-parallel-size 4"),
    "tp2-ep2": (4, f"{_TP2} --sequence-parallel {_EP2}"),
    "tp2-ep2-etp1": (2, f"{_TP2} --sequence-parallel {_EP2} --expert-tensor-parallel-size 1"),
    "ep2-etp2": (4, f"{_EP2} --expert-tensor-parallel-size 2"),
    "pp2-ep2": (4, f"--pipeline-model-parallel-size 2 {_EP2}"),
}
DENSE = ("one", "tp2-sp", "pp2", "tp4", "dp2", "one")
DENSE_FURTHER = ("one", "tp2-pp2", "tp2-sp", "pp2-virtual", "one", "dp2", "tp4", "one")
EXPERTS = ("one", "ep2", "tp2-ep2", "one")
EXPERTS_FURTHER = ("one", "ep4", "ep2", "one", "pp2-ep2", "tp2-sp", "ep2-etp2", "one")

TWO_RANKS = ("one", "tp2-ep2-etp1", "pp2", "one")

_MOA = "--moa-mixing moa --moa-form bi-sided --moa-gate-bias --moa-amplitude learned"
_LA = "--moa-mixing la --moa-form quadratic"
_MOE = " ".join([*MOE, "--moe-shared-expert-intermediate-size 32"])
_RESHARDABLE = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
_MUON = "--optimizer muon --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16"
full = pytest.mark.full


@pytest.mark.parametrize(
    ("flags", "tour"),
    [
        pytest.param(_MOA, DENSE, id="dense-moa", marks=full),
        pytest.param(_LA, DENSE_FURTHER, id="dense-la", marks=full),
        pytest.param("--moa-mixing none --moa-backend auto", DENSE, id="dense-stock", marks=full),
        pytest.param(f"{_MOA} {_RESHARDABLE}", DENSE_FURTHER, id="dense-moa-distopt", marks=full),
        pytest.param(f"{_LA} {_RESHARDABLE} --bf16", ("one", "dp2", "tp2-sp", "one"), id="dense-la-bf16", marks=full),
        *(
            pytest.param(
                f"{' '.join(TWO_KINDS)} {FORM_ARMS[arm]} {further}",
                TWO_RANKS,
                id=f"two-kinds-{arm}",
                marks=() if arm == "quadratic-la" else full,
            )
            for arm, further in zip(FORM_ARMS, ("", _RESHARDABLE, _RESHARDABLE, ""), strict=True)
        ),
        pytest.param(f"{_LA} {_MOE}", EXPERTS, id="moe-la", marks=full),
        pytest.param(f"{_MOA} {_MOE}", EXPERTS_FURTHER, id="moe-moa", marks=full),
        pytest.param(f"{_MOA} {_MOE} {_RESHARDABLE}", EXPERTS, id="moe-moa-distopt", marks=full),
        pytest.param(f"{_LA} {_MOE} {_RESHARDABLE}", EXPERTS_FURTHER, id="moe-la-distopt", marks=full),
        pytest.param(f"{_MOA} {_MOE} --bf16", EXPERTS, id="moe-moa-bf16", marks=full),
        # Without its state the loss after a step differs by one per cent, five times the tolerance.
        pytest.param(f"{_LA} {_MUON}", ("dp2", "tp2-sp", "dp2"), id="dense-la-muon", marks=full),
        pytest.param(f"{_MOA} {_MOE} {_MUON}", ("dp2", "tp2-sp", "pp2", "one"), id="moe-moa-muon", marks=full),
    ],
)
def test_tour(tmp_path: Path, flags: str, tour: tuple[str, ...]) -> None:
    steps = LEG * len(tour)
    base = [*SWIGLU, *_BASE.split(), str(steps), *flags.split()]
    whole = recorded(tmp_path / "whole", *base, "--exit-interval", str(steps))
    expected = {step.iteration: step.losses["lm loss"] for step in whole.steps}
    tolerance = 2e-3 if "--bf16" in flags else TOLERANCE
    saved = None
    for leg, name in enumerate(tour):
        processes, split = SPLITS[name]
        load = [] if saved is None else ["--load", tmp_path / f"saved{leg - 1}"]
        save = ["--save", tmp_path / f"saved{leg}"]
        run = recorded(tmp_path / f"{leg}", *base, *split.split(), *load, *save, processes=processes)
        assert [step.iteration for step in run.steps] == [LEG * leg + 1, LEG * leg + 2]
        for step in run.steps:
            loss = expected[step.iteration]
            assert step.losses["lm loss"] == pytest.approx(loss, rel=tolerance), f"leg {leg}, {name}, step {step}"
        if saved is not None:
            assert {piece.key for piece in run.start} == saved.keys()
            for piece in run.start:
                assert torch.equal(piece.data, piece.of(saved[piece.key])), f"leg {leg}, {name}: {piece.key}"
        saved = assemble(run.end)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("tp2-sp", "--tensor-model-parallel-size 1, not 2"),
        pytest.param("ep2", f"{_EP2[:-1]}1, not 2", marks=pytest.mark.full),
    ],
)
def test_optimizer_state_for_one_split_is_refused_under_another(tmp_path: Path, split: str, expected: str) -> None:
    base = [*SWIGLU, *MOE, *_LA.split(), *_BASE.split(), "4", "--use-distributed-optimizer"]
    saved = tmp_path / "saved"
    record(tmp_path / "one", *base, "--save", saved)
    processes, flags = SPLITS[split]
    arguments = [*base, *flags.split(), "--load", saved]
    refused = record(tmp_path / "refused", *arguments, processes=processes, check=False)
    assert refused.returncode == 2
    assert f"--load {saved}: iteration 2 has the optimizer's state for {expected}" in refused.log
    assert "--dist-ckpt-optim-fully-reshardable" in refused.log
    record(tmp_path / "weights", *arguments, "--no-load-optim", processes=processes)
