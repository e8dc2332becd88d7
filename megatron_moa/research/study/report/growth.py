"""Writes loss against tokens, time and parameters, with the laws fitted to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from megatron_moa.research.study.arms import ARMS, CHIEF_ARMS
from megatron_moa.research.study.pictures import (
    anchor,
    arm_title,
    draw_curves,
    draw_growth,
    plan_title,
    setting_title,
    size_title,
)
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import counted, listed, table
from megatron_moa.research.study.statistics import BASELINE, LEAST_SIZES, Interval, Setting, Tuned, fit_power_law
from megatron_moa.research.study.timing import TIMING

_PARTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of a training's steps


def against_tokens_and_time(study: Material) -> Lines:
    """Draws the curves of the main setting against tokens, and against time where steps were timed."""
    there = {tuned.arm for tuned in study.tuned(study.main)}
    arms = [arm for arm in CHIEF_ARMS if arm in there]
    yield "## Against tokens and time\n"
    if BASELINE not in there:
        yield "SwiGLU has no finished run in the main setting.\n"
        return
    yield from study.picture("tokens.png", "training loss against tokens", draw_curves, study.main, arms)
    yield from _step_times(study)
    timing = study.evidence.timings.get((study.main[1], study.main[3]))
    if timing is None:
        yield f"No step times ({TIMING}) for the main setting's size and optimizer: no comparison against time.\n"
        return
    timed = [arm for arm in arms if arm in timing["milliseconds"]]
    left = [arm_title(arm) for arm in study.results.arms(study.main) if arm not in timing["milliseconds"]]
    if left:
        yield f"Not timed, so left out of this: {listed(left, '; ')}.\n"
    if BASELINE in timed:
        times = timing["milliseconds"]
        yield from study.picture("time.png", "training loss against time", draw_curves, study.main, timed, times)
        yield (
            "Where a faster arm's run ends, a slower one's learning rate has not come down yet: what compares "
            "fairly at equal time is a widened SwiGLU, above.\n"
        )


def _step_times(study: Material) -> Lines:
    """Writes the time of a step, arm by arm."""
    for (size, optimizer), line in study.evidence.timings.items():
        times, reference = line["milliseconds"], line["milliseconds"].get(BASELINE)
        yield (
            f"A step's time, size {size_title(size)} with {optimizer}: median of {line['rounds']}, the arms' steps "
            f"in turn, {counted(line['threads'], 'thread')}; {line['machine']}, {line['date']}. "
            f"SwiGLU takes MoA's time with f = {line['equal_time_width']}.\n"
        )
        rows = [["arm", "ms a step", "times SwiGLU's"]]
        rows += [
            [arm_title(arm), f"{time:.1f}", f"{time / reference:.3f}" if reference else ""]
            for arm, time in times.items()
            if arm in ARMS
        ]
        yield from table(rows)


def against_steps(study: Material) -> Lines:
    """Writes how far arms are from their baselines as training goes on: what the start alone does, fades."""
    rows = [["setting", "difference", *(f"at {part:g} of steps" for part in _PARTS)]]
    for setting in study.results.settings:
        for tuned in study.tuned(setting):
            to = ARMS[tuned.arm].baseline if tuned.arm in ARMS else BASELINE
            known = study.results.difference(setting, tuned.arm, to) if tuned.arm != to else None
            if known is None or known.bound or known.diverged or known.count < 2:
                continue
            names = f"{arm_title(tuned.arm)} minus {arm_title(to)}, {known.count} seeds"
            gaps = [_gap(tuned, study.results.tuned(setting, to), part) for part in _PARTS]
            rows.append([setting_title(setting), names, *gaps])
    if len(rows) > 1:
        yield "## Against steps: what fades\n"
        yield "Training loss minus the baseline's, of seeds in pairs, each arm at its own best rate: the mean over the"
        yield "eighth of all steps that ends there, and half its 95 % interval. Before the end an arm whose best rate"
        yield "is lower looks better than it is.\n"
        yield from table(rows)


def _gap(tuned: Tuned, fixed: Tuned, part: float) -> str:
    """Returns the difference over the last eighth of all steps before this part of them.

    The text is empty without losses there, or where one is not finite.
    """

    def losses(line: Mapping[str, Any]) -> np.ndarray:
        tokens, values = np.array(line["loss"], float).T
        return values[(tokens > (part - 1 / 8) * tokens[-1]) & (tokens <= part * tokens[-1])]

    pairs = [(losses(line), losses(fixed.lines[seed])) for seed, line in tuned.lines.items() if seed in fixed.lines]
    if not all(len(values) and np.isfinite(values).all() for pair in pairs for values in pair):
        return ""
    gap = Interval.of([float(one.mean() - other.mean()) for one, other in pairs])
    return f"{gap.mean:+.3f} ± {gap.half:.3f}"


def against_parameters(study: Material) -> Lines:
    """Draws loss over sizes and over budgets, and writes the laws fitted to it."""
    yield "## Against parameters, and fits\n"
    by_size = []
    for family in _families(study, study.results.settings, lambda setting: (setting[0], *setting[2:])):
        by_size += _families(study, family, study.results.kinds(family).__getitem__)
    by_tokens = _families(study, study.results.settings, lambda setting: (setting[0], setting[1], *setting[3:]))
    for family in by_size:
        if len(family) > 1 or family == [study.main]:
            name = f"parameters-{anchor(family[0])}.png"
            yield from study.picture(name, "loss against parameters", draw_growth, family)
    for family in by_tokens:
        if len(family) > 1:
            name = f"budgets-{family[0][0]}-{family[0][1]}-{'-'.join(family[0][3:])}.png"
            yield from study.picture(name, "loss against tokens trained on", draw_growth, family, True)
    fits = [
        line
        for families, over_tokens in ((by_size, False), (by_tokens, True))
        for family in families
        for line in _fits(study, family, over_tokens)
    ]
    if fits:
        yield from fits
        yield "±: half the 95 % interval, by the fit's linearisation; open: the points do not determine it.\n"
    else:
        sizes, budgets = (max(map(len, families), default=0) for families in (by_size, by_tokens))
        yield (
            f"No fit of L = E + A N^-a: it needs {LEAST_SIZES} sizes or budgets of an arm, all else equal; there "
            f"are at most {sizes} and {budgets}.\n"
        )


def _fits(study: Material, family: Sequence[Setting], over_tokens: bool) -> Lines:
    """Writes a table of the arms that have points enough for a law; nothing where there are none."""
    what, n = ("budgets", "tokens") if over_tokens else ("sizes", "parameters without embeddings")
    rows = [["arm", what, "E", "A", "a"]]
    for arm in dict.fromkeys(arm for setting in family for arm in study.results.arms(setting)):
        points = [
            ((setting[2] if over_tokens else tuned.non_embedding) / 1e6, loss)
            for setting in family
            if (tuned := study.results.tuned(setting, arm)) is not None
            for loss in tuned.losses.values()
        ]
        law = fit_power_law(*zip(*points, strict=True)) if points else None
        if law is not None:
            pairs = zip(law.values, law.halves, strict=True)
            fitted = [f"{value:.3g} ± {half:.2g}" if math.isfinite(half) else "open" for value, half in pairs]
            rows.append([arm_title(arm), str(len({x for x, _ in points})), *fitted])
    if len(rows) > 1:
        corpus, size, tokens, *plan = family[0]
        fixed = f"size {size_title(size)}" if over_tokens else f"{tokens / 1e6:g}M tokens"
        yield f"L = E + A N^-a over {what}, N in million {n} ({corpus}, {fixed}, {plan_title(*plan)}):\n"
        yield from table(rows)


def _families(study: Material, settings: Sequence[Setting], key: Callable[[Setting], tuple]) -> list[list[Setting]]:
    """Returns settings grouped by a key, smaller ones first."""
    families: dict[tuple, list[Setting]] = {}
    for setting in settings:
        families.setdefault(key(setting), []).append(setting)
    return [sorted(family, key=partial(_extent, study)) for family in families.values()]


def _extent(study: Material, setting: Setting) -> tuple[int, int]:
    """Returns the size and tokens of a setting, to sort by."""
    return max((tuned.non_embedding for tuned in study.tuned(setting)), default=0), setting[2]
