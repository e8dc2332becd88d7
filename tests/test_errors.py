"""Endings of programs: one line for a mistake, and what a reader of a pipe sees who leaves early."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moa.errors import OneLineParser, UserError, check_is_folder, one_line_errors
from tests.support.training import ROOT

TALKS = """
from megatron_moa.errors import one_line_errors

@one_line_errors("talker")
def main():
    for number in range(100_000):
        print(number)
    raise SystemExit({code})

main()
"""


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\u2028\udc80", r"a\u2028\udc80"), ("é 数", "é 数")],
)
def test_a_mistake_is_one_line_whatever_a_file_is_called(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), one_line_errors("tool"):
        raise UserError(f"--load {name}: no such file")
    assert capsys.readouterr().err == f"tool: error: --load {shown}: no such file\n"
    with pytest.raises(SystemExit):
        OneLineParser("tool").parse_args([name])
    assert capsys.readouterr().err == f"tool: error: unrecognized arguments: {shown}; see tool --help\n"


def test_a_folder_is_not_there_or_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new", file / "below"):
        check_is_folder("--load", path)
    with pytest.raises(UserError, match=f"--load {file}: not a folder"):
        check_is_folder("--load", file)

    def refuse(*args: object, **others: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # from Python 3.14 on it is
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); give a folder you may read"):
        check_is_folder("--load", tmp_path)


@pytest.mark.parametrize("code", [0, 1])
def test_a_reader_that_leaves_early_ends_the_program_in_silence(code: int) -> None:
    command = [sys.executable, "-c", TALKS.format(code=code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as by SIGPIPE


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-c", TALKS.format(code=0)]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "talker: error: a file: No space left on device; make room, and give the same command again\n"
    assert (ended.returncode, ended.stderr) == (2, said)


@pytest.mark.parametrize(
    ("tool", "left"),
    [
        ("convert_to_hf", ", nothing was written"),
        ("convert_from_hf", ", nothing was written"),
        ("convert_mixing", ", nothing was written"),
        ("evaluate", ", the results of finished tasks are kept"),
        ("evaluate_text", ""),
        ("generate", ""),
        ("inspect_checkpoint", ""),
    ],
)
def test_control_c_is_one_line(
    tool: str, left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"tools.{tool}")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "parse_flags", interrupt)
    with pytest.raises(SystemExit) as leaving:
        module.main([])
    assert leaving.value.code == 130
    assert capsys.readouterr() == ("", f"{tool}.py: interrupted{left}\n")


def test_another_pipe_that_breaks_is_a_fault() -> None:
    with pytest.raises(BrokenPipeError), one_line_errors("talker"):
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("ranks", "printed"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "9", "LOCAL_RANK": "1"}, False),
    ],
)
def test_each_node_says_its_mistake_once(
    ranks: dict[str, str], printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may be missing on a node that has not the first rank."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit), one_line_errors("tool"):
        raise UserError("--load a: no such file")
    node = f"{os.uname().nodename}: " if ranks.get("RANK") == "8" else ""
    assert capsys.readouterr().err == (f"tool: error: {node}--load a: no such file\n" if printed else "")
