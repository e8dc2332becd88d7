"""tools/demo.py: reading Megatron's log, the table, its care with folders and processes, and one tiny run of it all."""

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_moa.runs.training_log import IterationLine, TrainingLog

ROOT = Path(__file__).resolve().parents[2]


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


demo = load_demo()


def result(mixing: str, factor: float, loss: float, milliseconds: float = 100.0) -> object:
    curve = [IterationLine(5 * i, 50, 900.0 if i <= 2 else milliseconds, 7 - i / 10) for i in range(1, 11)]
    log = TrainingLog(parameters=1000, iterations=curve, validation={50: loss})
    return demo.Result(demo.Arm(mixing, factor), 2e-3 * factor, log)


def test_table_compares_at_the_same_rate_and_verdict_takes_the_best() -> None:
    results = [result("none", 1, 3.0), result("la", 1, 2.9), result("moa", 1, 3.2, 150.0)]
    results += [result("none", 1.5, 2.8), result("la", 1.5, math.nan), result("moa", 1.5, 2.75)]
    lines = demo.table(results).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["SwiGLU", "LA", "MoA"] * 2
    assert lines[3].split() == ["LA", "2.0e-03", "1,000", "2.9000", "100", "-0.1000"]
    assert lines[4].endswith("+0.2000")
    assert lines[7].endswith("-0.0500")
    assert len({len(line) for line in lines}) == 1
    verdict = demo.verdict(results)
    assert "SwiGLU 2.8000 at learning rate 3.0e-03" in verdict
    assert "LA     2.9000 at learning rate 2.0e-03, 0.1000 higher than SwiGLU's" in verdict
    assert "MoA    2.7500 at learning rate 3.0e-03, 0.0500 lower than SwiGLU's" in verdict
    assert "One seed, two learning rates" in verdict
    assert "one learning rate" in demo.verdict(results[:3])


def test_arms_differ_in_mixing_rates_and_folder_alone(tmp_path: Path) -> None:
    d = demo.Demo(demo.Settings(), tmp_path, seed=1, minutes=7)
    commands = [d.command(arm) for arm in (*demo.FIRST_ARMS, *demo.SECOND_ARMS)]
    for command in commands[1:]:
        assert len(command) == len(commands[0])
        differing = {commands[0][i - 1] for i, word in enumerate(command) if word != commands[0][i]}
        assert differing <= {"--moa-mixing", "--lr", "--min-lr", "--save", "--data-cache-path"}


def test_shown_command_is_the_command() -> None:
    import shlex

    command = [str(ROOT / "pretrain.py"), "--data-path", str(ROOT / "runs" / "a b"), "--split", "95,5,0"] * 4
    shown = demo.shown(command)
    assert shlex.split(shown.replace("\\\n", " ")) == [word.replace(f"{ROOT}/", "") for word in command]


def test_leaves_foreign_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(demo.DemoError, match="not ours"):
        demo.Demo(demo.QUICK, tmp_path, seed=1, minutes=1).prepare_folder()
    assert (tmp_path / "thesis.txt").is_file()


def test_empties_its_own_folder(tmp_path: Path) -> None:
    d = demo.Demo(demo.QUICK, tmp_path / "demo", seed=1, minutes=1)
    d.prepare_folder()
    (tmp_path / "demo" / "old.log").touch()
    d.prepare_folder()
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo.MARKER]


def test_failed_command_shows_the_end_of_its_log(tmp_path: Path) -> None:
    code = "[print('line', i) for i in range(50)]; raise SystemExit('no such ' + 'tokenizer')"
    with pytest.raises(demo.DemoError, match="exit code 1") as error:
        list(demo.output_lines([sys.executable, "-c", code], tmp_path / "log"))
    assert "no such tokenizer" in str(error.value)
    assert "line 49" in str(error.value)
    assert "line 0" not in str(error.value)
    assert (tmp_path / "log").read_text(encoding="utf-8").startswith("line 0")


