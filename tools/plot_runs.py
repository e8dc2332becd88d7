"""Draws the losses and coefficients of runs beside one another, as PNG files.

    python tools/plot_runs.py runs/dense-0.12b-none runs/dense-0.12b-moa --baseline runs/dense-0.12b-none
    python tools/plot_runs.py a/1 a/2 b/1 b/2 --labels SwiGLU SwiGLU MoA MoA --baseline a/1      two seeds an arm

Losses are drawn against tokens and time, and as differences to a baseline. A RUN is a run's folder (its tensorboard/,
else its train.log), a folder of TensorBoard files, or a log file. Runs with the same label are seeds of one arm: drawn
as their mean, with a band of one standard deviation. Training losses are smoothed by a running mean; differences are
taken at the same number of tokens, the later run interpolated.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.runs.curves import Course, Curve, Statistics, read_course

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRAM = "plot_runs.py"
_TOKEN_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_TIME_UNITS = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))


@dataclass(frozen=True)
class LabelledRuns:
    """Runs of one label."""

    label: str
    runs: tuple[Course, ...]

    @property
    def title(self) -> str:
        """The label, with the number of runs where there are several."""
        return self.label if len(self.runs) == 1 else f"{self.label} ({len(self.runs)} runs)"


def smoothed(curve: Curve, part: float) -> Curve:
    """The curve's running mean over a part of its points, centred, over what there is of that at its ends."""
    half = int(part * len(curve) / 2)
    if half < 1:
        return curve
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    first = np.maximum(np.arange(len(curve)) - half, 0)
    last = np.minimum(np.arange(len(curve)) + half + 1, len(curve))
    return Curve(curve.tokens, curve.seconds, (sums[last] - sums[first]) / (last - first))


def stacked(curves: Sequence[Curve], along: str, grid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Curves at common places.

    Args:
        curves: of one arm.
        along: ``tokens`` or ``seconds``.
        grid: places wanted; default: those of the first curve.

    Returns:
        The places that all curves reach, [m], and the values there, [curves, m], interpolated.
    """
    places = [getattr(curve, along) for curve in curves]
    grid = places[0] if grid is None else grid
    inside = (grid >= max(place[0] for place in places)) & (grid <= min(place[-1] for place in places))
    grid = grid[inside]
    values = [np.interp(grid, place, curve.values) for place, curve in zip(places, curves, strict=True)]
    return grid, np.array(values)


def difference(curves: Sequence[Curve], baseline: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """An arm's curves less the mean of the baseline's, at the baseline's numbers of tokens.

    Returns:
        Tokens, [m], and differences, [curves, m]; m is 0 where the two have none in common.
    """
    grid, values = stacked(baseline, "tokens")
    common, others = stacked(curves, "tokens", grid)
    return common, others - values.mean(0)[np.isin(grid, common)]


def arms_of(
    paths: Sequence[Path], labels: Sequence[str] | None, baseline: Path | None
) -> tuple[list[LabelledRuns], LabelledRuns | None]:
    """Runs by label, in the order given, and which arm is the baseline (None without one).

    Raises:
        UserError: labels that are not one a run, or runs that cannot be read.
    """
    if labels is not None and len(labels) != len(paths):
        raise UserError(f"--labels: {len(labels)} for {len(paths)} runs; give one for each RUN")
    paths, names = list(paths), None if labels is None else list(labels)
    if baseline is not None and baseline not in paths:
        paths.insert(0, baseline)
        if names is not None:
            names.insert(0, default_labels([baseline])[0])
    names = names or default_labels(paths)
    grouped: dict[str, list[Course]] = {}
    for path, name in zip(paths, names, strict=True):
        grouped.setdefault(name, []).append(read_course(path))
    arms = [LabelledRuns(label, tuple(runs)) for label, runs in grouped.items()]
    reference = names[paths.index(baseline)] if baseline is not None else None
    return arms, next((arm for arm in arms if arm.label == reference), None)


def default_labels(paths: Sequence[Path]) -> list[str]:
    """The runs' names, and as much of the path before them as tells them apart."""
    parts = [path.resolve().with_suffix("" if path.is_file() else path.suffix).parts for path in paths]
    # Not what all runs' folders are called inside.
    parts = [part[:-1] if len(part) > 2 and part[-1] in ("tensorboard", "train") else part for part in parts]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def pyplot() -> ModuleType:
    """Matplotlib's pyplot, drawing into files; imported once the runs are read, as that takes seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


class Page:
    """A figure with the arms' colours, and where it is written."""

    def __init__(self, arms: Sequence[LabelledRuns], folder: Path) -> None:
        palette = pyplot().get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
        self.colors = {arm.label: palette[index % len(palette)] for index, arm in enumerate(arms)}
        self.folder = folder
        self.pending: list[tuple[Path, Figure]] = []

    def draw(self, axes: Axes, arm: LabelledRuns, places: np.ndarray, values: np.ndarray, **style: object) -> None:
        """The mean of values [runs, m] at places [m], and for several runs a band of one standard deviation."""
        color, mean = self.colors[arm.label], values.mean(0)
        axes.plot(places, mean, color=color, label=arm.title, linewidth=1.5, **style)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            axes.fill_between(places, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)

    def finish(self, figure: Figure, name: str) -> None:
        """Lays the figure out, to be written when all figures are drawn.

        A further figure of a name gets a number behind it.
        """
        for axes in figure.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)
        figure.tight_layout()
        path = self.folder / f"{name}.png"
        taken, number = {other for other, _ in self.pending}, 1
        while path in taken:
            number += 1
            path = self.folder / f"{name}-{number}.png"
        self.pending.append((path, figure))

    def write(self) -> list[Path]:
        """Writes all figures. Raises UserError if they cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path, figure in self.pending:
                figure.savefig(path, dpi=150)
                pyplot().close(figure)
        except OSError as error:
            raise UserError(f"--output {self.folder}: cannot be written to ({error.strerror}); name another") from None
        return [path for path, _ in self.pending]


def token_unit(most: float) -> tuple[float, str]:
    """What tokens are divided by, and the axis's label."""
    for size, name in _TOKEN_UNITS:
        if most >= size:
            return size, f"tokens ({name})"
    return 1.0, "tokens"


