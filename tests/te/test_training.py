"""Trains with Transformer Engine's layers, alone and split.

Trainings also go on from checkpoints of local layers, and back.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_moa.megatron_fixes import te_guard
from tests.support import launch
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import MOE, ROOT, SWIGLU, TINY, Run, run_script, train

TE, LOCAL = "transformer_engine", "local"
MOA = "--moa-mixing moa --moa-backend eager --moa-gate-init-std 0.3 --moa-gate-bias".split()
SHARED = "--moe-shared-expert-intermediate-size 32".split()
SPLIT = "--tensor-model-parallel-size 2 --sequence-parallel".split()
KINDS = {
    "dense": [*SWIGLU, *MOA],
    "moe": [*SWIGLU, *MOE, *MOA],
    "moe grouped": [*SWIGLU, *MOE, "--moe-grouped-gemm", *SHARED, *MOA],
}


def same(run: Run, other: Run, iterations: tuple[int, ...]) -> None:
    """Losses and gradient norms, which are printed with 7 and 4 digits."""
    for iteration in iterations:
        assert run.losses[iteration] == pytest.approx(other.losses[iteration], rel=2e-6)
        assert run.grad_norms[iteration] == pytest.approx(other.grad_norms[iteration], abs=1.1e-3)


def compute_alike(folder: str) -> None:
    """Checks that a checkpoint computes the same with layers of either kind.

    This is a target of tests.support.launch.
    """
    from megatron_moa.trained.from_megatron import load_model

    found = {}
    for implementation in (TE, LOCAL):
        model = load_model(folder, ["--transformer-impl", implementation])
        with_te = any(type(module).__name__.startswith("TE") for module in model.model.modules())
        assert with_te is (implementation == TE)
        with torch.no_grad():
            found[implementation] = model.forward(torch.arange(12).view(2, 6))
    assert found[TE].std() > 0.1
    torch.testing.assert_close(found[TE], found[LOCAL], rtol=1e-5, atol=1e-5)


def tool(name: str, *flags: str | Path) -> str:
    """What a tool prints."""
    arguments = (str(ROOT / "tools" / name), list(map(str, flags)))
    code, log = launch.launch(launch.script, arguments, 1, ROOT)
    assert code == 0, log[-3000:]
    return log


def test_trains_as_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a process that cannot import it, with torch's Adam, and against local layers beside it."""
    flags = [*KINDS["dense"], "--train-iters", "4"]
    te = train(*flags, "--transformer-impl", TE)
    same(te, train(*flags, "--transformer-impl", LOCAL), (1, 2, 3, 4))
    monkeypatch.setenv(te_guard.ALLOW, "0")
    same(te, run_script("pretrain_gpt_moa.py", [*TINY, *flags], fresh=True), (1, 2, 3, 4))
    assert te.losses[4] < te.losses[1]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [(TE, LOCAL), (LOCAL, TE)])
def test_goes_on_with_layers_of_the_other_kind(kind: str, first: str, second: str, tmp_path: Path) -> None:
    """And split over two processes with Transformer Engine's."""
    folder = tmp_path / "checkpoint"
    flags = [*KINDS[kind], "--train-iters", "4"]
    whole = train(*flags, "--transformer-impl", first, "--save", folder, "--save-interval", "2")
    start = ("--load", folder, "--ckpt-step", "2", "--transformer-impl")
    same(train(*flags, *start, second), whole, (3, 4))
    if first == TE and kind != "moe":
        same(train(*flags, *start, TE, *SPLIT, processes=2), whole, (3, 4))
    code, log = launch.launch(compute_alike, (str(folder),), 1, ROOT)
    assert code == 0, log[-3000:]


@pytest.mark.parametrize("kind", ["moe", "moe grouped"])
def test_experts_are_exported_and_trained_on_after_import(kind: str, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tok.model")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tmp_path / "tok.model"]
    trained, exported, imported = (tmp_path / name for name in ("trained", "exported", "imported"))
    flags = [*KINDS[kind], *tokenizer, "--init-method-std", "0.3", "--transformer-impl", TE]
    train(*flags, "--train-iters", "2", "--save", trained, "--save-interval", "2")
    assert "verified    largest difference" in tool("convert_to_hf.py", "--load", trained, "--out", exported)
    if kind == "moe":
        return
    log = tool("convert_from_hf.py", "--hf", exported, "--out", imported, "--seq-length", "32")
    assert float(re.findall(r"verified +largest difference of logits (\S+) of", log)[0]) < 1e-5
    flags += ["--train-iters", "3", "--no-load-optim", "--no-load-rng", "--finetune"]
    same(train(*flags, "--load", imported), train(*flags, "--load", trained), (1, 2, 3))
