"""Trains small models, whose gates are then analysed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hf.test_convert_to_hf import EAGER
from tests.support import launch
from tests.support.datasets import make_dataset
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import MOE, ROOT, SWIGLU, TINY

GROUPED = [*MOE, "--moe-grouped-gemm"]


MODELS = {
    "dense": [*SWIGLU, *"--moa-mixing moa --moa-activations silu tanh".split(), *EAGER],
    "moe": [*SWIGLU, *GROUPED, *"--moa-mixing moa --moa-form one-sided --moa-activations silu relu2".split(), *EAGER]
    + ["--seed", "5"],  # whose gates differ between experts, each by more than a hundredth of its variance
    "stock": [*SWIGLU, "--moa-mixing", "none"],
}


CONTINUED = [
    {"way": way, "seed": seed, "loss": loss + seed / 10 + odd * seed, "iterations": 100, "tokens": 5000, "lr": 1e-3}
    for way, loss, odd in (("gates", 3.0, 0.0), ("frozen", 3.001, -0.001), ("la", 3.02, 0.001))
    for seed in (1, 2, 3)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of :data:`MODELS` after two steps, a tokenizer, a text of documents, and a dataset."""
    folder = tmp_path_factory.mktemp("gates")
    train_sentencepiece(folder / "tok.model")
    for name, flags in MODELS.items():
        tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tok.model"))
        steps = "--init-method-std 0.3 --train-iters 2 --save-interval 2 --save".split()
        flags = [*TINY, *flags, *tokenizer, *steps, str(folder / name)]
        code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, folder)
        assert code == 0, log[-3000:]
    texts = (ROOT / "megatron_moa/mixture/reference.py").read_text().split("\n\n")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "continued.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CONTINUED))
    make_dataset(folder / "corpus", [80] * 120, highest=40)
    return folder
