"""Draws the four forms of a mixture: docs/pictures/forms.svg.

    python tools/draw_forms.py            writes it, the same bytes each time

Each form goes from a token's vector x to the layer's output. Blue is a linear map, white an activation that stays
fixed, orange a mixture over the dictionary, and green is where the coefficients of the mixture come from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "draw_forms.py"
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "forms.svg"
LINEAR, FIXED, MIXED, GATE = "#cfe0f3", "#ffffff", "#fde8cf", "#d5ecd4"
EDGE, GATE_EDGE, NOTE = "#333333", "#2e7d32", "#555555"
SETTINGS = {"svg.hashsalt": "megatron_moa", "font.family": "DejaVu Sans"}  # without the salt, names differ each time
Y_SUM, Z_SUM, D_SUM = (rf"$\sum_{i} {c}_{i}\,\sigma_{i}({v})$" for i, c, v in ("kcy", "kcz", "ldz"))
PAIRS = r"$\sum_{k \leq l} c_{kl}\,\sigma_k(y)\,\sigma_l(z)$"
FORMS = {  # number of coefficients; what mixes W1's branch (quadratic: both branches); what mixes W2's
    "type1": ("K coefficients, in the place of GELU", Y_SUM, None),
    "one-sided": ("K coefficients, in the place of SwiGLU", None, Z_SUM),
    "bi-sided": ("2K coefficients, in the place of SwiGLU", Y_SUM, D_SUM),
    "quadratic": ("K(K+1)/2 coefficients, in the place of SwiGLU", PAIRS, None),
}


def _box(axes: Axes, x: float, y: float, text: str, color: str, size: tuple[float, float] = (0.8, 0.8)) -> None:
    """A rounded box around its middle."""
    corner = x - size[0] / 2, y - size[1] / 2
    axes.add_patch(FancyBboxPatch(corner, *size, "round,pad=0,rounding_size=0.12", facecolor=color, edgecolor=EDGE))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def _mixture(axes: Axes, x: float, y: float, text: str, height: float = 1.5) -> None:
    """A box of mixed activations: the sum, and below it curves of some of the dictionary."""
    _box(axes, x, y, "", MIXED, (2.9, height))
    axes.text(x, y + 0.36, text, ha="center", va="center", fontsize=9)
    t = np.linspace(-2.6, 1.6, 43)
    relu = np.maximum(t, 0)
    for number, curve in enumerate((relu, relu**2, t / (1 + np.exp(-t)), np.tanh(t), t)):
        shown = (curve > -1.01) & (curve < 1.4)
        axes.plot(x + 0.2 + 0.45 * t[shown], y - 0.42 + 0.24 * curve[shown], lw=1, color=f"C{number}")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], gate: bool = False) -> None:
    """A gate's arrow is dashed, and passes behind boxes."""
    style = {"color": GATE_EDGE, "linestyle": (0, (3, 2)), "zorder": 0} if gate else {"color": EDGE}
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, **style))


def draw_form(axes: Axes, form: str) -> None:
    """One panel: x on the left, the linear maps, the activations, their product, the last linear map."""
    count, on_y, on_z = FORMS[form]
    axes.text(-0.3, 5.3, form, fontsize=13, fontweight="bold", va="center")
    axes.text(10.8, 5.3, count, fontsize=9.5, va="center", ha="right", color=NOTE)
    axes.text(0.1, 2.9, "x", fontsize=12, ha="center", va="center", fontweight="bold")
    branches = {"$W_1$": ("y", 2.9)} if form == "type1" else {"$W_1$": ("y", 3.8), "$W_2$": ("z", 2.0)}
    product = form in ("one-sided", "bi-sided")
    for weight, (name, height) in branches.items():
        _arrow(axes, (0.35, 2.9), (1.3, height))
        _box(axes, 1.7, height, weight, LINEAR)
        axes.text(2.4, height + 0.2, f"${name}$", fontsize=10, ha="center")
        fixed = form == "one-sided" and name == "y"
        _arrow(axes, (2.1, height), (3.55 if fixed else 2.75, height))
        if fixed:
            _box(axes, 4.2, height, "SiLU", FIXED, (1.3, 0.8))
        elif form != "quadratic":
            _mixture(axes, 4.2, height, on_y if name == "y" else on_z)
        if product:
            _arrow(axes, (4.85 if fixed else 5.65, height), (6.92, 2.9 + (height - 2.9) / 5))
    if form == "quadratic":
        _mixture(axes, 4.2, 2.9, on_y, 3.3)
    if product:
        axes.add_patch(Circle((7.15, 2.9), 0.3, facecolor="white", edgecolor=EDGE))
        axes.text(7.15, 2.9, r"$\odot$", fontsize=12, ha="center", va="center")
    _arrow(axes, (7.45 if product else 5.65, 2.9), (8.2, 2.9))
    _box(axes, 8.6, 2.9, "$W_2$" if form == "type1" else "$W_3$", LINEAR)
    _arrow(axes, (9.0, 2.9), (9.75, 2.9))
    axes.text(9.8, 2.9, "output", fontsize=10, va="center")
    _box(axes, 5.2, 0.2, r"MoA: coefficients $\varphi(U x)$ of each token.   LA: free parameters.", GATE, (10.8, 0.66))
    _arrow(axes, (0.1, 2.6), (0.1, 0.55), gate=True)
    _arrow(axes, (4.2, 0.53), (4.2, 2.13 if form == "type1" else 1.23), gate=True)
    if form == "bi-sided":
        _arrow(axes, (4.2, 1.3), (4.2, 3.03), gate=True)
    axes.set(xlim=(-0.5, 11.0), ylim=(-0.3, 5.7), aspect="equal")
    axes.axis("off")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture and returns the exit code."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=OUTPUT, metavar="FILE", help="an SVG, or a PNG to look at")
    out = parser.parse_args(argv).out
    with one_line_errors(PROGRAM), matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11.3, 6.3), layout="constrained", facecolor="white")
        for form, axes in zip(FORMS, figure.subplots(2, 2).flat, strict=True):
            draw_form(axes, form)
        try:
            figure.savefig(out, metadata={"Date": None, "Creator": None} if out.suffix == ".svg" else None)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; name a file in a folder that is there") from None
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
