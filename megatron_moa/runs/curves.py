"""Reads losses by tokens and time, and coefficients, from a run's TensorBoard files or its log.

A run that was started several times is one course: what a later start did again stands for what it did before, and the
time between two starts is left out.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moa.errors import UserError
from megatron_moa.runs.training_log import COUNT, NUMBER, parse_iteration, parse_setting, read_lines, records

LOG_NAME = "train.log"  # in a run's folder, beside tensorboard/

_STAMP = re.compile(r"^ ?\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+)\]")
_TOKENS = re.compile(rf"\| tokens: {COUNT} \|")
_SAMPLES = re.compile(rf"\| consumed samples: +{COUNT} \|")
_VALIDATION = re.compile(
    rf"validation loss at iteration {COUNT}(?: on validation set)? \| lm loss value: {NUMBER}(?= *\|)", re.IGNORECASE
)
_COEFFICIENTS = re.compile(rf"^ ?coefficients at iteration {COUNT} \| ([^|]*\d[^|]*) \| (.*)", re.DOTALL)
_CELL = re.compile(rf"(\S+) {NUMBER} \+- {NUMBER}(?= \||\s*\n)")  # a cell without its end may be cut off
_TAG = re.compile(r"moa/([^/]+)/([^/]+)/(mean|std)")


@dataclass(frozen=True)
class Curve:
    """One quantity of a run.

    Attributes:
        tokens: [n], trained on when it was taken; increasing.
        seconds: [n], since the first step that was logged.
        values: [n].
    """

    tokens: np.ndarray
    seconds: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation over tokens of the coefficients, at one iteration.

    Attributes:
        layers: rows' names, such as ``layer 1`` or ``layer 1 shared expert``.
        names: columns' names: the n coefficients.
        mean, std: [layers, n]
    """

    iteration: int
    layers: tuple[str, ...]
    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Course:
    """A run: its training and validation loss, and the last statistics of coefficients.

    ``validation`` is of length 0 if there is none.
    """

    path: Path
    loss: Curve
    validation: Curve
    coefficients: Statistics | None


