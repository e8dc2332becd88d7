"""One mixed hidden unit against wider layers that only come near it: fixed ⊂ LA ⊂ MoA (arXiv 2605.26647), by fits.

    python examples/theory/containment.py --out runs/containment

Fixed ⊂ LA (theorem 4.1). relu(x) + relu(x)² is one hidden unit of LA over relu and relu2. No layer W2 σ(W1 x + b1) + b2
of one activation is that function, however wide. With ReLU a layer is linear in pieces, and the target bends; with
relu2 its derivative is continuous, with GELU, tanh and in SwiGLU it has all derivatives, and the target has a kink.

LA ⊂ MoA (theorem 4.2). tanh(2 x₁) relu(x₂) is one hidden unit of MoA over relu with a tanh gate. A Type I layer of LA
is a sum of ridge functions φ_j(w_j·x) of different directions w_j. Take derivatives along directions orthogonal to each
w_j, one after the other: nothing is left of the sum. Of the target there is, where x₂ > 0: a combination of x₂ tanh⁽ᵐ⁾
and tanh⁽ᵐ⁻¹⁾, and tanh is no polynomial.

Fine print. "Is not" does not say "is far from": with more units or larger weights every such layer comes as near on an
interval as one likes; (relu2(x + e) - relu2(x - e)) / 4e tends to relu. The error of a fit is an upper bound, the best
of a few starts; a lower bound is known of ReLU only. And the targets do not separate everything: relu gated by a linear
branch with biases, relu(x) (x + 1), is the first; bi-sided LA has the second as a product. Both are fitted too.

Levenberg-Marquardt (scipy) in float64 on megatron_moa.reference; half a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.config import TYPE1_DICTIONARY, MixingConfig
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.output_folder import written_folder
from megatron_moa.reference import gate, mix

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PROGRAM = "containment.py"
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
STEEPNESS = 2.0  # λ of the second target
REACH = 2.0  # inputs lie in [-2, 2]
EXACT = 1e-14  # a relative error below it is rounding
STARTS = 3


@dataclass(frozen=True)
class Target:
    """A function to fit: [t, d] -> [t], on a grid of so many points a side."""

    name: str
    dimensions: int
    points: int
    function: Callable[[Tensor], Tensor]

    def grid(self, finer: int = 1) -> Tensor:
        """[t, d] float64."""
        side = torch.linspace(-REACH, REACH, finer * self.points, dtype=torch.float64)
        return torch.cartesian_prod(*[side] * self.dimensions).view(-1, self.dimensions)


SUM = Target("relu(x) + relu(x)²", 1, 401, lambda x: x[:, 0].relu() + x[:, 0].relu().square())
RIDGE = Target("tanh(2 x₁) relu(x₂)", 2, 21, lambda x: torch.tanh(STEEPNESS * x[:, 0]) * x[:, 1].relu())


@dataclass(frozen=True)
class Layer:
    """A feed-forward layer [t, d] -> [t] of any width, its parameters in one float64 vector.

    Attributes:
        name: for reading.
        target: what it shall fit.
        mixing: the mixture.
        exact: the parameters, in the order of :meth:`shapes`, with which one hidden unit is the target; None if there
            are none.
        fixed: the coefficients are the constant 1: a layer of one activation.
        bias: there are b1 and b2.
    """

    name: str
    target: Target
    mixing: MixingConfig
    exact: tuple[float, ...] | None = None
    fixed: bool = False
    bias: bool = False

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """fc1 by branch, with b1 as a last column; fc2 with b2 at its end; the gate's vectors, or LA's coefficients."""
        inputs, n = self.target.dimensions + self.bias, self.mixing.num_coefficients
        shapes = {"fc1": (1 + self.mixing.gated, width, inputs), "fc2": (width + self.bias,)}
        if not self.fixed:
            shapes["coefficients"] = (n, inputs) if self.mixing.mixing == "moa" else (n,)
        return shapes

    def parts(self, parameters: Tensor, width: int) -> dict[str, Tensor]:
        """Views of the vector, or of one for each token [t, parameters]."""
        shapes = self.shapes(width)
        pieces = parameters.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return {name: piece.unflatten(-1, shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}

    def hidden(self, parameters: Tensor, x: Tensor, width: int) -> Tensor:
        """fc2's input for x [t, d]: [t, f], or [t, f + 1] with the ones of b2."""
        parts = self.parts(parameters, width)
        column = F.pad(x, (0, int(self.bias)), value=1.0).unsqueeze(-1)
        coefficients = parts.get("coefficients", x.new_ones(1))
        if self.mixing.mixing == "moa":
            coefficients = gate((coefficients @ column).squeeze(-1), self.mixing)
        preactivation = (parts["fc1"].flatten(-3, -2) @ column).squeeze(-1)
        return F.pad(mix(preactivation, coefficients, self.mixing), (0, int(self.bias)), value=1.0)

    def __call__(self, parameters: Tensor, x: Tensor, width: int) -> Tensor:
        """The output [t] for x [t, d], of parameters for all tokens or for each."""
        return (self.hidden(parameters, x, width) * self.parts(parameters, width)["fc2"]).sum(-1)

    def error(self, parameters: Tensor, width: int) -> float:
        """Root mean square of what is missing to the target, over the target's; on a grid finer than the fitted one."""
        x = self.target.grid(finer=3)
        wanted = self.target.function(x)
        return ((self(parameters, x, width) - wanted).square().mean() / wanted.square().mean()).sqrt().item()


