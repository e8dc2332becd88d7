"""Tests speeds, MFU, tokens and the end of a training.

Tested are the arithmetic, and real runs in the log, TensorBoard and W&B.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import pty
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch
from megatron.core import num_microbatches_calculator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moa.command_line.flags import add_flags, check_progress_flags
from megatron_moa.errors import UserError
from megatron_moa.training import progress
from megatron_moa.training.gpus import GPUS
from megatron_moa.training.progress import Mark, Meter, Terminal, duration, peak_flops, samples_at_the_end
from tests.support import launch
from tests.support.training import ROOT, SWIGLU, TINY, Run, train

TOKENS = 4 * 32  # of a step of TINY
STOCK = [*SWIGLU, "--moa-mixing", "none"]
# A token of TINY and SWIGLU, stock: 6 times fc1, fc2, attention's projections and half its products, logits.
STOCK_FLOPS = 6 * (2 * (3 * 32 * 48 + 32 * (32 + 2 * 16 + 32) + 32 * 32) + 32 * 64)


# Arithmetic.


def test_the_first_step_is_in_no_estimate() -> None:
    meter = Meter()
    meter.add(100, 5e9)
    mark = meter.mark(seconds=60.0, clock=1060.0)  # compiles
    assert mark.speed_since(Mark()) == pytest.approx((100 / 60, 5e9 / 60))
    assert meter.seconds_left(1000) is None
    assert meter.recent_speed() is None
    for step in range(1, 4):
        meter.add(100, 5e9)
        meter.mark(60.0 + 0.5 * step, 1060.0 + 0.5 * step)
    assert meter.seconds_left(1000) == pytest.approx(5.0)
    assert meter.recent_speed() == pytest.approx((200, 200 * 5e7))


def test_one_slow_interval_does_not_move_the_estimate_and_evaluations_to_come_are_in_it() -> None:
    meter = Meter()
    seconds, clock = 0.0, 0.0
    for step in range(21):
        meter.add(100, 1.0)
        seconds += 30.0 if step == 10 else 1.0
        clock += (30.0 if step == 10 else 1.0) + (5.0 if step % 10 == 5 else 0.0)  # two evaluations of 5 s
        meter.mark(seconds, clock)
    assert meter.recent_speed()[0] == pytest.approx(100)
    # A second for each 100 tokens, and the 10 s of evaluation beside 49 s of training since the first step.
    assert meter.seconds_left(2000) == pytest.approx(20 * (49 + 10) / 49)


def test_several_steps_between_readings() -> None:
    meter = Meter()
    meter.add(10, 1.0)
    before = meter.mark(1.0, 1.0)
    for _ in range(4):
        meter.add(10, 1.0)
    now = meter.mark(3.0, 3.0)
    assert now.speed_since(before) == (20.0, 2.0)
    assert meter.seconds_left(40) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (86399, "23:59:59"), (273906, "3d 04:05:06")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def no_calculator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a global calculator of batch sizes; after the test there is what there was before."""
    monkeypatch.setattr(num_microbatches_calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)


@pytest.mark.usefixtures("no_calculator")
def test_samples_at_the_end_of_a_schedule_of_batch_sizes() -> None:
    args = argparse.Namespace(train_iters=10, consumed_train_samples=8)
    sizes = {"micro_batch_size": 2, "data_parallel_size": 2, "step_batch_size_schedule": "0:4 12:8 40:16"}
    num_microbatches_calculator.init_num_microbatches_calculator(0, **sizes)
    # Done: two steps of 4. To come: 4, then 8 until 40 samples are reached (12, 20, 28, 36 -> 44), then 3 of 16.
    assert samples_at_the_end(args, iteration=2) == 8 + 4 + 4 * 8 + 3 * 16


@pytest.mark.usefixtures("no_calculator")
def test_samples_at_the_end_with_one_batch_size() -> None:
    args = argparse.Namespace(train_iters=10, consumed_train_samples=40)
    sizes = {"micro_batch_size": 2, "data_parallel_size": 2, "global_batch_size": 8}
    num_microbatches_calculator.init_num_microbatches_calculator(0, **sizes)
    assert samples_at_the_end(args, iteration=5) == 40 + 5 * 8


def arguments(**given: object) -> argparse.Namespace:
    """Ours, and the few of Megatron's that are looked at."""
    args = add_flags(argparse.ArgumentParser()).parse_args([])
    defaults = {"tensorboard_dir": None, "wandb_project": None, "wandb_exp_name": None, "wandb_save_dir": None}
    vars(args).update({**defaults, "save": None, "bf16": False, "fp16": False, "fp8": None, **given})
    return args