def read_course(path: Path) -> Course:
    """The course of a run.

    Args:
        path: the run's folder, with ``tensorboard/`` or else ``train.log`` in it; a folder of TensorBoard's event
            files; or a log file.

    Raises:
        UserError: nothing of the kind there, or no training loss in it.
    """
    if path.is_file():
        return _from_log(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    for folder in (path, path / "tensorboard"):
        events = sorted(folder.glob("events.out.tfevents.*"))
        if events:
            return _from_events(path, events)
    if (path / LOG_NAME).is_file():
        return _from_log(path / LOG_NAME)
    raise UserError(f"{path}: no TensorBoard files and no {LOG_NAME} in it; give a run's folder, or a log file")


class _Recorder:
    """Collects a run's points over all its starts, by iteration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.points: dict[str, dict[int, tuple[float, float]]] = {"loss": {}, "validation": {}, "tokens": {}}
        self.coefficients: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}
        self._clock = self._offset = 0.0

    def start(self, iteration: int, clock: float) -> None:
        """A process begins to train; its first step that is logged, and when that was, in seconds."""
        for points in (*self.points.values(), self.coefficients):
            for later in [step for step in points if step >= iteration]:
                del points[later]
        self._clock = clock
        self._offset = max((seconds for seconds, _ in self.points["loss"].values()), default=0.0)

    def add(self, quantity: str, iteration: int, clock: float, value: float) -> None:
        """One value, unless it is NaN or Inf (a skipped step's, or a run's end).

        The first of an iteration stands: after training Megatron writes the test set's loss under validation's name.
        """
        if not math.isfinite(value):
            return
        self.points[quantity].setdefault(iteration, (self._offset + clock - self._clock, value))

    def course(self) -> Course:
        """What was collected."""
        if not self.points["loss"]:
            raise UserError(f"{self.path}: no training loss in it; give a run that has trained, or its log file")
        known = self.points["tokens"]
        if not known:
            raise UserError(
                f"{self.path}: does not say how many tokens were trained on (pretrain_gpt_moa.py writes "
                "progress/tokens); give the run's log file instead"
            )
        steps = np.array(sorted(known))
        tokens = np.array([known[step][1] for step in steps.tolist()])

        def curve(quantity: str) -> Curve:
            points = self.points[quantity]
            at = sorted(points)
            seconds, values = np.array([points[step] for step in at]).reshape(-1, 2).T
            return Curve(np.interp(at, steps, tokens), seconds, values)

        return Course(self.path, curve("loss"), curve("validation"), self._statistics())

    def _statistics(self) -> Statistics | None:
        if not self.coefficients:
            return None
        # The last iteration of which most was written: the end of a log may be cut off.
        cells = {step: sum(map(len, rows.values())) for step, rows in self.coefficients.items()}
        iteration = max(cells, key=lambda step: (cells[step], step))
        rows = self.coefficients[iteration]
        names = max(map(tuple, rows.values()), key=len)
        layers = tuple(sorted((layer for layer in rows if tuple(rows[layer]) == names), key=_layer_order))
        mean, std = np.moveaxis(np.array([[rows[layer][name] for name in names] for layer in layers]), -1, 0)
        return Statistics(iteration, layers, names, mean, std)


def _layer_order(label: str) -> tuple[bool, int, str]:
    """Returns the key that layers are sorted by.

    Decoder layers come by number, those of multi-token prediction after them, shared experts after routed ones.
    """
    return label.startswith("mtp"), int(re.search(r"\d+", label)[0]), label


def _from_events(path: Path, files: list[Path]) -> Course:
    recorder = _Recorder(path)
    # One file a start.
    starts = [events for events in map(_scalars, files) if events.get("lm loss")]
    for events in sorted(starts, key=lambda events: events["lm loss"][0].wall_time):
        first = events["lm loss"][0]
        recorder.start(first.step, first.wall_time)
        for quantity, tag in (("loss", "lm loss"), ("validation", "lm loss validation"), ("tokens", "progress/tokens")):
            for event in events.get(tag, ()):
                recorder.add(quantity, event.step, event.wall_time, event.value)
        for tag, values in events.items():
            if (match := _TAG.fullmatch(tag)) and match[3] == "mean":
                spread = {event.step: event.value for event in events.get(tag.removesuffix("mean") + "std", ())}
                for event in values:
                    if event.step not in spread:
                        continue  # the run was killed between the two
                    row = recorder.coefficients.setdefault(event.step, {}).setdefault(match[1].replace("_", " "), {})
                    row[match[2]] = (event.value, spread[event.step])
    return recorder.course()


def _scalars(file: Path) -> dict[str, list[Any]]:
    """The scalars in one event file, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    # It warns of files whose process was killed; what is whole in them is read.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _from_log(path: Path) -> Course:
    recorder = _Recorder(path)
    started, clock, sequence = False, 0.0, None
    for line in _lines(path):
        if setting := parse_setting(line):
            started = False  # each start begins with the list of arguments
            if setting[0] == "seq_length" and re.fullmatch(COUNT, setting[1]):
                sequence = int(setting[1])
        elif step := parse_iteration(line):
            clock = _clock(line, clock)
            if not started:
                recorder.start(step.iteration, clock)
                started = True
            if step.loss is not None:
                recorder.add("loss", step.iteration, clock, step.loss)
            if tokens := _TOKENS.search(line):
                recorder.add("tokens", step.iteration, clock, int(tokens[1]))
            elif sequence is not None and (samples := _SAMPLES.search(line)):
                recorder.add("tokens", step.iteration, clock, int(samples[1]) * sequence)
        elif validation := _VALIDATION.search(line):
            recorder.add("validation", int(validation[1]), clock, float(validation[2]))
        elif statistics := _COEFFICIENTS.match(line):
            row = {name: (float(mean), float(std)) for name, mean, std in _CELL.findall(statistics[3])}
            recorder.coefficients.setdefault(int(statistics[1]), {})[statistics[2]] = row
    return recorder.course()


def _clock(line: str, before: float) -> float:
    """The time that a line of the training log begins with, in seconds; ``before`` if there is none."""
    stamp = _STAMP.match(line)
    try:
        return datetime.fromisoformat(stamp[1]).timestamp() if stamp else before
    except ValueError:  # of a damaged line
        return before


def _lines(path: Path) -> Iterator[str]:
    """A log's lines, without the number of a rank that a launcher may have put before them."""
    for line in read_lines(path):
        yield from records(re.sub(r"^\[?(?:default|rank)?\d+\]?: ?", "", line))
