"""Makes texts and datasets, and runs the tools of data in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest

from megatron_moa.command_line.quiet_imports import quiet_imports
from tools import merge_data, preprocess_data

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TEXTS = [
    "def f(x):\n\treturn x + 1\n\n\n",
    "  two  spaces   three, trailing  ",
    "\r\nWindows\r\nlines\r\n\r\n",
    "नमस्ते दुनिया, 你好，世界。こんにちは Привет שלום مرحبا 😀👩‍👩‍👧 e\u0301 \u00a0 \u2028",
    "</s><s><unk><pad><0x41> ▅ ⁇ \x00\x01\x7f \ufeff \ufffd",
    " ",
    "\n",
    "\t\t",
    "1234567890 0.5e-3",
]


def preprocess(model: str, output: Path, *arguments: str) -> None:
    kind = "HuggingFaceTokenizer" if os.path.isdir(model) else "SentencePieceTokenizer"
    preprocess_data.main(
        ["--tokenizer-type", kind, "--tokenizer-model", model, "--output-prefix", str(output), *map(str, arguments)]
    )


def merge(output: Path, *flags: str) -> None:
    merge_data.main(["--output-prefix", str(output), *flags])


def documents(prefix: Path) -> list[list[int]]:
    """What Megatron's own reader finds."""
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    stored = IndexedDataset(str(prefix))
    assert stored.document_indices.tolist() == list(range(len(stored) + 1))
    return [stored[i].tolist() for i in range(len(stored))]


def same_files(one: Path, other: Path) -> None:
    for ending in (".bin", ".idx"):
        assert Path(f"{one}{ending}").read_bytes() == Path(f"{other}{ending}").read_bytes()


def one_line(capsys: pytest.CaptureFixture[str], call: object, *arguments: object) -> str:
    """Runs a tool that must leave with code 2 and exactly one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call(*arguments)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "written" not in printed.out
    assert printed.err.count("\n") == 1, printed.err
    return printed.err.rstrip("\n")


def write_json_lines(folder: Path, count: int) -> list[str]:
    """Writes three files of documents of very different lengths, and returns the documents' texts.

    The files have blank lines, a byte order mark and a missing newline.
    """
    draw = numpy.random.default_rng(0)
    kept = []
    for i in range(3):
        with open(folder / f"{i}.jsonl", "w", encoding="utf-8-sig" if i == 0 else "utf-8") as stream:
            for j in range(count):
                text = f"{i}/{j} " + "wörd 世界\n" * int(draw.integers(0, 60)) if j % 10 else ""
                kept.append(text)
                end = "" if (i, j) == (2, count - 1) else "\n\n" if j % 7 == 0 else "\n"
                stream.write(json.dumps({"id": j, "text": text}, ensure_ascii=j % 2 == 0) + end)
    return kept


def make_dataset(prefix: Path, lengths: Sequence[int], highest: int = 90, dtype: type = numpy.uint16) -> str:
    """Writes documents of these lengths with Megatron's own builder.

    Their tokens count from 1 to the highest.
    """
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for length in lengths:
        builder.add_document(numpy.arange(length) % highest + 1, [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
