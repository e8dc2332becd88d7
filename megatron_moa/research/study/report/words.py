"""Puts differences, verdicts, losses and counts into words and table cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.research.study.report.material import Lines
from megatron_moa.research.study.statistics import BETTER, DIVERGED, ONE_SEED, UNDECIDED, UNTUNED, WORSE, Interval
from megatron_moa.research.study.steps import Choice


def table(rows: Sequence[Sequence[str]]) -> Lines:
    """Writes a table as markdown, the header first."""
    yield markdown_table(rows[0], rows[1:])
    yield ""


def difference_text(known: Interval) -> str:
    """Returns a difference with its interval, where there is one."""
    text = f"{known.bound}{known.mean:+.4f}"
    return text if known.count < 2 else f"{text} [{known.low:+.4f}, {known.high:+.4f}]"


def narrow_text(known: Interval | None) -> str:
    """Returns a difference for a narrow column: half the interval, no more than a number for one seed."""
    if known is None:
        return ""
    text = f"{known.bound}{known.mean:+.4f}"
    if known.count < 2:
        return f"{text} (1)"
    text = f"{text} ± {known.half:.4f}"
    return f"**{text}**" if known.verdict in (BETTER, WORSE) else text


def verdict_text(verdict: str) -> str:
    """Returns a verdict, bold where the interval excludes zero."""
    return f"**{verdict}**" if verdict in (BETTER, WORSE) else verdict


def control_text(step: Choice, known: Interval) -> str:
    """Returns whether a control comes out as it must."""
    if known.verdict in (ONE_SEED, UNTUNED, DIVERGED):
        return known.verdict
    return f"{known.verdict}, {'as it must be' if known.verdict == step.expected else '**as it must not be**'}"


def tally(verdicts: Sequence[str]) -> str:
    """Counts each verdict."""
    words = (BETTER, WORSE, UNDECIDED, ONE_SEED, UNTUNED, DIVERGED)
    return listed(f"{verdicts.count(word)} {word}" for word in words if word in verdicts)


def step_sentence(step: Choice, known: Interval) -> str:
    """Returns a step and its difference as a sentence."""
    subject = step.words[0].upper() + step.words[1:]
    if known.verdict == UNTUNED:
        return f"{subject} was not compared at the best rate of both ({difference_text(known)})."
    if known.verdict == DIVERGED:
        return f"{subject} cannot be compared: a run diverged."
    if known.verdict == UNDECIDED:
        return f"{subject} makes no difference that {known.count} seeds decide ({difference_text(known)})."
    direction = "lowers" if known.mean < 0 else "raises"
    text = f"{subject} {direction} the loss by {abs(known.mean):.4f}"
    return f"{text} (one seed: not decided)." if known.count < 2 else f"{text}."


def loss_text(loss: float) -> str:
    """Returns a loss to four digits, or that the run diverged."""
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def lost_text(found: dict[int, float]) -> str:
    """Returns the mean over seeds of what was lost, and in how many the run diverged."""
    if not found:
        return "not run"
    finite = [loss for loss in found.values() if math.isfinite(loss)]
    parts = [f"{statistics.fmean(finite):+.4f}"] if finite else []
    if len(finite) < len(found):
        parts.append(f"{len(found) - len(finite)} of {len(found)} diverged")
    return ", ".join(parts)


def listed(names: Iterable[object], separator: str = ", ") -> str:
    """Joins names."""
    return separator.join(map(str, names))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural for all but 1."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