def mixture(mixing: str, *activations: str, form: str = "type1", gate: str = "sigmoid") -> MixingConfig:
    """Its settings."""
    return MixingConfig(mixing=mixing, form=form, activations=activations, gate=gate)


def fixed_layer(name: str, activation: str, form: str = "type1", exact: tuple[float, ...] | None = None) -> Layer:
    """A layer of one activation with biases; one-sided: gated by a linear branch, as SwiGLU is."""
    return Layer(name, SUM, mixture("la", activation, form=form), exact, fixed=True, bias=True)


LA = Layer("LA over relu, relu2", SUM, mixture("la", "relu", "relu2"), (1.0, 1.0, 1.0, 1.0))
MOA = Layer("MoA over relu, tanh gate", RIDGE, mixture("moa", "relu", gate="tanh"), (0.0, 1.0, 1.0, STEEPNESS, 0.0))
LAYERS = (
    fixed_layer("ReLU", "relu"),
    fixed_layer("relu2", "relu2"),
    fixed_layer("GELU", "gelu"),
    fixed_layer("tanh", "tanh"),
    fixed_layer("SwiGLU", "silu", "one-sided"),
    LA,
    fixed_layer("ReGLU with biases", "relu", "one-sided", (1.0, 0.0, 1.0, 1.0, 1.0, 0.0)),
    Layer("LA over seven activations", RIDGE, mixture("la", "identity", *TYPE1_DICTIONARY), bias=True),
    MOA,
    Layer(
        "LA, bi-sided, relu and tanh",
        RIDGE,
        mixture("la", "relu", "tanh", form="bi-sided"),
        (STEEPNESS, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0),  # tanh of one branch, relu of the other
    ),
)


def relu_bound(width: int) -> float:
    """No ReLU layer of this width has a smaller error on the first target (as an integral over [-2, 2]).

    On [0, 2] it is at most width + 1 straight pieces. The best straight line is off x² by sqrt(l^5 / 180) on a length
    l, in L²; equal lengths are best.
    """
    missing = REACH**5 / 180 / (width + 1) ** 4
    return math.sqrt(missing / (REACH**3 / 3 + REACH**4 / 2 + REACH**5 / 5))


@dataclass(frozen=True)
class Fit:
    """The best layer found at a width: its parameters, and :meth:`Layer.error`."""

    width: int
    parameters: Tensor
    error: float


def random_start(layer: Layer, width: int, generator: torch.Generator, narrower: Fit | None) -> Tensor:
    """Normal weights, hinges all over the inputs; fc1 and mixture of a narrower fit; fc2 by linear least squares."""
    size = sum(math.prod(shape) for shape in layer.shapes(width).values())
    parameters = torch.randn(size, generator=generator, dtype=torch.float64)
    parts = layer.parts(parameters, width)
    if layer.bias:
        weight = parts["fc1"][..., :-1]
        hinges = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 * REACH - REACH
        parts["fc1"][..., -1] = -(weight * hinges).sum(-1)
    if narrower is not None:
        old = layer.parts(narrower.parameters, narrower.width)
        parts["fc1"][:, : narrower.width] = old["fc1"]
        if not layer.fixed:
            parts["coefficients"][:] = old["coefficients"]
    x = layer.target.grid()
    wanted = layer.target.function(x).unsqueeze(1)
    parts["fc2"][:] = torch.linalg.lstsq(layer.hidden(parameters, x, width), wanted, driver="gelsd").solution[:, 0]
    return parameters


