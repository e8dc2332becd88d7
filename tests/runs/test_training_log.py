"""megatron_moa/runs/training_log.py: what is read from Megatron's log."""

import math
from pathlib import Path

import pytest

from megatron_moa.errors import UserError
from megatron_moa.runs import training_log
from megatron_moa.runs.training_log import IterationLine, TrainingLog

ITERATION = (
    " [2026-03-01 12:00:00.123456] iteration       20/     300 | consumed samples:          320 | "
    "elapsed time per iteration (ms): 152.4 | learning rate: 1.333333E-03 | global batch size:    16 | "
    "lm loss: 6.215430E+00 | loss scale: 1.0 | grad norm: 1.231 | number of skipped iterations:   0 | "
    "number of nan iterations:   0 |"
)
VALIDATION = (
    " validation loss at iteration 300 on validation set | lm loss value: 2.912345E+00 | lm loss PPL: 1.840000E+01 | "
)
PARAMETERS = " > number of parameters on (tensor, gtp_weight_remat, pipeline) model parallel rank (0, 0, 0): 1311872"


def test_reads_iteration_line() -> None:
    assert training_log.parse_iteration(ITERATION) == IterationLine(20, 300, 152.4, 6.21543)


def test_iteration_line_may_lack_the_loss_or_hold_nan() -> None:
    """Megatron leaves the loss out where every step since the last line was skipped."""
    assert training_log.parse_iteration(ITERATION.replace("lm loss: 6.215430E+00 | ", "")).loss is None
    assert math.isnan(training_log.parse_iteration(ITERATION.replace("6.215430E+00", "NAN")).loss)
    assert math.isnan(training_log.parse_iteration(ITERATION.replace("6.215430E+00", "nan")).loss)


@pytest.mark.parametrize(
    "line", ["", "Number of parameters in billions: 0.00", VALIDATION, PARAMETERS, "saving checkpoint at iteration 20"]
)
def test_other_lines_are_not_iterations(line: str) -> None:
    assert training_log.parse_iteration(line) is None


def test_reads_validation_line() -> None:
    assert training_log.parse_validation(VALIDATION) == (300, 2.912345)
    assert training_log.parse_validation(VALIDATION.replace("validation set", "test set")) is None
    assert training_log.parse_validation(ITERATION) is None


def test_reads_parameters() -> None:
    assert training_log.parse_parameters(PARAMETERS) == 1311872
    assert training_log.parse_parameters(ITERATION) is None


def test_reads_settings() -> None:
    assert training_log.parse_setting("  moa_mixing ....... moa") == (
        "moa_mixing",
        "moa",
    )
    assert training_log.parse_setting("  moa_la_init ....... [0.5, 1.0]")[1] == "[0.5, 1.0]"
    assert training_log.parse_setting(ITERATION) is None
    assert training_log.parse_setting("building the model ... done") is None


def test_a_log_with_a_second_start_holds_each_iteration_once(tmp_path: Path) -> None:
    def line(iteration: int, loss: float) -> str:
        return ITERATION.replace("      20/", f"{iteration:8d}/").replace("6.215430E+00", f"{loss:E}")

    start = ["  seed ............ 3", PARAMETERS]
    lines = [*start, line(20, 6), line(40, 5), line(60, 4), "noise", *start, line(40, 5.5), line(60, 4.5), line(300, 3)]
    path = tmp_path / "train.log"
    path.write_text("\n".join([*lines[:-1]]))
    assert not TrainingLog.read(path).complete
    path.write_text("\n".join([*lines, VALIDATION, VALIDATION.replace("validation set", "test set")]))
    log = TrainingLog.read(path)
    assert [(step.iteration, step.loss) for step in log.iterations] == [(20, 6), (40, 5.5), (60, 4.5), (300, 3)]
    assert log.complete
    assert (log.settings, log.parameters, log.final_validation) == ({"seed": "3"}, 1311872, 2.912345)


