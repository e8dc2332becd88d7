"""Files that preprocess_data.py and train_tokenizer.py read: compressed, Parquet, marked, damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from megatron_moa.data import corpus as reader
from megatron_moa.data import pieces
from tests.support.datasets import (
    TEXTS,
    documents,
    one_line,
    preprocess,
    same_files,
    write_json_lines,
)
from tools import merge_data, train_tokenizer

# The test process has other threads by then; a tool that was just started has none.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_input(
    ending: str,
    compress: Callable[[bytes], bytes],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pieces, "TASK_BYTES", 1000)  # less than some lines have
    write_json_lines(tmp_path, 100)
    (tmp_path / "a.txt").write_text("one document\nof two lines")
    plain = [tmp_path / "0.jsonl", tmp_path / "2.jsonl", tmp_path / "a.txt"]
    preprocess(model, tmp_path / "plain", "--input", *plain, "--workers", 1)
    packed = [Path(f"{path}.{ending}") for path in plain]
    for path, packed_path in zip(plain, packed, strict=True):
        packed_path.write_bytes(compress(path.read_bytes()))
    preprocess(model, tmp_path / "packed", "--input", *packed, "--workers", 2)
    same_files(tmp_path / "plain", tmp_path / "packed")
    line = one_line(capsys, train_tokenizer.main, ["--input", str(packed[0]), "--output", str(tmp_path / "t")])
    assert f"--input {packed[0]}: compressed, and a sample is drawn from all over the text; decompress" in line
    content = packed[1].read_bytes()
    packed[1].write_bytes(content[: len(content) // 2])
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 1)
    assert f"--input {packed[1]}: cut off or damaged (" in line
    packed[1].write_bytes(compress(b'{"text": "a"}\n{"txt": "b"}\n'))
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 2)
    assert f"--input {packed[1]}: line 2 has no key 'text' (it has 'txt')" in line
    packed[1].write_text("not compressed")
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 1)
    assert line.startswith(f"preprocess_data.py: error: --input {packed[1]}: ")


def test_parquet_is_preprocessed_and_trains_a_tokenizer(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the same rows in JSON lines, by any number of workers and in parts."""
    import pyarrow
    import pyarrow.parquet

    rows = [f"{text} {i}" for i in range(40) for text in TEXTS[:3]] + [""]
    for name in ("a", "b"):
        table = pyarrow.table({"body": rows, "n": range(len(rows))})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    for ending in ("jsonl", "parquet"):
        files = [tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", "--json-key", "body"]
        preprocess(model, tmp_path / ending, "--input", *files, "--workers", "1")
        arguments = ["--input", *map(str, files), "--output", str(tmp_path / ending), "--vocab-size", "300"]
        train_tokenizer.main(arguments)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", "--json-key", "body"]
    preprocess(model, tmp_path / "two", "--input", *files, "--workers", "2")
    for part in ("1/2", "2/2"):
        preprocess(model, tmp_path / "parts", "--input", *files, "--workers", "1", "--part", part)
    merge_data.main(["--output-prefix", str(tmp_path / "parts")])
    for name in ("parquet", "two", "parts"):
        same_files(tmp_path / "jsonl", tmp_path / name)
    assert (tmp_path / "jsonl.model").read_bytes() == (tmp_path / "parquet.model").read_bytes()
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", tmp_path / "a.parquet", "--workers", "2")
    assert f"--input {tmp_path}/a.parquet: has no column 'text' (it has 'body', 'n'); name the text's column" in line
    assert not list(tmp_path.glob("x*"))


def test_a_sample_of_parquet_is_from_all_files(tmp_path: Path) -> None:
    """Compressed, the files are smaller than the sample; their text is larger."""
    import pyarrow
    import pyarrow.parquet

    row = "lorem ipsum " * 10
    for i in range(8):
        table = pyarrow.table({"text": [f"file {i} {row}"] * 500})
        pyarrow.parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=100)
    files = reader.find_text_files([str(tmp_path)], "*.parquet")
    assert sum(file.size for file in files) < 100_000
    lines = train_tokenizer.sample_lines(files, 100_000)
    assert 100_000 <= sum(map(len, lines)) < 100_200
    assert len({line[:6] for line in lines}) >= 4
    assert len(train_tokenizer.sample_lines(files, 1000)) == 8


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(mark: bytes, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(mark + b"alpha beta\n" * 30)
    (tmp_path / "b.JSONL").write_bytes(mark + b'{"text": "alpha beta\\n", "n": ' + b"9" * 5000 + b"}\n")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", tmp_path / "b.JSONL", "--workers", "1")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert [processor.decode(ids[:-1]) for ids in documents(tmp_path / "d")] == ["alpha beta\n" * 30, "alpha beta\n"]
    files = reader.find_text_files([str(tmp_path / "a.txt"), str(tmp_path / "b.JSONL")])
    assert train_tokenizer.sample_lines(files, 1000) == ["alpha beta"] * 31


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (b'{"text": "a"}\n\nnot json\n', [], "line 3 is not JSON (Expecting value); each line must be one object"),
        (b'{"text": "a"}\n{"body": "b"}\n', [], "line 2 has no key 'text' (it has 'body'); write {\"text\": "),
        (b'{"text": "a"}\n', ["--json-key", "content"], "line 1 has no key 'content' (it has 'text')"),
        (b'{"text": 5}\n', [], "line 1 has a number under the key 'text', not text"),
        (b'["a"]\n', [], "line 1 holds a list, not an object"),
        (
            b'{"text": "a"}\n{"text": "\xff"}\n',
            [],
            "line 2 is not UTF-8 (byte 10); convert the file to UTF-8, or use --err",
        ),
        (b'{"text": "\\ud800"}\n', [], "line 1 holds half a surrogate pair"),
        (b'{"text": ""}\n', [], "no document with text"),
        (b"\n\n", [], "no document with text"),
    ],
)
def test_bad_lines(
    content: bytes,
    flags: list[str],
    expected: str,
    workers: int,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    line = one_line(
        capsys, preprocess, model, tmp_path / "new" / "data", "--input", path, "--workers", str(workers), *flags
    )
    assert line.startswith(f"preprocess_data.py: error: --input {path}: ")
    assert expected in line
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_errors_replace(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xfe"}\n{"text": "y\\ud800z"}\n')
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--errors", "replace")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert [processor.decode(ids[:-1]) for ids in documents(tmp_path / "d")] == ["ab\ufffdc", "x\ufffd", "y\ufffdz"]
