"""Pictures of an analysis of gates: how far each goes, and the activations that come of it. From the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_moa.reference import DEFINITIONS

_TOKENS, _MEAN = "tab:orange", "black"


def draw_curves(analysis: dict[str, Any], file: Path) -> None:
    """The effective activations: a row a layer, a panel a branch, at the mean coefficients and at sampled tokens'.

    A quadratic form has no curve a branch: its mean is a map over both pre-activations, and beside it the standard
    deviation over the tokens.

    Args:
        analysis: as tools/analyze_gates.py writes it.
        file: a PNG.
    """
    sites, form = analysis["sites"], analysis["mixing"]["form"]
    columns = 1 if form in ("type1", "one-sided") else 2
    with _figure(len(sites), columns, (0.6 + 3.4 * columns, 0.6 + 2.3 * len(sites)), file) as grid:
        for site, row in zip(sites, grid, strict=True):
            (_draw_maps if form == "quadratic" else _draw_branches)(analysis, site, row)


def _draw_branches(analysis: dict[str, Any], site: dict[str, Any], row: Sequence[Axes]) -> None:
    x, basis, mean, samples = _values(analysis, site, 161)
    size = len(basis)
    for number, (axes, branch) in enumerate(zip(row, ("activated", "linear"), strict=False)):
        part = slice(number * size, (number + 1) * size)
        for sample in samples[:, part]:
            axes.plot(x, sample @ basis, color=_TOKENS, alpha=0.5, linewidth=0.8)
        axes.plot(x, mean[part] @ basis, color=_MEAN, linewidth=1.6)
        axes.set_title(f"{site['title']}, {branch} branch", fontsize=9)
        axes.grid(alpha=0.3)


def _draw_maps(analysis: dict[str, Any], site: dict[str, Any], row: Sequence[Axes]) -> None:
    x, basis, mean, samples = _values(analysis, site, 81)
    size = len(basis)
    maps = basis.T @ samples.unflatten(-1, (size, size)) @ basis
    spread = maps.std(0) if len(samples) > 1 else torch.zeros(len(x), len(x))
    shown = (
        (basis.T @ mean.view(size, size) @ basis, "mean coefficients"),
        (spread, f"std over {len(samples)} random tokens"),
    )
    for axes, (values, title) in zip(row, shown, strict=True):
        image = axes.contourf(x, x, values.T, levels=20)
        axes.figure.colorbar(image, ax=axes)
        axes.set_title(f"{site['title']}, {title}", fontsize=9)
        axes.set_xlabel("activated branch", fontsize=7)
        axes.set_ylabel("linear branch", fontsize=7)


def _values(analysis: dict[str, Any], site: dict[str, Any], points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations [points], every activation there [K, points], the means [n], sampled tokens' [tokens, n]."""
    x = torch.linspace(-4, 4, points, dtype=torch.float64)
    basis = torch.stack([DEFINITIONS[name](x) for name in analysis["mixing"]["activations"]])
    mean = torch.tensor([gate["mean"] for gate in site["gates"]], dtype=torch.float64)
    samples = torch.tensor(site["sampled"], dtype=torch.float64).view(-1, len(mean))
    return x, basis, mean, samples


def draw_gates(analysis: dict[str, Any], file: Path) -> None:
    """Every gate's mean with its standard deviation over tokens, the part of it between token types darker: a row a
    layer. Arguments as :func:`draw_curves`.
    """
    sites = analysis["sites"]
    names = [gate["name"] for gate in sites[0]["gates"]]
    with _figure(len(sites), 1, (1.6 + 0.4 * len(names), 1.0 + 1.7 * len(sites)), file) as grid:
        for site, (panel,) in zip(sites, grid, strict=True):
            for place, gate in enumerate(site["gates"]):
                type_std = gate["std"] * (gate["type_share"] or 0) ** 0.5
                panel.errorbar(place, gate["mean"], gate["std"], color=_TOKENS, linewidth=4, alpha=0.5)
                panel.errorbar(place, gate["mean"], type_std, fmt="o", color=_MEAN, markersize=3, linewidth=1.2)
            panel.set_title(f"{site['title']}: mean and standard deviation; black: between token types", fontsize=9)
            panel.set_xticks(range(len(names)), [] if site is not sites[-1] else names, rotation=90)
            panel.grid(alpha=0.3)


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float], file: Path) -> Iterator[np.ndarray]:
    """Panels [rows, columns], a PNG in the end; what a user has configured takes no part."""
    with matplotlib.style.context("default", after_reset=True):
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        yield grid
        for axes in grid.flat:
            axes.tick_params(labelsize=7)
        figure.savefig(file, dpi=100, metadata={"Software": None})