def fit(layer: Layer, width: int, seed: int, starts: int = STARTS, narrower: Fit | None = None) -> Fit:
    """The best of several starts, the first from a narrower fit if there is one; ends with one that is exact."""
    x = layer.target.grid()
    wanted = layer.target.function(x)

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        # A copy for each token: one backward pass gives all rows.
        copies = torch.from_numpy(parameters).expand(len(x), -1).requires_grad_()
        return torch.autograd.grad(layer(copies, x, width).sum(), copies)[0].numpy()

    generator = torch.Generator().manual_seed(seed)
    fits: list[Fit] = []
    while len(fits) < starts and not (fits and fits[-1].error < EXACT):
        start = random_start(layer, width, generator, None if fits else narrower)
        found = least_squares(
            lambda p: (layer(torch.from_numpy(p), x, width) - wanted).numpy(),
            start.numpy(),
            jac=jacobian,
            method="lm",
            max_nfev=100,
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15),
        )
        parameters = torch.from_numpy(found.x)
        fits.append(Fit(width, parameters, layer.error(parameters, width)))
    return min(fits, key=lambda found: found.error)


def fit_all(widths: Sequence[int], seed: int) -> dict[Layer, list[Fit]]:
    """Every layer's fits by width; at width 1 only, from many starts, where one hidden unit is enough."""
    fits: dict[Layer, list[Fit]] = {}
    for layer in LAYERS:
        found = fits[layer] = []
        if layer.exact is not None:
            found.append(fit(layer, 1, seed, starts=20 * STARTS))
            continue
        for width in widths:
            found.append(fit(layer, width, seed, narrower=found[-1] if found else None))
    return fits


def table(fits: dict[Layer, list[Fit]]) -> str:
    """Errors by width, as text."""
    lines = []
    for target in (SUM, RIDGE):
        widths = sorted({found.width for layer in fits if layer.target is target for found in fits[layer]})
        heading = f"{target.name}, relative error by width"
        lines.append(f"{heading:40}{''.join(f'{width:>9}' for width in widths)}   largest weight")
        for layer, found in fits.items():
            if layer.target is target:
                errors = "".join(f"{best.error:9.1e}" for best in found).ljust(9 * len(widths))
                lines.append(f"  {layer.name:38}{errors}   {found[-1].parameters.abs().max():.1e}")
        if target is SUM:
            lines.append(f"  {'no ReLU layer is better than':38}{''.join(f'{relu_bound(w):9.1e}' for w in widths)}")
    return "\n".join(lines)


def draw(fits: dict[Layer, list[Fit]], path: Path) -> None:
    """Errors by width, a panel a target; a star where one hidden unit is the target."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for target, axes in zip((SUM, RIDGE), panels, strict=True):
        ticks: set[int] = set()
        for layer, found in fits.items():
            if layer.target is target:
                widths = [best.width for best in found]
                ticks.update(widths)
                # Stars lie on each other: those of the claim are the large ones.
                marker, size = ("o", 5) if layer.exact is None else ("*", 20 if layer in (LA, MOA) else 9)
                # An error of exactly zero has no place on the axis; rounding's is the least there is.
                errors = [max(best.error, 2.0**-53) for best in found]
                axes.plot(widths, errors, marker=marker, markersize=size, alpha=0.8, label=layer.name)
        if target is SUM:
            bound = [relu_bound(width) for width in sorted(ticks)]
            axes.plot(sorted(ticks), bound, color="gray", linestyle="--", label="no ReLU layer is better")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="relative error", title=target.name)
        axes.set_xticks(sorted(ticks), map(str, sorted(ticks)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.4))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, prints the table, and writes what --out asks for."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new; gets containment.png and containment.json")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N", help="default: 1 to 64, doubled")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the starts; default: 1")
    options = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        widths = sorted(set(options.widths))
        if not 1 <= widths[0] <= widths[-1] <= WIDTHS[-1]:
            raise UserError(f"--widths {' '.join(map(str, options.widths))}: give widths from 1 to {WIDTHS[-1]}")
        torch.set_num_threads(1)  # a second one only waits at matrices of this size
        fits = fit_all(widths, options.seed)
        print(table(fits))
        if options.out is not None:
            with written_folder("--out", options.out) as folder:
                draw(fits, folder / "containment.png")
                rows = [
                    {"target": layer.target.name, "layer": layer.name, "width": best.width, "error": best.error}
                    for layer, found in fits.items()
                    for best in found
                ]
                (folder / "containment.json").write_text(json.dumps({"seed": options.seed, "fits": rows}, indent=1))


if __name__ == "__main__":
    main()
