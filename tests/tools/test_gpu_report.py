"""tools/gpu_report.py: files that are no results of a run."""

from __future__ import annotations

import bisect
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.datasets import ROOT, documents, one_line
from tools import gpu_report


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"benchmark": "step"}', '{"benchmark": "training", "arm": 3}', "[" * 100_000]
)
def test_records_that_are_none_of_a_runs_are_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    assert f"gpu_report.py: error: {path}: " in one_line(capsys, gpu_report.main, ["table", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "{tmp}/host.jsonl"], "no table for host"),  # it would be left out without a word
        (["training", "{tmp}/log", "--arm", "MoA", "--json", "{tmp}"], "--json {tmp}: Is a directory; name a file"),
        (["corpus", "{tmp}/x", "--glob", "/etc/*"], "--glob /etc/*: not below the folder; give a pattern relative"),
        (["corpus", "{tmp}/log/x", "--glob", "bisect.py"], "PREFIX {tmp}/log/x: {tmp}/log is a file, not a folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "host.jsonl").write_text('{"benchmark": "host", "arm": "MoA"}\n')
    line = " iteration 1/ 1 | elapsed time per iteration (ms): 2.0 | lm loss: 1.0E+00 | number of nan iterations: 0 |\n"
    (tmp_path / "log").write_text(line)
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert message.replace("{tmp}", str(tmp_path)) in one_line(capsys, gpu_report.main, filled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host.jsonl", "log"]


def test_needs_only_what_the_suite_needs() -> None:
    """Torch, Triton and megatron-core: what else a test environment has is hidden."""
    hidden = ("sentencepiece", "transformers", "pyarrow", "matplotlib", "safetensors", "pytest")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); from tools import gpu_report"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_corpus_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_report.main(["corpus", str(tmp_path / "text"), "--glob", "bisect.py"])
    text = Path(bisect.__file__).read_bytes()
    assert documents(tmp_path / "text") == [[*text, gpu_report.END_OF_DOCUMENT]]
    assert f"{len(text) + 1:,} tokens in {tmp_path}/text.bin" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


def test_layers_over_several_ranks_have_tables_of_their_own() -> None:
    ms = {"forward": 1.0, "backward": 2.0, "total": 3.0}
    layer = {"benchmark": "layer", "arm": "SwiGLU", "hidden": 8, "ffn": 16, "tokens": 4, "experts": None, "topk": 2}
    layer |= {"dtype": "bf16", "ms": ms, "ms_quartiles": {"total": [3.0, 3.0]}, "ratio_to_stock": {"total": 1.0}}
    layer |= {"ratio_to_compiled": 1.0, "peak_bytes": 1, "peak_ratio": 1.0, "saved_bytes": 1}
    text = gpu_report.report([{**layer, "saved_coefficient_bytes": 0, "tp": tp} for tp in (1, 2)])
    assert "h 8, f 16, 4 tokens, bf16\n" in text
    assert "h 8, f 16, 4 tokens, bf16, TP 2\n" in text
    assert text.count("| SwiGLU |") == 2
