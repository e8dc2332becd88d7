"""tools/preprocess_data.py: exact documents whatever the workers, and what it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import sentencepiece

from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.data import dataset, dataset_writer, pieces, tokenizers
from tests.support.datasets import (
    ENVIRONMENT,
    TEXTS,
    command,
    documents,
    one_line,
    preprocess,
    write_json_lines,
)

# The test process has other threads by then; a tool that was just started has none.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_documents_are_read_back_by_megatron(corpus: Path, model: str, tmp_path: Path, capsys: object) -> None:
    preprocess(model, tmp_path / "data", "--input", corpus, "--glob", "**/*.py", "--workers", "2")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    paths = sorted(corpus.rglob("*.py"), key=lambda path: path.relative_to(corpus).as_posix())
    expected = [processor.encode(path.read_bytes().decode()) + [2] for path in paths if path.stat().st_size]
    assert documents(tmp_path / "data") == expected
    printed = capsys.readouterr().out
    assert f"documents      {len(expected):,}\n" in printed
    assert f"tokens         {sum(map(len, expected)):,}\n" in printed
    assert "empty, skipped 1\n" in printed
    size = sum(path.stat().st_size for path in paths)
    assert f"packing        {size / sum(map(len, expected)):.2f} bytes per token\n" in printed
    assert (
        f"--data-path {tmp_path / 'data'} --tokenizer-type SentencePieceTokenizer --tokenizer-model {model}" in printed
    )
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]
    header = (tmp_path / "data.idx").read_bytes()[:18]
    assert header[17] == 8  # uint16, which 700 tokens fit


def test_speed_is_printed(corpus: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(model, tmp_path / "d", "--input", corpus, "--glob", "**/*.py", "--workers", 2)
    line = (
        r"speed +([\d.]+) MB/s of text, [\d.]+ million tokens/s; ([\d.]+) MB/s per process, 2 busy (\d+)% of the time"
    )
    total, each, busy = map(float, re.search(line, capsys.readouterr().out).groups())
    assert each == pytest.approx(total / 2, abs=0.1)
    assert 0 < busy <= 100


def test_gpt_dataset_draws_the_same_tokens(corpus: Path, model: str, tmp_path: Path) -> None:
    """Follows a text to training samples: Megatron's GPTDataset yields pieces of it, labels moved by one."""
    preprocess(model, tmp_path / "data", "--input", corpus, "--glob", "**/*.py")
    dataset.check_dataset(str(tmp_path / "data"), 64, "80,20,0", needs_validation=True)
    with quiet_imports():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    tokenizer = tokenizers.build_tokenizer(
        SimpleNamespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([str(tmp_path / "data")], None),
        split="80,20,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 0], lambda: True, config).build()
    stream = [token for document in documents(tmp_path / "data") for token in document]
    windows = {tuple(stream[i : i + 16]) for i in range(len(stream))}
    for sample in (train[0], train[49], validation[0]):
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["tokens"].shape == (64,)
        assert tuple(sample["tokens"][:16].tolist()) in windows or 2 in sample["tokens"][:16]
        assert sample["loss_mask"].all()


def test_workers_do_not_change_the_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = write_json_lines(tmp_path, 300)
    monkeypatch.setattr(pieces, "TASK_BYTES", 5000)  # many ranges, whose bounds fall inside lines
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3))]
    preprocess(model, tmp_path / "one", *inputs, "--workers", 1)
    preprocess(model, tmp_path / "three", *inputs, "--workers", 3)
    assert f"empty, skipped {kept.count('')}\n" in capsys.readouterr().out
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"three{ending}").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert documents(tmp_path / "one") == [processor.encode(text) + [2] for text in kept if text]


def test_shuffled_documents_are_the_same_documents(model: str, tmp_path: Path) -> None:
    write_json_lines(tmp_path, 50)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--no-append-eod"]
    preprocess(model, tmp_path / "ordered", *inputs)
    preprocess(model, tmp_path / "a", *inputs, "--shuffle-documents", 7, "--workers", 1)
    preprocess(model, tmp_path / "b", *inputs, "--shuffle-documents", 7, "--workers", 2)
    preprocess(model, tmp_path / "c", *inputs, "--shuffle-documents", 8)
    ordered, shuffled = documents(tmp_path / "ordered"), documents(tmp_path / "a")
    assert shuffled == documents(tmp_path / "b") != documents(tmp_path / "c")
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)
    assert not any(2 in document for document in ordered)
    assert [name for name in os.listdir(tmp_path) if "tmp" in name] == []


