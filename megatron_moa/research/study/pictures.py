"""Draws a report's pictures.

An arm looks the same in all of them, and the same results give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from megatron_moa.research.figures import drawn
from megatron_moa.research.study.arms import ARMS, Arm
from megatron_moa.research.study.statistics import BASELINE, DIVERGED, UNTUNED, Results, Setting, fit_power_law

_SHADES = {"swiglu": "Greys", "relu2": "Greens", "gelu": "Oranges", "la": "Blues", "moa": "Reds", "polyrelu": "Purples"}
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
_PLANS = {"adamw": "AdamW", "muon": "Muon", "wsd": "WSD"}
PANELS = ("fixed, gated", "LA", "MoA", "not gated")
_UNKNOWN = Arm("", "", drawn_as="unknown")  # of results whose arm is not in the list any more


def arm_title(arm: str) -> str:
    """For tables and pictures; an arm that is not known any more keeps its name."""
    return ARMS[arm].title if arm in ARMS else arm


def size_title(size: str) -> str:
    """``0_4M`` in a study's file stands for 0.4M."""
    return size.replace("_", ".")


def setting_title(setting: Setting) -> str:
    """``python, size 0.4M, 2M tokens, AdamW, cosine``."""
    corpus, size, tokens, optimizer, schedule = setting
    return f"{corpus}, size {size_title(size)}, {tokens / 1e6:g}M tokens, {plan_title(optimizer, schedule)}"


def plan_title(optimizer: str, schedule: str) -> str:
    """``AdamW, cosine``."""
    return f"{_PLANS.get(optimizer, optimizer)}, {_PLANS.get(schedule, schedule)}"


def anchor(setting: Setting) -> str:
    """Part of a picture's file name."""
    corpus, size, tokens, optimizer, schedule = setting
    return f"{corpus}-{size}-{tokens / 1e6:g}M-{optimizer}-{schedule}"


def arm_panel(arm: str) -> str:
    """One of :data:`PANELS`."""
    known = ARMS.get(arm, _UNKNOWN)
    if not known.is_gated:
        return "not gated"
    return {"la": "LA", "moa": "MoA"}.get(known.family, "fixed, gated")