def time_unit(most: float) -> tuple[float, str]:
    """What seconds are divided by, and the axis's label."""
    for least, size, name in _TIME_UNITS:
        if most >= least:
            return size, f"time ({name})"
    return 1.0, "time (seconds)"


def new_axes(x: str, y: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of panels below one another that share the x axis."""
    figure, axes = pyplot().subplots(panels, 1, figsize=(7.2, 1.4 + 3.2 * panels), sharex=True, squeeze=False)
    for panel in axes[:, 0]:
        panel.grid(alpha=0.3, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylabel(y)
    axes[-1, 0].set_xlabel(x)
    return figure, list(axes[:, 0])


def draw_training(page: Page, arms: Sequence[LabelledRuns], along: str, part: float) -> None:
    """Draws the training loss against tokens or seconds.

    The fall of the first steps is cut off, or the fall is all there is to see.
    """
    most = max(getattr(run.loss, along)[-1] for arm in arms for run in arm.runs)
    size, label = token_unit(most) if along == "tokens" else time_unit(most)
    figure, (axes,) = new_axes(label, "training loss (nats per token)")
    settled = []
    for arm in arms:
        places, values = stacked([smoothed(run.loss, part) for run in arm.runs], along)
        if not len(places):
            raise UserError(f"{arm.label}: its runs have no {along} in common; label them apart")
        if len(arm.runs) == 1:
            raw = arm.runs[0].loss
            axes.plot(getattr(raw, along) / size, raw.values, color=page.colors[arm.label], alpha=0.2, linewidth=0.6)
        page.draw(axes, arm, places / size, values)
        settled.append(after_the_fall(places, values))
    frame(axes, settled)
    page.finish(figure, f"loss-{'tokens' if along == 'tokens' else 'time'}")


def after_the_fall(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [runs, m] at places [m] without those of the first twentieth."""
    return values[:, places >= places[0] + 0.05 * (places[-1] - places[0])]


def frame(axes: Axes, shown: Sequence[np.ndarray]) -> None:
    """Limits of the y axis: what of these values is finite, and the bands of several runs."""
    edges = [values.mean(0) + side * values.std(0, ddof=1) for values in shown if len(values) > 1 for side in (-1, 1)]
    finite = np.concatenate([values[np.isfinite(values)] for values in (*shown, *edges)])
    if finite.size and finite.min() < finite.max():
        margin = 0.05 * (finite.max() - finite.min())
        axes.set_ylim(finite.min() - margin, finite.max() + margin)


def draw_validation(page: Page, arms: Sequence[LabelledRuns]) -> None:
    """Validation loss against tokens; nothing where no run was evaluated."""
    evaluated = with_validation(arms)
    if not evaluated:
        return
    size, label = token_unit(max(run.validation.tokens[-1] for arm in evaluated for run in arm.runs))
    figure, (axes,) = new_axes(label, "validation loss (nats per token)")
    for arm in evaluated:
        places, values = stacked([run.validation for run in arm.runs], "tokens")
        page.draw(axes, arm, places / size, values, marker="o", markersize=3)
    page.finish(figure, "validation")


def with_validation(arms: Sequence[LabelledRuns]) -> list[LabelledRuns]:
    """The arms all of whose runs were evaluated."""
    return [arm for arm in arms if all(len(run.validation) for run in arm.runs)]


def draw_difference(page: Page, arms: Sequence[LabelledRuns], baseline: LabelledRuns, part: float) -> None:
    """Losses less the baseline's, of training and, where there is one, of validation.

    Raises:
        UserError: an arm has no tokens in common with the baseline.
    """
    kinds: list[tuple[str, Callable[[Course], Curve], Sequence[LabelledRuns], dict]] = [
        ("training", lambda run: smoothed(run.loss, part), arms, {})
    ]
    evaluated = with_validation(arms)
    if baseline in evaluated and len(evaluated) > 1:
        kinds.append(("validation", lambda run: run.validation, evaluated, {"marker": "o", "markersize": 3}))
    size, label = token_unit(max(run.loss.tokens[-1] for run in baseline.runs))
    figure, panels = new_axes(label, "", len(kinds))
    for axes, (kind, curve_of, shown, style) in zip(panels, kinds, strict=True):
        axes.set_ylabel(f"{kind} loss less that of\n{baseline.label} (nats per token)")
        axes.axhline(0, color="black", linewidth=0.8)
        reference, settled = [curve_of(run) for run in baseline.runs], []
        for arm in shown:
            if arm is baseline:
                continue
            places, values = difference([curve_of(run) for run in arm.runs], reference)
            if not len(places):
                raise UserError(f"{arm.label}: no number of tokens in common with {baseline.label}, the baseline")
            page.draw(axes, arm, places / size, values, **style)
            settled.append(after_the_fall(places, values))
        frame(axes, [*settled, np.zeros(1)])
    page.finish(figure, "difference")


def draw_coefficients(page: Page, arm: LabelledRuns, statistics: Statistics) -> None:
    """Mean and standard deviation over tokens of each coefficient in each layer, as two maps."""
    rows, columns = statistics.mean.shape
    width = 3.0 + (0.6 if columns <= 20 else 0.4) * columns
    figure, panels = pyplot().subplots(1, 2, figsize=(width, 2.2 + 0.24 * rows), sharey=True)
    for axes, title, values in zip(
        panels, ("mean over tokens", "standard deviation"), (statistics.mean, statistics.std), strict=True
    ):
        image = axes.imshow(values, aspect="auto", interpolation="nearest")
        if columns <= 20 and rows <= 40:
            middle = (values.min() + values.max()) / 2
            for (row, column), value in np.ndenumerate(values):
                color = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(columns), statistics.names, rotation=90, fontsize=8 if columns <= 20 else 6)
        every = -(-rows // 40)
        axes.set_yticks(range(0, rows, every), statistics.layers[::every], fontsize=8)
        figure.colorbar(image, ax=axes, fraction=0.05)
    of = f", {arm.runs[0].path}" if len(arm.runs) > 1 else ""
    figure.suptitle(f"coefficients of {arm.label}{of}, iteration {statistics.iteration}", fontsize=11)
    page.finish(figure, f"coefficients-{re.sub(r'[^A-Za-z0-9._-]+', '-', arm.label)[:100]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws, writes, and prints what was written."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or its log file")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="one a RUN; the same for seeds of one arm")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="what differences are taken to, with its arm")
    parser.add_argument("--output", type=Path, default=Path("plots"), metavar="FOLDER", help="default: plots")
    parser.add_argument(
        "--smooth", type=float, default=0.02, metavar="PART", help="of a run, that the mean is over; default: 0.02"
    )
    options = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        if not 0 <= options.smooth < 1:
            raise UserError(f"--smooth {options.smooth:g}: not a part of a run; give 0 (not at all) to 0.5")
        if options.output.exists() and not options.output.is_dir():
            raise UserError(f"--output {options.output}: is a file; give a folder")
        arms, baseline = arms_of(options.runs, options.labels, options.baseline)
        if baseline is not None and len(arms) == 1:
            raise UserError(
                f"--baseline {options.baseline}: every run is the baseline's; name another, or label them apart"
            )
        page = Page(arms, options.output)
        draw_training(page, arms, "tokens", options.smooth)
        draw_training(page, arms, "seconds", options.smooth)
        draw_validation(page, arms)
        if baseline is not None:
            draw_difference(page, arms, baseline, options.smooth)
        for arm in arms:
            if arm.runs[0].coefficients is not None:
                draw_coefficients(page, arm, arm.runs[0].coefficients)
        for path in page.write():
            print(path)


if __name__ == "__main__":
    main()