def test_standard_output_alone_where_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('a sample'); print('a warning', file=sys.stderr)"]
    lines = demo.output_lines(command, tmp_path / "log", only_stdout=True)
    assert [line for line in lines if line is not None] == ["a sample"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == "a warning\n"


def test_closing_early_ends_the_process(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    lines = demo.output_lines([sys.executable, "-c", code], tmp_path / "log")
    pid = int(next(line for line in lines if line is not None))
    start = time.monotonic()
    lines.close()
    assert time.monotonic() - start < 10
    assert not Path(f"/proc/{pid}").exists()


class FakeDemo(demo.Demo):
    """Its runs print the log of a training that takes ``milliseconds`` an iteration, and do nothing else."""

    script = (
        "import sys, time; total, ms, fail = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]\n"
        "for i in range(10, total + 1, 10):\n"
        "    time.sleep(0.02)\n"
        "    if fail == 'fail': sys.exit('out of luck')\n"
        "    if fail == 'hang': time.sleep(60)\n"
        "    print(f' iteration {i}/ {total} | elapsed time per iteration (ms): {ms} | lm loss: {7 - i / 100} |')\n"
        "print(f'validation loss at iteration {total} on validation set | lm loss value: 3.0E+00 |')\n"
    )

    def __init__(self, out: Path, milliseconds: float, minutes: float = 7, fates: dict[str, str] | None = None) -> None:
        super().__init__(demo.Settings(iterations=100), out, seed=1, minutes=minutes)
        self.fake_milliseconds, self.fates, self.at_a_time = milliseconds, fates or {}, 2

    def command(self, arm: demo.Arm) -> list[str]:
        fate = self.fates.get(arm.name, "")
        return [sys.executable, "-c", self.script, str(self.settings.iterations), str(self.fake_milliseconds), fate]


def test_all_arms_run_at_both_rates_where_there_is_time(tmp_path: Path) -> None:
    results = FakeDemo(tmp_path, milliseconds=1).train_all()
    assert [r.arm for r in results] == [*demo.FIRST_ARMS, *demo.SECOND_ARMS]
    assert {r.log.final_validation for r in results} == {3.0}


def test_second_rate_is_left_out_as_a_whole_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MIXTURE_EXTRA", 0.0)
    results = FakeDemo(tmp_path, milliseconds=1, minutes=0.2).train_all()
    assert [r.arm for r in results] == list(demo.FIRST_ARMS)
    assert "The runs at 1.5 times the learning rate are left out" in capsys.readouterr().out


def test_slow_machine_starts_anew_with_fewer_iterations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    d = FakeDemo(tmp_path, milliseconds=2000)
    results = d.train_all()
    assert [r.arm for r in results] == list(demo.FIRST_ARMS)
    assert d.settings.iterations == 70  # (7 minutes / 2 rounds - 25 s to compile) / (2 s x 1.3), in tens
    assert results[0].log.iterations[-1].total == 70
    assert "2000 ms an iteration" in capsys.readouterr().out


def test_failure_of_one_run_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(demo.DemoError, match="out of luck"):
        FakeDemo(tmp_path, milliseconds=1, fates={"swiglu-1x": "hang", "la-1x": "fail"}).train_all()
    assert time.monotonic() - start < 20


def test_plot_survives_a_diverged_run(tmp_path: Path) -> None:
    results = [result("none", 1, 3.0), result("moa", 1, math.nan)]
    results[1].log.iterations = [IterationLine(5, 50, 100.0, math.nan), IterationLine(10, 50, 100.0, None)]
    demo.plot(results, demo.QUICK, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_demo_from_end_to_end(tmp_path: Path) -> None:
    """Three short runs, the table, the text and the picture, as `make demo` starts it."""
    out = tmp_path / "demo"
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "demo.py"), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    runs = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"]
    assert [r["arm"] for r in runs] == ["SwiGLU", "LA", "MoA"]
    for r in runs:
        assert 4 < r["validation_loss"] < math.log(512) + 1
        assert r["ms_per_iteration"] > 0
        assert [iteration for iteration, _ in r["curve"]] == [1, 2, 4, 6, 8, 10, 12]
    swiglu, la, moa = (r["parameters"] for r in runs)
    assert swiglu < la < moa
    assert (out / "loss.png").is_file()
    assert "One seed" in run.stdout
    assert "Text that the MoA model writes" in run.stdout
