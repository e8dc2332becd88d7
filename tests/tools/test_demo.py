"""Tests tools/demo.py: its commands, and its care with folders and processes.

Tested are also what a diverged run does, and one tiny demo.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moa.research.study import runner  # noqa: F401  # imports torch here rather than inside a test
from megatron_moa.runs.training_log import IterationLine, TrainingLog
from megatron_moa.training.exit_codes import EXIT_NOT_FINITE
from tests.command_line.test_processes import is_alive, wait_for_end
from tests.support import launch
from tools import demo

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PAUSE", 0.02)


def log_of(loss: float, milliseconds: float = 100.0, parameters: int = 1000) -> TrainingLog:
    lines = [IterationLine(i, 10, milliseconds, 7 - i / 10) for i in range(1, 11)]
    return TrainingLog(parameters=parameters, iterations=lines, validation={10: loss})


def shell(name: str, script: str, folder: Path) -> object:
    return demo.Command(name, ["sh", "-c", script], folder / name / "train.log")


def diverged() -> TrainingLog:
    """Of a run that stopped before its first line."""
    return TrainingLog(parameters=1000)


def test_verdict_says_who_is_ahead_and_what_it_costs() -> None:
    lines = demo.verdict({"SwiGLU": log_of(3.0), "LA": log_of(2.9), "MoA": log_of(3.25, 150, 1015)}).splitlines()
    assert lines[0].startswith("LA: 0.1000 nats per token lower than SwiGLU, with 0.00% more parameters and 1.00x")
    assert lines[1].startswith("MoA: 0.2500 nats per token higher than SwiGLU, with 1.50% more parameters and 1.50x")
    assert "a hint and no more" in lines[2]


@pytest.mark.parametrize("lost", [diverged(), log_of(math.nan)])
def test_verdict_compares_nothing_that_diverged(lost: TrainingLog) -> None:
    lines = demo.verdict({"SwiGLU": log_of(3.0), "LA": log_of(2.9), "MoA": lost}).splitlines()
    assert "lower" in lines[0]
    assert lines[1] == "MoA: not compared, since MoA diverged"
    lines = demo.verdict({"SwiGLU": lost, "LA": log_of(2.9), "MoA": log_of(2.8)}).splitlines()
    assert lines[:2] == [f"{name}: not compared, since SwiGLU diverged" for name in ("LA", "MoA")]


def test_trainings_differ_in_the_layer_and_folders_alone(tmp_path: Path) -> None:
    runs = demo.trainings(demo.FULL, tmp_path, seed=5)
    assert [run.name for run in runs] == ["SwiGLU", "LA", "MoA"]
    parts = [set(demo.words_by_flag(run.command)) for run in runs]
    differing = {part.split()[0] for part in set.union(*parts) - set.intersection(*parts)}
    assert {flag for flag in differing if not flag.startswith("--moa-")} == {"--save", "--data-cache-path"}
    for words in ("--train-iters 150", "--lr 0.004", "--seed 5", "--micro-batch-size 16", "--ffn-hidden-size 352"):
        assert words in set.intersection(*parts)


def test_shown_command_is_the_command() -> None:
    command = [str(ROOT / "pretrain.py"), "--data-path", str(ROOT / "runs" / "a b"), "--split", "95,5,0"] * 4
    typed = demo.typed(command)
    assert len(typed.splitlines()) > 1
    assert shlex.split(typed.replace("\\\n", " ")) == [word.replace(f"{ROOT}/", "") for word in command]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--iterations", "0"], "--iterations"),
        (["--seed", "x"], "--seed"),
        (["--minutes", "7"], "--minutes"),
        (["--out", "{folder}"], "holds what is not the demo's"),
        (["--out", "{folder}/thesis.txt"], "holds what is not the demo's"),
        (["--out", "{folder}/thesis.txt/demo"], "cannot be written to"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit) as leaving:
        demo.main([flag.format(folder=tmp_path) for flag in flags])
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_empties_its_own_folder(tmp_path: Path) -> None:
    demo.prepare_folder(tmp_path / "runs" / "demo")
    (tmp_path / "runs" / "demo" / "old.log").touch()
    demo.prepare_folder(tmp_path / "runs" / "demo")
    assert [path.name for path in (tmp_path / "runs" / "demo").iterdir()] == [demo.MARKER]


def test_runs_so_many_at_a_time(tmp_path: Path) -> None:
    running = []
    runs = [shell(name, f"echo {name} $THREADS; sleep 0.5", tmp_path) for name in "abc"]
    demo.run_all(runs, 2, lambda: running.append([run.name for run in runs if run.is_running]), THREADS="3")
    assert ["a", "b"] in running
    assert max(map(len, running)) == 2
    assert [run.log.read_text() for run in runs] == ["a 3\n", "b 3\n", "c 3\n"]
    assert all(run.seconds >= 0.5 for run in runs)


def test_a_failed_run_shows_its_end_and_ends_the_others(tmp_path: Path) -> None:
    other = shell("other", "sleep 60 & echo $!; wait", tmp_path)
    failing = shell("failing", "sleep 0.2; seq 50; echo no such tokenizer; exit 3", tmp_path)
    with pytest.raises(SystemExit) as leaving:
        demo.run_all([other, failing], 2, lambda: None)
    text = leaving.value.code  # which Python prints, with exit code 1
    assert "exit code 3 of\n  $ sh -c" in text
    assert "    50\n    no such tokenizer" in text
    assert "    30\n" not in text
    assert other.process.returncode is not None
    assert wait_for_end(int(other.log.read_text()))


def test_to_diverge_is_not_to_fail(tmp_path: Path) -> None:
    assert demo.DIVERGED == EXIT_NOT_FINITE
    run = shell("moa", f"exit {EXIT_NOT_FINITE}", tmp_path)
    demo.run_all([run], 1, lambda: None)
    assert run.process.returncode == EXIT_NOT_FINITE


INTERRUPTED = """
import sys
from pathlib import Path
sys.path.insert(0, "tools")
import demo
def make_data(settings, out):
    run = demo.Command("sleeper", ["sh", "-c", "sleep 60 & echo $!; wait"], out / "log")
    demo.run_all([run], 1, lambda: None)
