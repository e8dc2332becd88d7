"""docs/flags.md: current, complete, and told apart from one that is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "flags.md"


def write_flags(*flags: str) -> subprocess.CompletedProcess[str]:
    """tools/write_flags.py in a process of its own: it starts every tool."""
    command = [sys.executable, str(ROOT / "tools" / "write_flags.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def document() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


def test_is_current() -> None:
    result = write_flags("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_check_names_the_first_difference(
    tmp_path: Path, document: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import write_flags as program

    monkeypatch.setattr(program, "flags_document", lambda: document)
    stale = tmp_path / "flags.md"
    lines = document.splitlines(keepends=True)
    number = next(i for i, line in enumerate(lines) if line.startswith("| `--moa-gate` "))
    stale.write_text("".join(lines[:number] + lines[number + 1 :]), encoding="utf-8")
    assert program.main(["--check", "--output", str(stale)]) == 1
    printed = capsys.readouterr().out
    assert f"not current from line {number + 1}" in printed
    assert "`--moa-gate`" in printed
    assert "`--moa-gate` " not in stale.read_text(encoding="utf-8")


def test_has_every_flag_that_the_sources_add(document: str) -> None:
    """Another way to the same names: what the source text of programs adds to parsers."""
    sources = [*(ROOT / "tools").glob("*.py"), *(ROOT / "megatron_moa").rglob("*.py"), ROOT / "pretrain_gpt_moa.py"]
    flags = {
        (source.name, flag)
        for source in sources
        for flag in re.findall(r"\badd_argument\(\s*\"(--[\w-]+)\"", source.read_text(encoding="utf-8"))
    }
    assert len(flags) > 100
    missing = [(name, flag) for name, flag in sorted(flags) if f"`{flag}`" not in document]
    assert missing == []


def test_names_every_program(document: str) -> None:
    for path in (*(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*.sh")):
        assert f"tools/{path.name}`" in document
    for path in (ROOT / "examples").glob("*.sh"):
        assert f"`examples/{path.name}`" in document


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    result = write_flags("--output", str(tmp_path / "nowhere" / "flags.md"))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "no such folder; name a file in a folder that is there" in line


def test_troubleshooting_names_what_is_there(document: str) -> None:
    """Its flags of ours, tools, scripts and documents exist."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"--moa-[a-z-]+", text))
    assert len(flags) >= 8
    assert [flag for flag in sorted(flags) if f"`{flag}`" not in document] == []
    paths = set(re.findall(r"\b(?:tools|docs|examples)/[\w/.-]+\.(?:py|md|sh|sbatch)\b", text))
    assert len(paths) > 8
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
