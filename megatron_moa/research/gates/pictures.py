"""Draws an analysis of gates from its JSON.

The pictures show how much each gate varies, and the activations that result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from megatron_moa.mixture.reference import DEFINITIONS
from megatron_moa.research.figures import drawn

_TOKENS, _MEAN = "tab:orange", "black"


def draw_curves(analysis: dict[str, Any], file: Path) -> None:
    """Draws the effective activations at the mean coefficients and at those of sampled tokens.

    A row is a layer, a panel a mixed branch. A quadratic form has no curve for each branch: its mean is a map over both
    pre-activations, and beside that the standard deviation over the tokens.

    Args:
        analysis: as tools/analyze_gates.py writes it.
        file: a PNG.
    """
    sites, form = analysis["sites"], analysis["mixing"]["form"]
    panels = {"type1": ("activated",), "one-sided": ("linear",)}.get(form, ("activated", "linear"))
    with _figure(len(sites), len(panels), (0.6 + 3.4 * len(panels), 0.6 + 2.3 * len(sites)), file) as grid:
        for site, row in zip(sites, grid, strict=True):
            if form == "quadratic":
                _draw_maps(analysis, site, row)
            else:
                _draw_branches(analysis, site, dict(zip(panels, row, strict=True)))


def _draw_branches(analysis: dict[str, Any], site: dict[str, Any], panels: dict[str, Axes]) -> None:
    x, basis, mean, samples = _values(analysis, site, 161)
    size = len(basis)
    for number, (branch, axes) in enumerate(panels.items()):
        part = slice(number * size, (number + 1) * size)
        for sample in samples[:, part]:
            axes.plot(x, sample @ basis, color=_TOKENS, alpha=0.5, linewidth=0.8)
        axes.plot(x, mean[part] @ basis, color=_MEAN, linewidth=1.6)
        axes.set_title(f"{site['title']}, {branch} branch", fontsize=9)
        axes.grid(alpha=0.3)


def _draw_maps(analysis: dict[str, Any], site: dict[str, Any], row: Sequence[Axes]) -> None:
    x, basis, mean, samples = _values(analysis, site, 81)
    maps = quadratic_map(basis, samples)
    spread = maps.std(0) if len(samples) > 1 else torch.zeros(len(x), len(x))
    shown = (
        (quadratic_map(basis, mean), "mean coefficients"),
        (spread, f"std over {len(samples)} random tokens"),
    )
    for axes, (values, title) in zip(row, shown, strict=True):
        image = axes.contourf(x, x, values.T, levels=20)
        axes.figure.colorbar(image, ax=axes)
        axes.set_title(f"{site['title']}, {title}", fontsize=9)
        axes.set_xlabel("activated branch", fontsize=7)
        axes.set_ylabel("linear branch", fontsize=7)


def quadratic_map(basis: Tensor, coefficients: Tensor) -> Tensor:
    """sum_{k <= l} c_kl sigma_k(y) sigma_l(z) over y (rows) and z (columns).

    Args:
        basis: [K, points], every activation at the points.
        coefficients: [..., K(K+1)/2], row-major over k <= l.

    Returns:
        [..., points, points]
    """
    first, second = torch.triu_indices(len(basis), len(basis))
    return torch.einsum("...n,ny,nz->...yz", coefficients, basis[first], basis[second])


def _values(analysis: dict[str, Any], site: dict[str, Any], points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns points, the activations there, and the coefficients to draw.

    Pre-activations are [points], every activation there [K, points], the coefficients' means [n], and those of sampled
    tokens [tokens, n].
    """
    x = torch.linspace(-4, 4, points, dtype=torch.float64)
    basis = torch.stack([DEFINITIONS[name](x) for name in analysis["mixing"]["activations"]])
    mean = torch.tensor([gate["mean"] for gate in site["gates"]], dtype=torch.float64)
    samples = torch.tensor(site["sampled"], dtype=torch.float64).view(-1, len(mean))
    return x, basis, mean, samples


def draw_gates(analysis: dict[str, Any], file: Path) -> None:
    """Draws every gate's mean with its standard deviation over tokens, a row a layer.

    The part of the deviation between token types is darker. Arguments as :func:`draw_curves`.
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
    """Yields panels [rows, columns] with small numbers on their axes, and writes them as a PNG in the end."""
    with drawn(rows, columns, size, file) as grid:
        yield grid
        for axes in grid.flat:
            axes.tick_params(labelsize=7)
