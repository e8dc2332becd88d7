"""A run's course, read from TensorBoard's files and from logs, over several starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_moa.errors import UserError
from megatron_moa.runs.curves import read_course

TOKENS = 100  # an iteration


def write_events(folder: Path, start: float, points: list[tuple[str, int, float, float]]) -> None:
    """One event file: (tag, iteration, seconds since the file's start, value)."""
    writer = EventFileWriter(str(folder), filename_suffix=f".{start:.0f}")
    for tag, step, seconds, value in points:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=start + seconds, step=step, summary=summary))
    writer.close()


def steps(first: int, last: int, loss: float) -> list[tuple[str, int, float, float]]:
    """A second each; the loss falls by 0.01 a step from ``loss``."""
    points = []
    for index, step in enumerate(range(first, last + 1)):
        points.append(("lm loss", step, index, loss - 0.01 * index))
        points.append(("progress/tokens", step, index, TOKENS * step))
    return points


def test_a_run_of_two_starts_is_one_course(tmp_path: Path) -> None:
    """The first start is killed at 8, saved at 6; the second, a day later, goes on at 7."""
    validation = "lm loss validation"
    write_events(
        tmp_path / "tensorboard", 1e9, [*steps(1, 8, 4.0), (validation, 4, 3.5, 3.9), (validation, 8, 7.5, 9.0)]
    )
    end = [(validation, 10, 3.5, 3.1), (validation, 10, 4.0, 3.2), (validation, 10, 4.5, 7.0)]
    write_events(tmp_path / "tensorboard", 1e9 + 86400, [*steps(7, 10, 3.0), *end])
    course = read_course(tmp_path)
    assert course.loss.tokens.tolist() == [TOKENS * step for step in range(1, 11)]
    assert course.loss.values == pytest.approx([4.0, 3.99, 3.98, 3.97, 3.96, 3.95, 3.0, 2.99, 2.98, 2.97])
    # Five seconds to the sixth step; the second start's clock begins there.
    assert course.loss.seconds == pytest.approx([0, 1, 2, 3, 4, 5, 5, 6, 7, 8])
    assert course.validation.tokens.tolist() == [400, 1000]
    assert course.validation.values == pytest.approx([3.9, 3.1])  # not the test set's, not the lost step's
    assert course.coefficients is None


def test_tokens_between_what_was_written_are_interpolated(tmp_path: Path) -> None:
    points = [("lm loss", 1, 0, 4.0), ("progress/tokens", 1, 0, 100.0)]
    points += [("lm loss", 5, 1, float("nan")), ("lm loss", 9, 2, 3.0), ("progress/tokens", 9, 2, 900.0)]
    write_events(tmp_path, 1e9, [*points, ("lm loss validation", 7, 1.5, 3.3)])
    course = read_course(tmp_path)
    assert course.loss.values.tolist() == [4.0, 3.0]  # the NaN left out
    assert course.validation.tokens.tolist() == [700.0]


def test_coefficients_are_the_last_ones_in_the_order_of_layers(tmp_path: Path) -> None:
    points = steps(1, 4, 4.0)
    for step, shift in ((2, 0.0), (4, 0.5)):
        for layer in ("layer_10", "layer_2_shared_expert", "layer_2", "mtp_layer_1"):
            for index, name in enumerate(("silu", "linear.tanh")):
                mean = shift + index + float(layer.split("_")[-1] == "10")
                points.append((f"moa/{layer}/{name}/mean", step, 3, mean))
                points.append((f"moa/{layer}/{name}/std", step, 3, 0.25))
    write_events(tmp_path, 1e9, points)
    found = read_course(tmp_path).coefficients
    assert found.iteration == 4
    assert found.layers == ("layer 2", "layer 2 shared expert", "layer 10", "mtp layer 1")
    assert found.names == ("silu", "linear.tanh")
    assert found.mean.tolist() == [[0.5, 1.5], [0.5, 1.5], [1.5, 2.5], [0.5, 1.5]]
    assert np.all(found.std == 0.25)


ARGUMENTS = "------ arguments ------\n  seq_length ...................................... 50\n"


def log_line(iteration: int, stamp: str, loss: str, tokens: bool) -> str:
    """As Megatron 0.19.2 prints it, with or without what this project adds."""
    added = f" tokens: {TOKENS * iteration} | tokens/s: 10.0 |" if tokens else ""
    return (
        f" [2026-11-24 {stamp}.000000] iteration {iteration:8d}/      20 | consumed samples: {2 * iteration:12d} | "
        f"elapsed time per iteration (ms): 10.0 | learning rate: 1.000000E-03 | global batch size:     2 | "
        f"lm loss: {loss} | loss scale: 1.0 | number of skipped iterations:   0 | "
        f"number of nan iterations:   0 |{added}\n"
    )


@pytest.mark.parametrize("tokens", [True, False], ids=["ours", "Megatron's"])
@pytest.mark.parametrize("prefix", ["", "[default1]:", "3: "])
def test_logs(tokens: bool, prefix: str, tmp_path: Path) -> None:
    rule = "-" * 60 + "\n"
    text = ARGUMENTS + log_line(5, "10:00:00", "4.0E+00", tokens) + log_line(10, "10:00:30", "3.0E+00", tokens)
    text += rule + " validation loss at iteration 10 | lm loss value: 3.100000E+00 | lm loss PPL: 2.2E+01 | \n" + rule
    text += log_line(15, "10:01:00", "9.0E+00", tokens)  # lost: saved at 10
    text += ARGUMENTS + log_line(15, "12:00:00", "2.5E+00", tokens) + log_line(20, "12:00:30", "2.0E+00", tokens)
    text += " coefficients at iteration 20 | layer 1 | silu 0.5000 +- 0.1000 | relu2 -0.2500 +- 0.0000\n"
    text += " coefficients at iteration 20 | layer 2 | silu 0.7000 +- 0.2000 | relu2 0.2500 +- 0.3000\n"
    text += " validation loss at iteration 20 on validation set | lm loss value: 2.2E+00 | lm loss PPL: 2E+01 | \n"
    text += " validation loss at iteration 20 on test set | lm loss value: 8.0E+00 | lm loss PPL: 2E+01 | \n"
    path = tmp_path / "train.log"
    path.write_text("".join(prefix + line for line in text.splitlines(keepends=True)))
    for given in (path, tmp_path):
        course = read_course(given)
        assert course.loss.tokens.tolist() == [500, 1000, 1500, 2000]
        assert course.loss.values.tolist() == [4.0, 3.0, 2.5, 2.0]
        assert course.loss.seconds.tolist() == [0, 30, 30, 60]
        assert course.validation.tokens.tolist() == [1000, 2000]
        assert course.validation.values.tolist() == [3.1, 2.2]
        assert course.coefficients.layers == ("layer 1", "layer 2")
        assert course.coefficients.mean.tolist() == [[0.5, -0.25], [0.7, 0.25]]
        assert course.coefficients.std.tolist() == [[0.1, 0.0], [0.2, 0.3]]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        read_course(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no TensorBoard files and no train\.log in it; give a run's folder"):
        read_course(tmp_path)
    (tmp_path / "train.log").write_text("nothing of the kind\n")
    with pytest.raises(UserError, match="no training loss in it"):
        read_course(tmp_path)
    write_events(tmp_path, 1e9, [("lm loss", 1, 0, 4.0)])
    with pytest.raises(UserError, match=r"does not say how many tokens .* give the run's log file instead"):
        read_course(tmp_path)
