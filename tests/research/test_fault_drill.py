"""tools/fault_drill.py: what it reads, what it counts as lost, and a small drill."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moa.checkpoints.files import TRACKER
from megatron_moa.research.fault_drill.damage import cut, flip
from megatron_moa.research.fault_drill.drill import Drill, Outcome, latest
from megatron_moa.research.fault_drill.kills import changed, touched
from megatron_moa.research.fault_drill.starts import Log, NotAsExpected
from tests.support.training import ROOT
from tools import fault_drill

LOG = """\
 successfully loaded checkpoint from /somewhere [ t 1/1, p 1/1 ] at iteration 8
 [2026-11-24] iteration        9/      60 | lm loss: 2.500000E+00 | grad norm: 1.0 |
 [2026-11-24] iteration       10/      60 | lm loss: 2.450000E+00 | grad norm: 1.0 |
 [2026-11-24] iteration       11/      60 | lm loss: 2.300000E+00 | grad norm: 1.0 |
 validation loss at iteration 11 on validation set | lm loss value: 2.310000E+00 | lm loss PPL: 10.0 |
"""


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "log"
    file.write_text(LOG)
    return Log(file)


@pytest.fixture
def drill(tmp_path, log):
    return Drill(tmp_path, processes=2, kills=0, draw=random.Random(1), undisturbed=log)


def test_log(log):
    assert log.iterations == [9, 10, 11]
    assert log.losses == {9: "2.500000E+00", 11: "2.300000E+00"}  # of 10 Megatron prints the mean with 9
    assert log.validation_losses == ["2.310000E+00"]
    assert log.resumed_at == 8
    assert "iteration 8" in log.line("LOADED")
    with pytest.raises(NotAsExpected):
        log.line("no such line")


def test_other_loss_is_noticed(drill, tmp_path):
    other = tmp_path / "other"
    other.write_text(LOG)
    drill.same_losses(Log(other))
    other.write_text(LOG.replace("2.300000E+00", "2.300001E+00"))
    with pytest.raises(NotAsExpected, match="iteration 11"):
        drill.same_losses(Log(other))


def test_row_of_a_lost_fault(drill, capsys):
    def lose() -> tuple[str, str]:
        raise NotAsExpected("something else")

    assert drill.record("a fault", lambda: ("seen", "recovered"))
    assert not drill.record("another", lose)
    assert [outcome.lost for outcome in drill.outcomes] == [False, True]
    assert isinstance(drill.outcomes[0], Outcome)
    assert re.search(r"\| another \| something else \(0 s\) \| LOST \|", capsys.readouterr().out)


def test_latest_is_the_tracker(tmp_path):
    assert latest(tmp_path) == 0
    (tmp_path / TRACKER).write_text("12")
    assert latest(tmp_path) == 12


def test_touched_leaves_out_what_earlier_saves_left(tmp_path):
    old, again = tmp_path / "iter_0000004", tmp_path / "iter_0000008"
    for folder in (old, again):
        folder.mkdir()
    before = {folder: changed(folder) for folder in (old, again)}
    assert touched(tmp_path, before) == []
    os.utime(again, ns=(0, before[again] + 1))
    new = tmp_path / "iter_0000012"
    new.mkdir()
    assert set(touched(tmp_path, before)) == {again, new}


def test_damage(tmp_path):
    file = tmp_path / "file"
    before = bytes(range(100))
    file.write_bytes(before)
    flip(file)
    after = file.read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1
    cut(file)
    assert file.read_bytes() == after[:50]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "-1"], "--kills: a number of 0 or more is wanted, not -1"),
        (["--only", "kill,flood"], "--only flood"),
        (["--processes", "3"], "--processes 3"),
    ],
)
def test_mistake_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fault_drill.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        fault_drill.main()
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_small_drill_loses_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "fault_drill.py"), "--kills", "2", "--only", "kill,sigterm"]
    result = subprocess.run([*command, "--work-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    rows = re.findall(r"^\| (.*?) \|", result.stdout, re.MULTILINE)
    assert rows[2:] == [
        "kill -9 1: " + rows[2].partition(": ")[2],
        "kill -9 2: " + rows[3].partition(": ")[2],
        "the killed run's end",
        "SIGTERM to the launcher",
    ]
    assert result.stdout.splitlines()[-1] == "lost 0", result.stdout
    assert result.returncode == 0
    assert not list(Path(tmp_path).iterdir())  # what it made is removed