def test_index_is_megatrons(tmp_path: Path) -> None:
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    lengths = numpy.array([3, 1, 70_000, 2], dtype=numpy.int32)
    for dtype in (numpy.uint16, numpy.int32):
        builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
        for length in lengths:
            builder.add_document(numpy.ones(length, dtype), [length])
        builder.finalize(str(tmp_path / "a.idx"))
        dataset_writer.write_index(str(tmp_path / "b.idx"), dtype, lengths)
        assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_huggingface_folder(huggingface: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    folder = str(huggingface / "with_eos")
    preprocess(folder, tmp_path / "data", "--input", tmp_path, "--glob", "*.txt", "--workers", "2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = documents(tmp_path / "data")
    assert found == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == TEXTS


def test_special_tokens_in_a_text_are_told(
    huggingface: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks that special tokens written out in a text are reported where they are read as such.

    A Hugging Face tokenizer reads them as such, unless it is told otherwise; a sentencepiece model never does.
    """
    rows = ["one <|end|> two", "<|end|><|end|>", "three </s>", "four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    folder = tmp_path / "tokenizer"
    shutil.copytree(huggingface / "with_eos", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    found = {}
    for split in (False, True):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": split}))
        for workers in ("1", "2"):
            capsys.readouterr()
            preprocess(
                str(folder), tmp_path / "d", "--input", tmp_path / "a.jsonl", "--workers", workers, "--overwrite"
            )
            found[split, workers] = [document.count(0) for document in documents(tmp_path / "d")]  # <|end|> is 0
            printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("special tokens")]
            assert len(printed) == (not split)
            assert split or printed[0].startswith("special tokens 3 were written out in the texts (<|end|>) and read ")
    assert found[False, "1"] == found[False, "2"] == [2, 2, 1, 1]  # a document that ends with it gets no second one
    assert found[True, "1"] == found[True, "2"] == [1, 1, 1, 1]
    (tmp_path / "a.jsonl").write_text('{"text": "one </s> two"}\n')
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.jsonl", "--overwrite")
    assert documents(tmp_path / "d")[0].count(2) == 1
    assert "special tokens" not in capsys.readouterr().out


def word_tokenizer(folder: Path, words: Sequence[str], kind: str = "WordLevel", **settings: object) -> str:
    """Writes a Hugging Face tokenizer of some words, with a first token before each text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *words])}
    model = models.WordLevel(vocabulary, unk_token="<unk>") if kind == "WordLevel" else models.BPE(vocabulary, [])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    return str(folder)


def test_unknown_and_empty_texts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    warned: list[object] = []
    monkeypatch.setattr(transformers.tokenization_utils_base.logger, "warning", lambda *text: warned.append(text))
    rows = ["one two three", "one <unk> four", "  ", "two two two two two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    flags = ["--input", tmp_path / "a.jsonl", "--workers", "1"]
    words = ["<unk>", "one", "two"]
    model = word_tokenizer(tmp_path / "words", words, unk_token="<unk>", model_max_length=4)
    preprocess(model, tmp_path / "d", *flags)
    assert documents(tmp_path / "d") == [[0, 3, 4, 2, 1], [0, 3, 2, 2, 1], [0, 4, 4, 4, 4, 4, 1]]
    printed = capsys.readouterr().out
    assert "empty, skipped 1\n" in printed
    assert "special tokens 1 were written out in the texts (<unk>)" in printed
    assert "unknown tokens 2 stand for text that the tokenizer has no token for" in printed  # three, four
    assert "leaves out characters" not in printed
    assert not warned
    preprocess(word_tokenizer(tmp_path / "letters", "one", "BPE"), tmp_path / "e", *flags)
    assert documents(tmp_path / "e")[0] == [0, 2, 3, 4, 2, 4, 4, 1]  # one o ee
    assert "note           the tokenizer leaves out characters" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_tokenizer_that_fails_on_a_text_is_one_line(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one three")
    model = word_tokenizer(tmp_path / "words", ["one", "x", "y"])  # Megatron tries it on x and y
    flags = ["--input", tmp_path / "a.txt", "--workers", workers]
    line = one_line(capsys, preprocess, model, tmp_path / "d", *flags)
    assert f"--tokenizer-model {model}: cannot tokenize a text of {tmp_path}/a.txt (" in line


def test_overwrite_replaces_both_and_drops_the_stale_index_cache(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second text")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt")
    cache = tmp_path / "d" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    preprocess(model, tmp_path / "d", "--input", tmp_path / "b.txt", "--overwrite")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert documents(tmp_path / "d") == [processor.encode("second text") + [2]]
    assert not cache.exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    """Both tools as a user starts them: nothing of Megatron's import noise, one line for a mistake."""
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 50)
    train = command("train_tokenizer", "--input", "a.txt", "--output", "tok", "--vocab-size", 300)
    done = subprocess.run(train, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tok.model", "--output-prefix", "d"]
    made = command("preprocess_data", "--input", "a.txt", *flags)
    done = subprocess.run(made, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (
        "use it with    --data-path d --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model"
        in done.stdout
    )
    done = subprocess.run(made, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    expected = "preprocess_data.py: error: --output-prefix d: d.bin exists; choose another name or add --overwrite\n"
    assert done.stderr == expected
