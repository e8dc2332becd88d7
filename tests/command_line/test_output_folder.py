"""megatron_moa/command_line/output_folder.py: a folder has its name only when it is whole."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_moa.checkpoints.writer import _append
from megatron_moa.command_line.output_folder import check_output_folders, is_unfinished, written_folder
from megatron_moa.errors import UserError
from tests.support.training import ROOT


def test_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(ZeroDivisionError), written_folder("--out", target) as partial:
        (partial / "file").write_text(f"half {1 // 0}")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
    with written_folder("--out", target) as partial:
        (partial / "file").write_text("whole")
        assert not list(target.iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("kind", ["a folder that is not empty", "a file", "a link"])
def test_what_is_there_is_left_alone(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "a file":
        target.write_text("mine")
    elif kind == "a link":
        target.symlink_to("nowhere")
    else:
        (target / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^--out {target}: is {kind}; name"), written_folder("--out", target):
        pytest.fail("it was written")
    assert target.is_symlink() == (kind == "a link")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_of_the_tools_own_are_replaced_together_and_nothing_else_is(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.png").write_text("old")
    own = ["old.png", "new.png", "gone.png"]
    with pytest.raises(ZeroDivisionError), written_folder("--out", target, replace=own) as partial:
        (partial / "new.png").write_text(f"half {1 // 0}")
    assert (target / "old.png").read_text() == "old"
    with written_folder("--out", target, replace=own) as partial:
        (partial / "new.png").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new.png"]
    with (
        pytest.raises(UserError, match=r"out: holds mine\.png, which"),
        written_folder("--out", target, own) as partial,
    ):
        (target / "mine.png").touch()  # while the tool writes
    assert sorted(os.listdir(target)) == ["mine.png", "new.png"]
    with pytest.raises(UserError, match=r"out: holds mine\.png, which"), written_folder("--out", target, own):
        pytest.fail("it was written")
    (target / "mine.png").unlink()
    (target / "old.png").mkdir()
    with pytest.raises(UserError, match=r"out: holds old\.png, which"), written_folder("--out", target, own):
        pytest.fail("it was written")


def test_a_message_has_the_path_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").touch()
    with pytest.raises(UserError, match=r"^--out out: is a file; name"), written_folder("--out", Path("out")):
        pytest.fail("it was written")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file takes more bytes than these, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    with (
        files_up_to(100_000),
        pytest.raises(UserError, match=r"^--out .*out: cannot be written \(File too large\); free"),
        written_folder("--out", tmp_path / "out") as partial,
        open(partial / "file", "wb") as stream,
    ):
        _append(stream, torch.zeros(100_000))  # a tensor of a checkpoint
    assert not list(tmp_path.iterdir())


def test_a_killed_tool_leaves_what_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os; from pathlib import Path; from megatron_moa.command_line.output_folder import written_folder\n"
        f"with written_folder('--out', Path({str(tmp_path / 'out')!r})): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert is_unfinished(left.name)
    assert not is_unfinished("out")
    with written_folder("--out", tmp_path / "out") as partial:
        assert str(os.getpid()) in partial.name
    assert f"WARNING: {left} was left unfinished" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", left.name])
    with written_folder("--out", tmp_path / "ou"):
        pass
    assert not capsys.readouterr().err


def test_looking_whether_a_folder_can_be_written_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that another rank's new folder, which may be empty for a moment, is not removed again."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("os.mkdir", lambda *_: pytest.fail("made a folder"))
    monkeypatch.setattr("os.rmdir", lambda *_: pytest.fail("removed a folder"))

    def check(folder: Path) -> None:
        check_output_folders(argparse.Namespace(tensorboard_dir=str(folder), mock_data=False))

    check(tmp_path)
    check(tmp_path / "new" / "run")
    for wrong in ("file", "file/below", "link", "x" * 300, "/proc/none"):
        with pytest.raises(
            UserError, match=r"^--tensorboard-dir \S+: cannot be written to \(.*\); name a folder that can$"
        ):
            check(tmp_path / wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_another_process_of_this_number_keeps_its_folder(tmp_path: Path) -> None:
    """As in two containers that share a disk."""
    other = tmp_path / f"out.{os.getpid()}.unfinished"
    other.mkdir()
    (other / "file").touch()
    message = "is there, which another process writes or left; delete it if"
    with pytest.raises(UserError, match=message), written_folder("--out", tmp_path / "out"):
        pytest.fail("it was written")
    assert (other / "file").exists()
