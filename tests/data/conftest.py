"""Makes a corpus, a sentencepiece model and Hugging Face tokenizers, once a process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.datasets import ROOT, TEXTS
from tools import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python files, the package's own, and one empty file."""
    folder = tmp_path_factory.mktemp("corpus")
    for i, path in enumerate(sorted((ROOT / "megatron_moa").rglob("*.py")) + [Path(json.__file__), Path(os.__file__)]):
        (folder / f"sub{i % 2}").mkdir(exist_ok=True)
        (folder / f"sub{i % 2}" / f"{i:03}_{path.name}").write_bytes(path.read_bytes())
    (folder / "sub0" / "empty.py").touch()
    (folder / "notes.txt").write_text("not Python")
    return folder


@pytest.fixture(scope="session")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tok"
    arguments = ["--input", str(corpus), "--glob", "**/*.py", "--output", str(prefix), "--vocab-size", "700"]
    train_tokenizer.main(arguments)
    return f"{prefix}.model"


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer folder, made without a network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "with_eos")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "without_eos")
    return folder