def style(arm: str) -> dict[str, str]:
    """Returns how an arm is drawn: colour by family, shade and marker within the family.

    Dashed and hollow is a mixture that starts at the fixed layer's scale.
    """
    known = ARMS.get(arm, _UNKNOWN)
    relatives = [name for name, other in ARMS.items() if other.family == known.family and other.unmatched is None]
    base = known.unmatched or arm
    number = relatives.index(base) if base in relatives else 0
    shade = 0.9 - 0.45 * number / max(1, len(relatives) - 1)
    of_fixed = any(other.mixture is None and other.family == known.family for other in ARMS.values())
    fixed_line = _LINES[number % len(_LINES)] if of_fixed else "-"
    colour = to_hex(colormaps[_SHADES.get(known.family, "YlOrBr")](shade))
    return {
        "color": colour,
        "markerfacecolor": "white" if known.unmatched else colour,
        "linestyle": "--" if known.unmatched else fixed_line,
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def draw_differences(results: Results, file: Path, setting: Setting) -> None:
    """Loss minus the baseline's, of every arm, with its interval; the best arm on top."""
    found = {arm: results.difference(setting, arm, BASELINE) for arm in results.arms(setting) if arm != BASELINE}
    rows = sorted(((arm, known) for arm, known in found.items() if known is not None), key=lambda row: -row[1].mean)
    with _figure(1, (8, 1.4 + 0.3 * len(rows)), file) as ((axes,),):
        axes.axvline(0, color="black", linewidth=0.8)
        for height, (arm, known) in enumerate(rows):
            colour = style(arm)["color"]
            face = "white" if known.count < 2 else colour
            axes.plot(known.mean, height, "o", color=colour, markerfacecolor=face)
            if known.count > 1:
                axes.plot([known.low, known.high], [height, height], color=colour, linewidth=2)
        axes.set_yticks(range(len(rows)), [arm_title(arm) for arm, _ in rows])
        axes.set(
            xlabel="validation loss minus SwiGLU's (nats per token); hollow: one seed", title=setting_title(setting)
        )


def draw_rates(results: Results, file: Path, setting: Setting) -> None:
    """Loss of the tuning seed against learning rate; a panel a family, SwiGLU in each."""
    panels: dict[str, list[str]] = {name: [] for name in PANELS}
    for arm in results.arms(setting):
        tuned = results.tuned(setting, arm)
        if tuned is not None and len(tuned.rates) > 1:
            panels[arm_panel(arm)].append(arm)
    shown = {name: arms for name, arms in panels.items() if arms}
    together = list(chain(*shown.values()))
    if len(together) <= 8:
        shown = {"": together}
    ends = []
    with _figure(len(shown), (8.5, 1 + 2.6 * len(shown)), file) as grid:
        for (axes,), (name, arms) in zip(grid, shown.items(), strict=True):
            with_baseline = [BASELINE] if BASELINE not in arms and results.tuned(setting, BASELINE) else []
            for arm in with_baseline + arms:
                rates = results.tuned(setting, arm).rates
                finite = [rate for rate in rates if math.isfinite(rates[rate])]
                axes.plot(finite, [rates[rate] for rate in finite], **style(arm), markersize=4, label=arm_title(arm))
                ends += [rates[rate] for rate in finite]
            axes.set(ylabel="validation loss", title=name)
        ticks = sorted({rate for arm in together for rate in results.tuned(setting, arm).rates})
        axes.set_xscale("log")  # of all: they share it
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _cut(grid, ends)
        grid[-1][0].set_xlabel(f"peak learning rate (seed {results.tuning_seed})")
        grid[0][0].figure.suptitle(setting_title(setting))


def _cut(grid: Sequence[Sequence[Axes]], values: Sequence[float]) -> None:
    """Gives all panels one y axis, up to three times what most arms lose.

    A run that all but diverged would hide the rest.
    """
    low, middle, high = min(values), float(np.quantile(values, 0.75)), max(values)
    top = min(high, low + 3 * (middle - low)) if middle > low else high
    margin = 0.05 * (top - low) or 0.01
    for (axes,) in grid:
        axes.set_ylim(low - margin, top + margin)


def draw_curves(
    results: Results, file: Path, setting: Setting, arms: Sequence[str], milliseconds: dict[str, float] | None = None
) -> None:
    """Draws training loss at each arm's best rate, and how far it is from the baseline's.

    The distance is over the seeds that both have.

    Args:
        arms: to draw, the baseline among them.
        milliseconds: of a step, by arm: against time; None: against tokens.
    """
    with _figure(2, (9, 7), file) as grid:
        (above,), (below,) = grid
        below.axhline(0, color="black", linewidth=0.8)
        for arm in arms:
            drawn = style(arm) | {"marker": ""}
            x, values = _course(results, setting, arm, milliseconds)
            above.plot(x, np.mean(list(values.values()), 0), **drawn, label=arm_title(arm))
            if arm == BASELINE:
                continue
            x0, reference = _course(results, setting, BASELINE, milliseconds)
            seeds = [seed for seed in values if seed in reference]
            inside = (x0 >= x[0]) & (x0 <= x[-1])
            gaps = [np.interp(x0[inside], x, values[seed]) - reference[seed][inside] for seed in seeds]
            if gaps:
                below.plot(x0[inside], np.mean(gaps, 0), **drawn, label=arm_title(arm))
        above.set(ylabel="training loss", title=setting_title(setting))
        unit = "million tokens" if milliseconds is None else "seconds of training, as timed for the arm alone"
        below.set(xlabel=unit, ylabel="minus SwiGLU's, same seeds")
        _frame(above, above.lines, 0.1)
        _frame(below, below.lines[1:], 0.2, with_zero=True)


def _frame(axes: Axes, lines: Sequence[Line2D], part: float, with_zero: bool = False) -> None:
    """Fits a y axis to what follows the first part of a training.

    Differences in that part are far larger than those that last.
    """
    values = [value for line in lines for value in line.get_ydata()[int(part * len(line.get_ydata())) :]]
    values += [0.0] if with_zero else []
    margin = 0.05 * (max(values) - min(values)) or 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _course(
    results: Results, setting: Setting, arm: str, milliseconds: dict[str, float] | None
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Where the loss is known, and there, by seed, the mean of five neighbours."""
    lines = results.tuned(setting, arm).lines
    tokens = np.array(next(iter(lines.values()))["loss"], float)[:, 0]
    width = min(5, len(tokens))
    kernel = np.ones(width) / width
    values = {}
    for seed, line in lines.items():
        values[seed] = np.convolve(np.interp(tokens, *np.array(line["loss"], float).T), kernel, "valid")
    x = np.convolve(tokens, kernel, "valid")
    if milliseconds is None:
        return x / 1e6, values
    iterations = next(iter(lines.values()))["iterations"]
    return x / tokens[-1] * iterations * milliseconds[arm] / 1000, values


def draw_growth(results: Results, file: Path, settings: Sequence[Setting], against_tokens: bool = False) -> None:
    """Draws loss at the best rate against non-embedding parameters, or tokens.

    The difference to the baseline is below, with its interval; the fitted law is a thin line where there are points
    enough for one.

    Args:
        settings: that differ in the size, or in the tokens, alone.
    """
    arms = list(dict.fromkeys(arm for setting in settings for arm in results.arms(setting)))
    if len(settings) > 1:
        arms = [arm for arm in arms if sum(results.tuned(setting, arm) is not None for setting in settings) > 1]
    with _figure(2, (9, 8), file) as grid:
        (above,), (below,) = grid
        below.axhline(0, color="black", linewidth=0.8)
        for arm in arms:
            known = [(setting, results.tuned(setting, arm)) for setting in settings]
            x = {s: (s[2] if against_tokens else tuned.non_embedding) / 1e6 for s, tuned in known if tuned is not None}
            drawn = style(arm) | {"markersize": 4}
            above.plot(x.values(), [tuned.loss.mean for _, tuned in known if tuned], **drawn, label=arm_title(arm))
            points = [(x[s], loss) for s, tuned in known if tuned for loss in tuned.losses.values()]
            law = fit_power_law(*zip(*points, strict=True)) if points else None
            if law is not None:
                places = np.geomspace(min(x.values()), max(x.values()), 50)
                above.plot(places, law(places), color=drawn["color"], linewidth=0.6)
            gaps = {s: results.difference(s, arm, BASELINE) for s in x if arm != BASELINE}
            gaps = {s: gap for s, gap in gaps.items() if gap is not None and gap.verdict not in (UNTUNED, DIVERGED)}
            below.plot([x[s] for s in gaps], [gap.mean for gap in gaps.values()], **drawn)
            for s, gap in gaps.items():
                below.plot([x[s]] * 2, [gap.low, gap.high], color=drawn["color"], linewidth=0.8)
        corpus, size, tokens, optimizer, schedule = settings[0]
        fixed = f"size {size_title(size)}" if against_tokens else f"{tokens / 1e6:g}M tokens"
        above.set(ylabel="validation loss", title=f"{corpus}, {fixed}, {plan_title(optimizer, schedule)}")
        below.set(ylabel="minus SwiGLU's, paired")
        below.set_xlabel("million tokens" if against_tokens else "million parameters without embeddings")
        below.set_xscale("log")
        below.xaxis.set_major_formatter("{x:g}")
        below.xaxis.set_minor_formatter("{x:g}")


@contextmanager
def _figure(rows: int, size: tuple[float, float], file: Path) -> Iterator[np.ndarray]:
    """Yields panels [rows, 1] with one x axis, and writes them as a PNG in the end; legends are outside."""
    with drawn(rows, 1, size, file, same_x=True) as grid:
        yield grid
        for axes in grid.flat:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