@pytest.mark.parametrize(
    ("given", "gpu", "peak", "words"),
    [
        ({"bf16": True}, "h100", 989.4e12, "989.4 TFLOP/s a GPU (H100 SXM 80 GB, bf16, dense)"),
        ({"fp16": True}, "a100-80", 312e12, "fp16"),
        ({}, "h200", 66.9e12, "fp32"),
        ({"bf16": True, "fp8": "hybrid"}, "b200", 4500e12, "fp8"),
        ({"bf16": True, "moa_peak_tflops": 123.0}, "h100", 123e12, "123 TFLOP/s a GPU (--moa-peak-tflops)"),
        ({"bf16": True, "fp8": "hybrid"}, "a100-80", None, "fp8; give one with --moa-peak-tflops X"),
        ({"bf16": True}, None, None, "give one with --moa-peak-tflops X"),
    ],
)
def test_what_mfu_is_a_part_of(
    given: dict, gpu: str | None, peak: float | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "this_gpu", lambda: GPUS.get(gpu))
    found, text = peak_flops(arguments(**given))
    assert found == peak
    assert words in text


WANDB = {"wandb_project": "p", "wandb_exp_name": "e", "wandb_save_dir": "w", "tensorboard_dir": "t"}


@pytest.mark.parametrize(
    ("given", "absent", "words"),
    [
        ({"moa_progress": "bar"}, None, "--moa-progress bar: unknown; choose one of auto, line, log, off"),
        ({"moa_peak_tflops": 0.0}, None, "--moa-peak-tflops 0: not a speed"),
        ({"moa_peak_tflops": float("nan")}, None, "--moa-peak-tflops nan: not a speed"),
        ({"tensorboard_dir": "t"}, "tensorboard", "--tensorboard-dir t: TensorBoard is not installed; pip install"),
        (WANDB, "wandb", "--wandb-project p: W&B is not installed; pip install wandb"),
        ({**WANDB, "wandb_exp_name": None}, None, "add --wandb-exp-name NAME"),
        ({**WANDB, "wandb_save_dir": None}, None, "add --wandb-save-dir FOLDER, or --save FOLDER"),
        ({**WANDB, "tensorboard_dir": None}, None, "add --tensorboard-dir FOLDER"),
    ],
)
def test_mistakes(given: dict, absent: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    with pytest.raises(UserError, match=re.escape(words)) as error:
        check_progress_flags(arguments(**given))
    assert "\n" not in str(error.value)


def test_what_is_printed_takes_the_place_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    terminal = Terminal(stream)
    print("before", file=terminal)
    terminal.show("a line that is longer than the terminal is wide")
    print("after", file=terminal)
    print("more", file=terminal)
    assert stream.getvalue() == "before\n\r\x1b[Ka line that is long\r\x1b[Kafter\nmore\n"


# Real runs.


@dataclasses.dataclass(frozen=True)
class Line:
    """What one line of the log says; None for what it does not."""

    iteration: int
    milliseconds: float
    tokens: int
    tokens_per_s: float
    tokens_per_s_gpu: float
    mfu: float | None
    left: str | None
    end: datetime | None


def lines(run: Run) -> list[Line]:
    """Of the training log, one a --log-interval."""
    found = []
    for text in run.log.splitlines():
        if " iteration " not in text or "elapsed time per iteration" not in text:
            continue
        fields = dict(re.findall(r"\| ([^|:]+?): +([^|]+?) (?=\|)", text))
        end = fields.get("end")
        found.append(
            Line(
                iteration=int(re.search(r"iteration +(\d+)/", text)[1]),
                milliseconds=float(fields["elapsed time per iteration (ms)"]),
                tokens=int(fields["tokens"]),
                tokens_per_s=float(fields["tokens/s"]),
                tokens_per_s_gpu=float(fields["tokens/s/GPU"]),
                mfu=float(fields["MFU"].rstrip("%")) / 100 if "MFU" in fields else None,
                left=fields.get("time left"),
                end=datetime.strptime(end, "%Y-%m-%d %H:%M") if end else None,
            )
        )
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's event files hold: value by iteration, by name."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.distributed
def test_two_stages_and_then_two_data_parallel_ranks_that_go_on(tmp_path: Path) -> None:
    """Trains with PP 2, whose last stage logs, saves at 6, and goes on with DP 2.

    Tokens and FLOPs go on from there, and the estimate starts anew.
    """
    peak = 0.5
    common = [*STOCK, "--train-iters", "10", "--log-interval", "2", "--moa-peak-tflops", str(peak)]
    common += ["--tensorboard-dir", tmp_path / "tensorboard", "--eval-interval", "4", "--eval-iters", "1"]
    save = ["--save", tmp_path / "save", "--save-interval", "6", "--exit-interval", "6"]
    first = train(*common, *save, "--pipeline-model-parallel-size", "2", processes=2)
    second = train(*common, "--load", tmp_path / "save", "--log-throughput", processes=2)

    seen = lines(first) + lines(second)
    assert [line.iteration for line in seen] == [1, 2, 4, 6, 7, 8, 10]
    for line in seen:
        assert line.tokens == line.iteration * TOKENS
        assert line.tokens_per_s_gpu == pytest.approx(line.tokens_per_s / 2, rel=1e-3, abs=0.06)
        assert line.mfu == pytest.approx(line.tokens_per_s_gpu * STOCK_FLOPS / (peak * 1e12), abs=6e-4)
        # The first step of a start is too early for an estimate.
        assert (line.left is None) == (line.end is None) == (line.iteration in (1, 7))
        if line.iteration not in (2, 8):  # Megatron's own time has the first step in it there
            assert line.tokens_per_s == pytest.approx(TOKENS / line.milliseconds * 1000, rel=0.03)
    assert first.log.count("> MFU: of 0.5 TFLOP/s a GPU (--moa-peak-tflops)") == 1
    tflops = [float(x) for x in re.findall(r"\(TFLOP/s/GPU\): ([\d.]+)", second.log)]
    assert len(tflops) == 3

    written = scalars(tmp_path / "tensorboard")
    assert written["progress/tokens"] == {step: step * TOKENS for step in range(1, 11)}
    logged = {line.iteration: line for line in seen if line.iteration % 2 == 0}
    for name, field, scale in (
        ("speed/tokens-per-second", "tokens_per_s", 1),
        ("speed/tokens-per-second-per-gpu", "tokens_per_s_gpu", 1),
        ("speed/mfu", "mfu", 1),
    ):
        assert sorted(written[name]) == sorted(logged)
        for iteration, value in written[name].items():
            assert value == pytest.approx(getattr(logged[iteration], field) * scale, rel=1e-3, abs=6e-4)
    for iteration, value in written["speed/tflops-per-gpu"].items():
        assert value == pytest.approx(peak * written["speed/mfu"][iteration], rel=1e-5)
    assert sorted(written["progress/hours-left"]) == [2, 4, 6, 8, 10]
    assert written["progress/hours-left"][10] == 0
    table = (ROOT / "docs" / "watching.md").read_text()
    assert not [name for name in written if not name.endswith(" vs samples") and f"`{name}`" not in table]
    # Megatron's names, among them the validation after training, which would be lost without a flush.
    assert sorted(written["lm loss"]) == list(range(1, 11))
    assert sorted(written["lm loss validation"]) == [4, 8, 10]


@pytest.mark.distributed
def test_gates_are_counted_in_the_logs_throughput_and_tensor_parallel_ranks_are_not_counted_twice(
    tmp_path: Path,
) -> None:
    tensorboard = ["--tensorboard-dir", tmp_path / "tensorboard", "--moa-log-interval", "2", "--moa-backend", "eager"]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--log-interval", "2"]
    run = train(*SWIGLU, "--train-iters", "4", *tensorboard, *split, processes=2)
    mixture = 2 * 6 * (14 * 48 + 14 * 32)
    written = scalars(tmp_path / "tensorboard")
    for iteration in (2, 4):
        flops = 1e12 * written["speed/tflops-per-gpu"][iteration]
        per_token = flops / written["speed/tokens-per-second-per-gpu"][iteration]
        assert per_token == pytest.approx(STOCK_FLOPS + mixture, rel=1e-5)
    assert all(line.mfu is None for line in lines(run))
    assert run.log.count("> MFU: left out, no peak is known of") == 1
    for (iteration, layer), values in run.coefficients.items():
        assert written[f"moa/layer_{layer}/gelu/mean"][iteration] == pytest.approx(values[0], abs=1e-4)
        assert written[f"moa/layer_{layer}/linear.identity/std"][iteration] == pytest.approx(values[-1], abs=1e-4)
    assert sorted(run.coefficients) == [(2, 1), (2, 2), (4, 1), (4, 2)]


def test_tokens_of_a_growing_batch_and_a_budget_in_samples() -> None:
    at = TINY.index("--global-batch-size")
    flags = [*TINY[:at], *TINY[at + 2 :], *STOCK, "--train-samples", "40", "--step-batch-size-schedule", "0:4 384:8"]
    script = str(ROOT / "pretrain_gpt_moa.py")
    run = Run(*launch.launch(launch.script, (script, flags), 1, ROOT))
    assert run.returncode == 0, run.log
    # 4, 8, 12 samples, then 8 more each.
    assert [line.tokens for line in lines(run)] == [32 * n for n in (4, 8, 12, 20, 28, 36, 44)]
    assert lines(run)[-1].left == "0:00:00"


def test_off_leaves_megatrons_line_as_it_is() -> None:
    run = train(*STOCK, "--train-iters", "1", "--moa-progress", "off")
    (line,) = [line for line in run.log.splitlines() if "elapsed time per iteration" in line]
    assert line.endswith("number of nan iterations:   0 |")
    assert "> MFU" not in run.log


def test_one_rank_of_a_large_world_logs_too() -> None:
    run = train(*STOCK, "--train-iters", "2", "--fake-process-group", "--global-batch-size", "4")
    assert [line.tokens for line in lines(run)] == [TOKENS, 2 * TOKENS]


def on_a_terminal(arguments: list[str], output: str) -> None:
    """Runs the script with a terminal as its stdout, and writes what was printed there.

    This is a target of tests.support.launch.
    """
    master, slave = pty.openpty()
    os.dup2(slave, 1)
    os.close(slave)
    written = bytearray()

    def read() -> None:
        try:
            while block := os.read(master, 65536):
                written.extend(block)
        except OSError:  # Linux's way to say that nobody has the other end any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        launch.script(str(ROOT / "pretrain_gpt_moa.py"), arguments)
    finally:
        sys.stdout.flush()
        os.close(1)
        reader.join()
        Path(output).write_bytes(written)


def test_a_terminal_gets_a_line_that_is_rewritten(tmp_path: Path) -> None:
    output = tmp_path / "output"
    flags = [*TINY, *STOCK, "--train-iters", "60", "--log-interval", "20", "--moa-peak-tflops", "1"]
    code, log = launch.launch(on_a_terminal, (flags, str(output)), 1, ROOT)
    assert code == 0, log
    text = output.read_bytes().decode().replace("\r\n", "\n")
    drawn = re.findall(r"\r\x1b\[K(step \d+/60 \| loss \d\.\d{4}[^\r\n]*)\r", text)
    assert drawn
    assert re.fullmatch(
        r"step \d+/60 \| loss \d\.\d{4} \| [\d,]+ tokens/s \| MFU \d+\.\d% \| 0:00:\d\d left", drawn[-1]
    )
    # Whole lines remain as they are in a file.
    kept = re.sub(r"\r\x1b\[K[^\r\n]*\r(\x1b\[K)?", "", text)
    assert [line.iteration for line in lines(Run(0, kept))] == [1, 20, 40, 60]
    assert not re.search(r"step \d+/60", kept)


def test_wandb_offline_gets_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", tmp_path, "--log-interval", "2"]
    flags += ["--tensorboard-dir", tmp_path / "tensorboard", "--eval-interval", "2", "--eval-iters", "1"]
    flags += ["--moa-log-interval", "4", "--moa-backend", "eager", "--moa-peak-tflops", "1", "--train-iters", "4"]
    train(*SWIGLU, *flags)
    limit = time.monotonic() + 60
    # W&B's own process writes the file, and may do so after this training, which runs no exit handlers.
    while sorted(history := wandb_history(tmp_path)) != [1, 2, 3, 4]:
        assert time.monotonic() < limit, sorted(history)
        time.sleep(0.1)
    written = scalars(tmp_path / "tensorboard")
    assert all(history[step]["progress/tokens"] == step * TOKENS for step in history)
    names = {name for name in written if name.startswith(("progress/", "speed/", "moa/"))}
    assert len(names) == 6 + 2 * (14 * 2 + 3)
    for name in names:
        for step, value in written[name].items():
            assert history[step][name] == pytest.approx(value, rel=1e-5)
    assert [step for step in history if "lm loss validation" in history[step]] == [2, 4]


def wandb_history(folder: Path) -> dict[int, dict[str, float]]:
    """Values by name, by iteration, from W&B's own file of the only run below a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[int, dict[str, float]] = {}
    for data in wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.setdefault(items["_step"], {}).update(items)
    return history


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of LevelDB's log format, which begin after seven bytes.

    Blocks of 32 KiB hold pieces of records, each after checksum, length and kind.
    """
    last_piece = {1: True, 2: False, 3: False, 4: True}
    at, record = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if last_piece[kind]:
            yield record
            record = b""


def test_wandb_that_is_not_logged_in_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc there
    flags = ["--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", tmp_path]
    run = train(*STOCK, *flags, "--tensorboard-dir", tmp_path / "t", "--train-iters", "1", check=False)
    assert run.returncode == 2
    (line,) = [line for line in run.log.splitlines() if "--wandb-project p" in line]
    assert line.endswith("or set WANDB_MODE=offline")
    assert "Traceback" not in run.log


def test_a_cpu_has_no_known_peak() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert peak_flops(arguments()) == (
        None,
        "left out, no peak is known of a CPU in fp32; give one with --moa-peak-tflops X",
    )
