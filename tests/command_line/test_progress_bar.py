"""Progress of a tool: what it prints into a log file."""

from __future__ import annotations

import pytest

from megatron_moa.command_line import progress_bar


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    with progress_bar.progress_bar(8_000_000, "tokenizing part 2 of 3") as bar:
        for second in (10, 35, 40, 70):
            now[0] = second
            bar.update(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing part 2 of 3: 25.0%, 2 of 8 MB, 0.1 MB/s, 1.8 minutes left",
        "tokenizing part 2 of 3: 50.0%, 4 of 8 MB, 0.1 MB/s, 1.2 minutes left",
    ]
