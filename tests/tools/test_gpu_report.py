"""tools/gpu_report.py: files that are no results of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.datasets import one_line
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