demo.make_data = make_data
demo.main(["--out", sys.argv[1]])
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(stop: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int(log.read_text())
    assert is_alive(child)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "demo.py: interrupted" in errors
    assert wait_for_end(child)


def test_time_left_counts_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.time, "monotonic", lambda: 100.0)
    runs = [demo.Command(name, [], Path()) for name in ("SwiGLU", "LA", "MoA")]
    for run in runs[:2]:
        run.process = run  # any
    runs[0].started, runs[1].started = 60.0, 70.0

    def log(iteration: int, seconds: float) -> TrainingLog:
        return TrainingLog(iterations=[IterationLine(iteration, 100, 1000 * seconds, 5.0)])

    logs = {"SwiGLU": log(50, 1), "LA": log(5, 2)}
    assert demo.seconds_left(runs, logs, 2) is None  # LA has not done a tenth
    logs["LA"] = log(50, 2)  # both are half through: 40 s and 50 left, 30 s and 100 left
    assert demo.seconds_left(runs, logs, 2) == 50 + 130  # where SwiGLU ends MoA begins, and takes as long as LA
    runs[0].ended, runs[2].process, runs[2].started = 100.0, runs[2], 90.0
    logs["SwiGLU"], logs["MoA"] = log(100, 1), TrainingLog()
    assert demo.seconds_left(runs, logs, 2) == 120  # MoA, 10 s old, of 130


@pytest.mark.parametrize("lost", ["SwiGLU", "LA", "MoA", None])
def test_a_diverged_run_is_where_it_has_finite_values(
    lost: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: dict[str, list[str]] = {}

    def step(title: str, tool: str, flags: list[object], log: Path) -> str:
        commands[tool] = list(map(str, flags))
        (tmp_path / "plots").mkdir(exist_ok=True)
        (tmp_path / "plots" / "loss-tokens.png").touch()
        return "Megatron's log\n--- sample ---\ndef main\n"

    monkeypatch.setattr(demo, "step", step)
    runs = [demo.Command(name, [], tmp_path / name.lower() / "train.log") for name in demo.ARMS]
    logs = {name: diverged() if name == lost else log_of(3.0) for name in demo.ARMS}
    demo.save_results(logs, demo.QUICK, 1, tmp_path / "results.json")
    demo.report(runs, logs, tmp_path)

    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["runs"]
    assert [row["validation_loss"] for row in rows] == [None if name == lost else 3.0 for name in demo.ARMS]
    plot = commands["plot_runs.py"]
    assert plot[plot.index("--labels") + 1 : plot.index("--smooth")] == [name for name in demo.ARMS if name != lost]
    assert ("--baseline" in plot) == (lost != "SwiGLU")
    assert ("generate.py" in commands) == (lost != "MoA")
    printed = capsys.readouterr().out
    assert printed.endswith("\ndef main\n\n") == (lost != "MoA")
    assert "a hint and no more" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_demo_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs the quick demo in forked processes, as `make demo` starts it.

    There are three short runs, a table, a verdict, pictures and text.
    """
    out = tmp_path / "demo"
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(demo.subprocess, "Popen", launch.Forked)
    for name, value in launch.without_compiler({}).items():
        monkeypatch.setenv(name, value)
    demo.main(["--quick", "--out", str(out)])
    monkeypatch.undo()
    printed = capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["runs"]
    assert [row["arm"] for row in rows] == ["SwiGLU", "LA", "MoA"]
    for row in rows:
        assert 4 < row["validation_loss"] < math.log(512) + 1
        assert row["ms_per_iteration"] > 0
        assert [iteration for iteration, _ in row["curve"]] == list(range(1, 13))
    assert rows[0]["parameters"] < rows[1]["parameters"] < rows[2]["parameters"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")] == [
        *("| mixing", "| ---", "| none", "| la", "| moa")
    ]
    assert "nats per token" in printed
    assert "\ndef " in printed.partition("Text that the MoA model writes")[2]
    assert "Setting seq_length" not in printed
