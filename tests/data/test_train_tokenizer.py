"""tools/train_tokenizer.py: every text comes back, the same model again, one-line errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from megatron_moa.data import corpus as reader
from megatron_moa.data import tokenizers
from tests.support.datasets import (
    TEXTS,
    one_line,
)
from tools import train_tokenizer


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_every_text_comes_back_byte_for_byte(model_type: str, corpus: Path, tmp_path: Path) -> None:
    train_tokenizer.main(
        ["--input", str(corpus), "--glob", "**/*.py", "--output", str(tmp_path / "tok"), "--vocab-size", "600"]
        + ["--model-type", model_type]
    )
    tokenizer = tokenizers.build_tokenizer(
        SimpleNamespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "tok.model"))
    )
    for text in TEXTS + [path.read_text() for path in corpus.rglob("*.py")]:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.vocab_size == 600
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.unk) == (2, 1, 3, 0)
    assert len((tmp_path / "tok.vocab").read_text().splitlines()) == 600
    assert sorted(os.listdir(tmp_path)) == ["tok.model", "tok.vocab"]


def test_special_tokens_in_the_text_stay_text(model: str) -> None:
    """A document cannot forge its end."""
    ids = sentencepiece.SentencePieceProcessor(model_file=model).encode("<s></s><pad><unk>")
    assert not set(ids) & {0, 1, 2, 3}


def test_the_known_exception_is_the_space_character_of_sentencepiece(model: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.decode(processor.encode("a\u2581b")) == "a b"


def test_training_is_reproducible_and_samples_all_files(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i:02} " + "lorem ipsum dolor\n" * 2000)
    files = reader.find_text_files([str(tmp_path)], "*.txt")
    total = sum(file.size for file in files)
    lines = train_tokenizer.sample_lines(files, total // 4, seed=1)
    assert lines == train_tokenizer.sample_lines(files, total // 4, seed=1)
    assert lines != train_tokenizer.sample_lines(files, total // 4, seed=2)
    assert total // 4 <= sum(len(line) + 1 for line in lines) <= total // 4 + train_tokenizer.BLOCK_BYTES
    assert 8 <= sum(line.startswith("file") for line in lines) <= 12
    assert len(train_tokenizer.sample_lines(files, total)) == 80_000
    for name in ("a", "b"):
        train_tokenizer.main(
            ["--input", str(tmp_path), "--glob", "*.txt", "--output", str(tmp_path / name), "--vocab-size", "290"]
            + ["--sample-bytes", str(total // 2)]
        )
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_json_lines_train_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text + "abc def ghi"}) + "\n" for text in TEXTS * 20))
    train_tokenizer.main(
        [
            "--input",
            str(tmp_path / "a.jsonl"),
            "--json-key",
            "body",
            "--output",
            str(tmp_path / "t"),
            "--vocab-size",
            "400",
        ]
    )
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model")).get_piece_size() == 400


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab-size", "90000"], "--vocab-size 90000: this text is too small for so many tokens; use --vocab-size "),
        (["--vocab-size", "261"], "--vocab-size 261: too small for the 256 bytes and the characters of this text; use"),
        (["--vocab-size", "259"], "--vocab-size 259: out of range; give 260 (the 256 bytes and 4 special tokens) to"),
        (["--vocab-size", "9" * 20], "--vocab-size 99999999999999999999: out of range; give 260"),
        (["--threads", "9" * 20], "--threads: a number from 1 to 1024 is wanted, not 9999"),
        (["--character-coverage", "nan"], "--character-coverage: a number from 0.98 to 1 is wanted, not nan"),
        (["--vocab-size", "0"], "argument --vocab-size: a number above 0 is wanted, not 0"),
        (["--vocab-size", "many"], "argument --vocab-size: invalid positive value: 'many'"),
        (["--model-type", "wordpiece"], "argument --model-type: invalid choice: 'wordpiece'"),
        (["--character-coverage", "2"], "--character-coverage: a number from 0.98 to 1 is wanted, not 2"),
        (["--glob", "*.rs"], "--glob *.rs: matches no file in"),
        (["--exclude", "*"], " but what --exclude names; "),
        (["--glob", "/etc/*"], "--glob /etc/*: not below the folder; give a pattern relative to it"),
        (["--output", "{tmp}/x.model"], "a prefix without ending is wanted: --output {tmp}/x"),
        (["--output", "{tmp}"], "--output {tmp}: a folder; add a name, e.g. --output {tmp}/corpus"),
        (["--output", "{tmp}/file/x"], "{tmp}/file is a file, not a folder"),
        (
            ["--output", "{tmp}/there"],
            "--output {tmp}/there: {tmp}/there.model exists; choose another name or add --ov",
        ),
        (["--input", "{tmp}/nothing"], "--input {tmp}/nothing: no such file or folder; check the path"),
        (["--input", "{tmp}/blank"], "--input: no text in these files"),
        (
            ["--input", "{tmp}/latin1"],
            "--input {tmp}/latin1: line 2 is not UTF-8 (byte 1); convert the file to UTF-8, or",
        ),
    ],
)
def test_mistakes_in_training_flags(
    flags: list[str], expected: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "there.model").touch()
    (tmp_path / "blank").write_text("\n\n\n")
    (tmp_path / "latin1").write_bytes("ab\ncé".encode("latin-1"))
    before = sorted(os.listdir(tmp_path))
    arguments = ["--input", str(corpus), "--glob", "**/*.py", "--output", str(tmp_path / "new" / "tok")]
    arguments += [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    line = one_line(capsys, train_tokenizer.main, arguments)
    assert line.startswith("train_tokenizer.py: error: ")
    assert expected.replace("{tmp}", str(tmp_path)) in line
    assert sorted(os.listdir(tmp_path)) == before
