"""megatron_moa.research.benchmarks.timing: clocks, ratios, memory and records are right."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.benchmarks import conditions, timing
from megatron_moa.research.benchmarks.peak_memory import peak_bytes, saved_for_backward
from megatron_moa.research.benchmarks.timing import Timings, time_alternately

CPU = torch.device("cpu")
KILOBYTES = 1024  # float32 entries of 4 kB


# Time.


def test_every_phase_lasts_from_one_lap_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    # Readings of the clock, seconds: start, forward, backward of two rounds.
    readings = iter([0.0, 0.010, 0.030, 1.0, 1.004, 1.005])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))

    def run(lap: timing.Lap) -> None:
        lap("forward")
        lap("backward")

    timings = time_alternately({"a": run}, CPU, rounds=2, warmup=0)
    assert timings.milliseconds["a"]["forward"] == pytest.approx([10, 4])
    assert timings.milliseconds["a"]["backward"] == pytest.approx([20, 1])
    assert timings.milliseconds["a"]["total"] == pytest.approx([30, 5])
    assert timings.median("a") == pytest.approx(17.5)


def test_contenders_take_turns_and_warm_up_untimed() -> None:
    order: list[str] = []

    def contender(name: str) -> timing.Run:
        def run(lap: timing.Lap) -> None:
            order.append(name)
            lap("all")

        return run

    before = itertools.count()
    timings = time_alternately(
        {name: contender(name) for name in "abc"}, CPU, rounds=3, warmup=3, before_each=lambda: next(before)
    )
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert rounds[3:] == ["abc", "bca", "cab"]  # each is first as often as the others
    assert len(timings.milliseconds["a"]["all"]) == 3
    assert next(before) == 18


def test_a_ratio_is_taken_within_rounds() -> None:
    # The machine slows down from round to round, and b is lucky in the last: medians alone would say 8/3.
    timings = Timings({"a": {"total": [2.0, 8.0, 30.0]}, "b": {"total": [1.0, 4.0, 3.0]}, "c": {"total": [9.0] * 3}})
    assert timings.ratio("a", "b") == 2
    assert timings.ratio("b", "a") == 0.5
    assert timings.fastest(["a", "b", "c"]) == "b"
    mixed = Timings({"a": {"total": [1.0, 30.0, 9.0]}, "b": {"total": [1.0, 10.0, 9.0]}})
    assert mixed.ratio("a", "b") == 1
    assert mixed.quartiles("a") == (5.0, 19.5)
    assert mixed.record("a") == {"ms": {"total": 9.0}, "ms_quartiles": {"total": (5.0, 19.5)}, "rounds": 3}


def test_backward_is_run_anew_and_leaves_no_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    seen = []
    x.register_hook(seen.append)
    phases: list[str] = []
    run = timing.forward_backward(lambda: 2 * x, torch.tensor([1.0, 2.0, 3.0]), [x])
    run(phases.append)
    run(phases.append)
    assert phases == ["forward", "backward"] * 2
    assert [grad.tolist() for grad in seen] == [[2, 4, 6]] * 2
    assert x.grad is None


def test_copy_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))  # every copy takes a second
    assert timing.copy_bandwidth(CPU, size=4_000_000) == pytest.approx(0.008)


# Memory.


def test_peak_counts_what_is_held_at_once() -> None:
    def run(lap: timing.Lap) -> None:
        first = torch.empty(3 * KILOBYTES)
        second = torch.empty(2 * KILOBYTES)
        del first
        third = torch.empty(KILOBYTES)  # 3 at the end, 5 before
        del second, third

    assert peak_bytes(run, CPU) == 5 * 4 * KILOBYTES


def test_peak_of_a_forward_and_backward() -> None:
    x = torch.randn(KILOBYTES, requires_grad=True)
    grad = torch.ones(KILOBYTES)
    run = timing.forward_backward(lambda: x.sin().exp(), grad, [x])
    run(timing.no_lap)
    # Held by the end of forward: sin(x), saved by none but freed after exp, and exp(sin(x)): two at once. In backward:
    # the output (saved), the gradient of sin(x), cos(x), and their product: four, before the first are freed.
    assert peak_bytes(run, CPU) == 4 * 4 * KILOBYTES
    assert peak_bytes(run, CPU) == 4 * 4 * KILOBYTES


def test_peak_does_not_count_what_is_there_before() -> None:
    held = torch.empty(64 * KILOBYTES)
    assert peak_bytes(lambda lap: held.add_(1), CPU) < 64


def test_saved_are_the_tensors_that_backward_needs() -> None:
    x = torch.randn(KILOBYTES, requires_grad=True)
    assert saved_for_backward(lambda: x.exp()).bytes == 4 * KILOBYTES  # its output
    assert saved_for_backward(lambda: x + 1).bytes == 0
    assert saved_for_backward(lambda: x.sin().cos()).bytes == 2 * 4 * KILOBYTES  # both inputs


def test_a_storage_saved_twice_counts_once_and_parameters_never() -> None:
    x = torch.randn(8, KILOBYTES, requires_grad=True)
    assert saved_for_backward(lambda: x * x.view(8, KILOBYTES) * x[:1]).bytes == 2 * 8 * 4 * KILOBYTES
    linear = torch.nn.Linear(KILOBYTES, 16, bias=False)
    assert saved_for_backward(lambda: linear(x)).bytes == 8 * 4 * KILOBYTES + linear.weight.nbytes  # its transpose
    assert saved_for_backward(lambda: linear(x), leave_out=linear.parameters()).bytes == 8 * 4 * KILOBYTES
    assert saved_for_backward(lambda: linear.weight * linear.weight).bytes == 0


def test_share_of_some_tensors_in_what_is_saved() -> None:
    x, c = torch.randn(4, KILOBYTES, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    saved = saved_for_backward(lambda: x * c)
    assert saved.bytes == x.nbytes + c.nbytes
    assert saved.bytes_of([c]) == c.nbytes
    assert saved.bytes_of([c.expand(4, 2), torch.ones(1)]) == c.nbytes


def test_outputs_discarded_to_be_recomputed_count_nothing() -> None:
    x = torch.randn(KILOBYTES, requires_grad=True)

    def forward() -> torch.Tensor:
        middle = x.sin()
        out = middle.cos()
        middle.untyped_storage().resize_(0)  # as Megatron's CheckpointWithoutOutput does
        return out

    assert saved_for_backward(forward).bytes == 4 * KILOBYTES


# Flags, surroundings and reports.


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    conditions.add_arguments(parser, rounds=5)
    return parser.parse_args(flags)


@pytest.fixture
def _threads_stay() -> None:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_stay")
def test_threads_by_flag_then_environment_then_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    conditions.set_up(options("--device", "cpu"))
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert conditions.set_up(options("--device", "cpu")) == (CPU, torch.float32)
    assert torch.get_num_threads() == 1
    assert conditions.set_up(options("--device", "cpu", "--threads", "3", "--dtype", "bf16")) == (CPU, torch.bfloat16)
    assert torch.get_num_threads() == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_an_error() -> None:
    with pytest.raises(UserError, match="--device cuda: no CUDA device here"):
        conditions.set_up(options("--device", "cuda"))


def test_the_cpu_beside_a_gpu_that_cannot_be_hidden_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="--device cpu: CUDA has started already"):
        conditions.set_up(options("--device", "cpu"))


def test_scripts_can_hide_a_gpu() -> None:
    """What they import first does not start CUDA, which reads CUDA_VISIBLE_DEVICES once."""
    code = (
        "import torch\n"
        "started = []\n"
        "torch._C._cuda_getDeviceCount = lambda: started.append(1) or 1\n"
        "torch.cuda._device_count_nvml = lambda: 1\n"
        "import megatron_moa.startup\n"
        "assert not started\n"
        "assert torch.cuda.is_available() and started\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=conditions.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_environment_names_what_figures_depend_on() -> None:
    found = conditions.environment(CPU)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["megatron-core"]
    assert found["threads"] == torch.get_num_threads()
    assert found["commit"] is None or len(found["commit"]) == 40
    for part in (found["date"], found["device"], str(found["megatron-core"])):
        assert part in conditions.describe(found)


def test_no_checkout_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conditions, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = conditions.environment(CPU)
    assert (found["commit"], found["dirty"]) == (None, None)
    assert "no commit" in conditions.describe(found)


def test_records_are_appended_with_their_environment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for arm in ("a", "b"):
        conditions.append_records(path, "layer", {"torch": "2"}, [{"arm": arm}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"benchmark": "layer", "arm": arm, "environment": {"torch": "2"}} for arm in ("a", "b")]
    conditions.append_records(None, "layer", {}, [{"arm": "a"}])


def test_records_that_cannot_be_written_are_one_line_and_none_of_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path, problem in ((tmp_path, "a folder; add a name"), (file / "x.jsonl", "is a file, not a folder")):
        with pytest.raises(UserError, match=f"^--json {path}: .*{problem}"):
            conditions.set_up(options("--device", "cpu", "--json", str(path)))
        with pytest.raises(UserError, match=f"^--json {path}: .*; name a file that can be written$"):
            conditions.append_records(path, "layer", {}, [{"arm": "a"}])
    with pytest.raises(TypeError):
        conditions.append_records(file, "layer", {}, [{"arm": "a"}, {"arm": object()}])
    assert file.read_text() == ""
    os.mkfifo(tmp_path / "pipe")
    conditions.check_json(tmp_path / "pipe")  # records are appended, so nothing is replaced


def test_the_command_has_the_variables_that_change_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(conditions.ROOT / "tools/benchmark_step.py"), "dense-0.5b"])
    assert conditions.environment(CPU)["command"] == "tools/benchmark_step.py dense-0.5b"
    monkeypatch.setenv("MEGATRON_MOA_KERNELS", "exact")
    monkeypatch.setenv("FFN_MULTIPLE", "128")
    command = "MEGATRON_MOA_KERNELS=exact FFN_MULTIPLE=128 tools/benchmark_step.py dense-0.5b"
    assert conditions.environment(CPU)["command"] == command


def test_table() -> None:
    assert markdown_table(["", "ms"], [["a", 1.23456], ["b", None], ["c", 12345.6]]) == (
        "|  | ms |\n| --- | --- |\n| a | 1.235 |\n| b |  |\n| c | 12346 |"
    )


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for kernel_errors.py that notes what it is asked, and is wrong when told to."""
    module = types.ModuleType("megatron_moa.research.benchmarks.kernel_errors")
    module.AccuracyError = type("AccuracyError", (Exception,), {})
    seen = types.SimpleNamespace(asked=[], wrong=None)

    def check_mixture(mixture: MixtureConfig, dtype: torch.dtype, device: torch.device, **sizes: object) -> list[str]:
        seen.asked.append(("mixture", mixture, sizes))
        return ["mixture"]

    def check_gate(mixture: MixtureConfig, dtype: torch.dtype, device: torch.device, **sizes: object) -> list[str]:
        seen.asked.append(("gate", mixture, sizes))
        return ["gate"]

    def require(results: list[str]) -> None:
        if seen.wrong in results:
            raise module.AccuracyError(f"{seen.wrong}:\n too far off")

    module.check_mixture, module.check_gate, module.require = check_mixture, check_gate, require
    monkeypatch.setitem(sys.modules, "megatron_moa.research.benchmarks.kernel_errors", module)
    monkeypatch.setattr("megatron_moa.research.benchmarks.kernel_errors", module, raising=False)
    return seen


@pytest.mark.parametrize("wrong", ["mixture", "gate"])
def test_nothing_is_timed_on_red(
    accuracy: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    moa, la = MixtureConfig(), MixtureConfig(kind="la")
    conditions.require_correct("tool.py", [moa, la, moa], torch.float32, CPU, width=7, hidden=5)
    assert [asked[:2] for asked in accuracy.asked] == [("mixture", moa), ("gate", moa), ("mixture", la)]
    assert [sizes.get("width", sizes.get("hidden")) for _, _, sizes in accuracy.asked] == [7, 5, 7]
    accuracy.wrong = wrong
    with pytest.raises(SystemExit) as left:
        conditions.require_correct("tool.py", [moa], torch.float32, CPU, width=7, hidden=5)
    assert left.value.code == 1
    assert capsys.readouterr().out == f"tool.py: nothing was timed, because a result is wrong: {wrong}: too far off\n"