def test_time_is_the_median_without_warm_up() -> None:
    slow_start = [IterationLine(5 * i, 50, 900.0 if i <= 2 else 120.0, 7 - i / 10) for i in range(1, 11)]
    assert TrainingLog(iterations=slow_start).milliseconds == 120.0
    assert TrainingLog(iterations=slow_start[:1]).milliseconds == 900.0
    assert math.isnan(TrainingLog().milliseconds)


SECOND = ITERATION.replace("      20/", "      21/").replace("6.215430E+00", "5.000000E+00")


@pytest.mark.parametrize("first", [ITERATION, VALIDATION, PARAMETERS, "  seq_length ............ 1024"])
@pytest.mark.parametrize("second", [SECOND, VALIDATION, PARAMETERS, "  hidden_size ............ 4096"])
def test_a_line_behind_one_that_was_cut_off_is_read(first: str, second: str) -> None:
    """Wherever the first was cut: its numbers are the ones written or none, and the second is whole."""
    whole, alone = TrainingLog(), TrainingLog()
    whole.read_line(first + "\n")
    alone.read_line(second + "\n")
    for length in range(len(first) + 1):
        log = TrainingLog()
        log.read_line(first[:length] + second + "\n")
        assert set(log.iterations) - set(alone.iterations) <= set(whole.iterations)
        assert set(log.iterations) >= set(alone.iterations)
        assert log.validation.items() <= (whole.validation | alone.validation).items()
        assert log.validation.items() >= alone.validation.items()
        assert log.settings == alone.settings
        assert log.parameters == alone.parameters


def test_a_whole_line_without_its_newline_is_read() -> None:
    log = TrainingLog()
    log.read_line(ITERATION + "No CUDA device found" + _validated(20).removesuffix("\n") + SECOND + "\0" * 100 + "\n")
    assert [(step.iteration, step.loss) for step in log.iterations] == [(20, 6.21543), (21, 5.0)]
    assert log.validation == {20: 2.912345}


def test_damaged_numbers_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    damaged = [
        ITERATION.replace("6.215430E+00", "6.2.15430E+00").replace("number of nan iterations:   0 |", ""),
        ITERATION.replace("152.4", "1.5.2"),
        ITERATION.replace("20/", "9" * 5000 + "/"),
        VALIDATION.replace("2.912345E+00", "2.9E+"),
        VALIDATION.replace("300", "3" * 5000),
        PARAMETERS + "0" * 5000,
    ]
    path.write_bytes(b"\xff\xfe\x00" + "\n".join([*damaged, SECOND]).encode())
    log = TrainingLog.read(path)
    assert [(step.iteration, step.loss) for step in log.iterations] == [(21, 5.0)]
    assert (log.validation, log.parameters) == ({}, None)
    with pytest.raises(UserError, match=r"absent: cannot be read \(No such file or directory\)"):
        TrainingLog.read(tmp_path / "absent")


def _steps(*iterations: int, of: int) -> str:
    return "".join(ITERATION.replace("20/     300", f"{iteration}/{of}") + "\n" for iteration in iterations)


def _validated(iteration: int) -> str:
    return VALIDATION.replace("300", str(iteration)) + "\n"


def test_a_last_iteration_without_a_line_is_told_by_its_evaluation(tmp_path: Path) -> None:
    """As where ``--train-iters`` is no multiple of ``--log-interval``."""
    path = tmp_path / "train.log"
    path.write_text(_steps(10, 20, of=25))
    assert not TrainingLog.read(path).complete
    path.write_text(_steps(10, 20, of=25) + _validated(25))
    log = TrainingLog.read(path)
    assert (log.complete, log.final_validation) == (True, 2.912345)


def test_a_validation_loss_before_the_last_iteration_is_not_the_final_one(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    path.write_text(_steps(10, of=10) + _validated(10) + _steps(20, of=20))
    log = TrainingLog.read(path)
    assert log.complete
    assert math.isnan(log.final_validation)
    path.write_text(_steps(10, of=10) + _validated(10) + _steps(5, 10, of=10))
    assert math.isnan(TrainingLog.read(path).final_validation)
