"""Reads the log that Megatron prints while it trains; every tool that shows finished runs starts here.

The lines are those of training_log(), evaluate_and_print_results(), get_model() and _print_args() in megatron/training.
A run that is killed leaves its last line cut off, and the next start's first line may stand behind it.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moa.errors import UserError

NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
COUNT = r"(\d{1,18})"
_WHOLE = r"(?= *\|)"  # behind a number: what was cut off could be another number's beginning
_ITERATION = re.compile(rf" iteration +{COUNT}/ *{COUNT} \|")
_MILLISECONDS = re.compile(r"elapsed time per iteration \(ms\): " + NUMBER + _WHOLE)
_END = re.compile(r"number of nan iterations: +\d+ \|")
_LOSS = re.compile(r"\| lm loss: " + NUMBER + _WHOLE, re.IGNORECASE)
_VALIDATION = re.compile(
    rf"validation loss at iteration {COUNT} on validation set \| lm loss value: {NUMBER}{_WHOLE}", re.IGNORECASE
)
_PARAMETERS = re.compile(r"> number of parameters on .*model parallel rank \(0, 0, 0\): " + COUNT + r"(?!\d)")
_SETTING = re.compile(r"^\s+(\w+) \.{3,} (.*)$")
_BEGINNINGS = re.compile(
    r"(?=\[\d{4}-\d\d-\d\d [\d:.]+\] iteration +\d)|(?<!\])(?= iteration +\d+/ *\d+ \|)"
    r"|(?= validation loss at iteration \d)|(?= coefficients at iteration \d)"
    r"|(?= > number of parameters on )|(?=  \w+ \.{3,} )"
)


@dataclass(frozen=True)
class IterationLine:
    """One line of Megatron's training log.

    ``loss`` is None where every step since the last line was skipped.
    """

    iteration: int
    total: int
    milliseconds: float
    loss: float | None


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a log with their ends. Raises UserError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def records(line: str) -> list[str]:
    """Divides a line of the log where another one begins.

    The latter was written behind what a killed run left without its end. What has no mark of its end is left out before
    another one: the next start prints it again.
    """
    *cut, last = _BEGINNINGS.split(line.replace("\0", ""))
    whole = [record for record in cut if parse_setting(record) is None and parse_parameters(record) is None]
    return [record for record in (*whole, last) if record.strip()]


def parse_iteration(line: str) -> IterationLine | None:
    """The training log line in ``line``, or None if it is another kind of line or lacks its end."""
    iteration, milliseconds, loss = _ITERATION.search(line), _MILLISECONDS.search(line), _LOSS.search(line)
    if iteration is None or milliseconds is None:
        return None
    if loss is None and _END.search(line) is None:
        return None
    return IterationLine(
        int(iteration[1]), int(iteration[2]), float(milliseconds[1]), float(loss[1]) if loss is not None else None
    )


def parse_validation(line: str) -> tuple[int, float] | None:
    """Returns ``(iteration, loss)`` of a validation line, or None for other lines.

    Lines about the test set are not validation lines.
    """
    match = _VALIDATION.search(line)
    return (int(match[1]), float(match[2])) if match is not None else None


def parse_parameters(line: str) -> int | None:
    """The number of parameters that Megatron prints when it has built the model, or None."""
    match = _PARAMETERS.search(line)
    return int(match[1]) if match is not None else None


def parse_setting(line: str) -> tuple[str, str] | None:
    """Name and value in a line of the list of arguments that a run begins with, or None."""
    match = _SETTING.match(line)
    return (match[1], match[2].strip()) if match is not None else None


@dataclass
class TrainingLog:
    """What a log holds of a run, over all its starts.

    Attributes:
        settings: arguments of the last start, as Megatron prints them, by name.
        parameters: of the first model-parallel rank; None if no model was built.
        iterations: the training log's lines. What a later start did again stands for what it did before.
        validation: loss by iteration, likewise.
    """

    settings: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None
    iterations: list[IterationLine] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)

    def read_line(self, line: str) -> IterationLine | None:
        """Takes in one line; the last step that it tells of, if it does."""
        steps = [self._read_record(record) for record in records(line)]
        return next((step for step in reversed(steps) if step is not None), None)

    def _read_record(self, line: str) -> IterationLine | None:
        if (setting := parse_setting(line)) is not None:
            self.settings[setting[0]] = setting[1]
        elif (parameters := parse_parameters(line)) is not None:
            self.parameters = parameters
        elif (validation := parse_validation(line)) is not None:
            self.validation[validation[0]] = validation[1]
        elif (step := parse_iteration(line)) is not None:
            while self.iterations and self.iterations[-1].iteration >= step.iteration:
                self.iterations.pop()
            for later in [at for at in self.validation if at >= step.iteration]:
                del self.validation[later]
            self.iterations.append(step)
            return step
        return None

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """The log in a file. Raises UserError if it cannot be read."""
        log = cls()
        for line in read_lines(path):
            log.read_line(line)
        return log

    @property
    def complete(self) -> bool:
        """Whether the last iteration was reached; it may have no line of its own (``--log-interval``)."""
        last = self.iterations[-1] if self.iterations else None
        return last is not None and (last.iteration == last.total or last.total in self.validation)

    @property
    def final_validation(self) -> float:
        """The validation loss behind the last iteration that the log tells of; NaN if it has none."""
        at = max(self.validation, default=-1)
        reached = self.iterations[-1].iteration if self.iterations else 0
        return self.validation[at] if at >= reached else math.nan

    @property
    def milliseconds(self) -> float:
        """Returns the median time of an iteration over the log's lines; NaN without lines.

        The first fifth of the lines (warm-up) is left out.
        """
        steady = [step.milliseconds for step in self.iterations[len(self.iterations) // 5 :]]
        return statistics.median(steady) if steady else math.nan

    @property
    def seconds(self) -> float:
        """Of all iterations that the lines stand for; a start's time before its first one is no part of it."""
        before = [0, *(step.iteration for step in self.iterations)]
        each = zip(self.iterations, before, strict=False)
        return sum((step.iteration - last) * step.milliseconds for step, last in each) / 1000
