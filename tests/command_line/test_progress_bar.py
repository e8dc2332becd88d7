"""Progress of a tool: what it prints into a log file."""

from __future__ import annotations

import pytest
import tqdm.std

from megatron_moa.command_line.progress_bar import progress_bar


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    with progress_bar(8_000_000, "tokenizing part 2 of 3") as bar:
        for second in (10, 35, 40, 70):
            now[0] = second
            bar.update(1_000_000)
    shown = [line for line in capsys.readouterr().err.split("\r") if line.strip()]
    assert [line.partition("%")[0] for line in shown] == [f"tokenizing part 2 of 3:  {part}" for part in (25, 50)]
    assert "2.00M/8.00M" in shown[0]


def test_a_short_run_leaves_a_log_file_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(8, "merging") as bar:
        bar.update(8)
    assert capsys.readouterr().err == ""
