"""Compares one mixed hidden unit with fixed layers and LA that do not contain it.

    python examples/theory/containment.py --out runs/containment

At every width, fixed layers are a strict part of LA, and LA is a strict part of MoA: theorems 4.1 and 4.2 (arXiv
2605.26647). Four functions witness it. Inputs have a 1 appended (biases), the output is one number, gates are tanh with
bias, distances are in W^{1,inf} on [-1, 1]^d.

| theorem | witness | one hidden unit of | not in | distance |
| --- | --- | --- | --- | --- |
| 4.1, Type I | relu(x1) + relu(x1)^2 | LA | fixed layers of width m | at least 1/(m+1) |
| 4.1, Type I | tanh(2 x1) relu(x2) | MoA | LA of any width | at least tanh(2)/2 |
| 4.2, quadratic | relu(x2) (relu(x1) + tanh(x1)) | LA | fixed pairs (k, l) | no bound in the paper |
| 4.2, quadratic | relu(x2) relu(x1) tanh(x1) | MoA | LA | no bound in the paper |

The program evaluates the closed-form unit of each witness, and fits the layers that do not contain it. The distance of
the best fit is an upper bound of its class' distance, and must not lie below the theorem's lower bound.

- Distance: the largest error of value, d/dx1 or d/dx2. It is taken on a grid and on both sides of every kink, so it is
  a lower estimate of the fit's distance. The first witness depends on x1 only, and so do its fits: on the line x2 = 0 a
  layer of two inputs is a layer of one that is no farther away.
- Fits: Levenberg-Marquardt (scipy) in float64 on values and derivatives at fewer points; first least squares, then
  the 8-norm, which is nearer to the largest error. Starts are a narrower fit, a fixed pair's fit (for LA), weights with
  the witness' own kinks, and random weights.
- Of the 28 fixed pairs of theorem 4.2 three are fitted: two with a kink, and SwiGLU's.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.command_line.numbers import seed
from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.reference import gate, mix

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PROGRAM = "containment.py"
WIDTHS = (1, 4, 16)
WIDEST = 64  # beyond it the first witness has fewer errors in a fit than parameters
STEEPNESS = 2.0  # lambda of 4.1's second witness
BESIDE = 1e-12  # how far from a kink its two sides are evaluated
POWERS = (2, 8)  # norms of the errors that a fit minimises, one after the other
RANDOM_STARTS = 2
STEPS = 40  # of Levenberg-Marquardt, a norm

# The functions of the theorems, in the paper's order (section 3.2).
TYPE1 = ("relu2", "gelu", "silu", "leaky_relu", "relu", "tanh")
QUADRATIC = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")


@dataclass(frozen=True)
class Witness:
    """A function [t, d] -> [t] on [-1, 1]^d.

    Attributes:
        name: for reading.
        dimensions: d.
        function: its values.
        bound: the theorem's lower bound of the distance, by width; None if the paper gives none.
        bound_text: that bound, for reading.
        two_sided: whether it bends on both sides of x1 = 0.
    """

    name: str
    dimensions: int
    function: Callable[[Tensor], Tensor]
    bound: Callable[[int], float] | None = None
    bound_text: str = ""
    two_sided: bool = False

    def grid(self, points: int) -> Tensor:
        """[t, d]: so many points on either side of 0 in each input, closer together near 0 and not on it."""
        positive = torch.linspace(0, 1, points, dtype=torch.float64).pow(1.5).clamp(min=BESIDE)
        side = torch.cat([-positive.flip(0), positive])
        return torch.cartesian_prod(*[side] * self.dimensions).view(-1, self.dimensions)


SUM = Witness(
    "relu(x1) + relu(x1)^2",
    1,
    lambda x: x[:, 0].relu() + x[:, 0].relu().square(),
    lambda width: 1 / (width + 1),
    "every fixed layer: at least 1/(m+1)",
)
RIDGE = Witness(
    "tanh(2 x1) relu(x2)",
    2,
    lambda x: torch.tanh(STEEPNESS * x[:, 0]) * x[:, 1].relu(),
    lambda _: math.tanh(STEEPNESS) / 2,
    "every LA: at least tanh(2)/2",
)
PAIRS = Witness(
    "relu(x2) (relu(x1) + tanh(x1))", 2, lambda x: x[:, 1].relu() * (x[:, 0].relu() + x[:, 0].tanh()), two_sided=True
)
TRIPLE = Witness("relu(x2) relu(x1) tanh(x1)", 2, lambda x: x[:, 1].relu() * x[:, 0].relu() * x[:, 0].tanh())
WITNESSES = (SUM, RIDGE, PAIRS, TRIPLE)


@dataclass(frozen=True, eq=False)
class Layer:
    """A feed-forward layer [t, d] -> [t] of any width with biases, its parameters in one float64 vector.

    Attributes:
        name: for reading.
        witness: what it shall fit.
        mixture: the mixture.
        fixed: the name of the one coefficient that is 1 while all others are 0, or None if coefficients are trained.
        unit: the rows of fc1, each with its bias last, with which one hidden unit is the witness; empty if none is.
        coefficients: those of that unit that are not 0, by name: numbers for LA, a gate vector with its bias for MoA.
    """

    name: str
    witness: Witness
    mixture: MixtureConfig
    fixed: str | None = None
    unit: tuple[tuple[float, ...], ...] = ()
    coefficients: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a layer's parameters by name.

        fc1 is by branch, with biases as a last column; fc2 has its bias last; coefficients are gates with biases (MoA)
        or numbers (LA).
        """
        inputs, n = self.witness.dimensions + 1, self.mixture.num_coefficients
        shapes = {"fc1": (1 + self.mixture.gated, width, inputs), "fc2": (width + 1,)}
        if self.fixed is None:
            shapes["coefficients"] = (n, inputs) if self.mixture.kind == "moa" else (n,)
        return shapes

    def size(self, width: int) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes(width).values())

    def parts(self, parameters: Tensor, width: int) -> dict[str, Tensor]:
        """Views of the vector, or of one for each token [t, parameters]."""
        shapes = self.shapes(width)
        pieces = parameters.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        return {name: piece.unflatten(-1, shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}

    def one_hot(self, name: str) -> Tensor:
        """[n]: 1 for the coefficient of this name."""
        return torch.tensor([float(name == other) for other in self.mixture.coefficient_names], dtype=torch.float64)

    def closed_form(self) -> Tensor:
        """The parameters of width 1 with which the layer is the witness."""
        parameters = torch.zeros(self.size(1), dtype=torch.float64)
        parts = self.parts(parameters, 1)
        parts["fc1"][:, 0] = torch.tensor(self.unit, dtype=torch.float64)
        parts["fc2"][0] = 1
        for name, value in self.coefficients.items():
            index = self.mixture.coefficient_names.index(name)
            parts["coefficients"][index] = torch.tensor(value, dtype=torch.float64)
        return parameters

    def __call__(self, parameters: Tensor, x: Tensor, width: int) -> Tensor:
        """The output [t] for x [t, d], of parameters for all tokens or for each."""
        parts = self.parts(parameters, width)
        column = F.pad(x, (0, 1), value=1.0).unsqueeze(-1)
        coefficients = parts["coefficients"] if self.fixed is None else self.one_hot(self.fixed)
        if self.mixture.kind == "moa":
            coefficients = gate((coefficients @ column).squeeze(-1), self.mixture)
        hidden = mix((parts["fc1"].flatten(-3, -2) @ column).squeeze(-1), coefficients, self.mixture)
        return (F.pad(hidden, (0, 1), value=1.0) * parts["fc2"]).sum(-1)

    def errors(self, parameters: Tensor, x: Tensor, width: int, graph: bool = False) -> Tensor:
        """[t, 1 + d]: layer minus witness, in the value and in the derivative to each input."""
        x = x.detach().requires_grad_()
        value = self(parameters, x, width) - self.witness.function(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=graph)
        both = torch.cat([value.unsqueeze(1), slope], dim=1)
        return both if graph else both.detach()

    def jacobian(self, parameters: Tensor, x: Tensor, width: int) -> Tensor:
        """[t, 1 + d, parameters]: the derivative of :meth:`errors` to the parameters."""
        copies = parameters.expand(len(x), -1).clone().requires_grad_()  # one for each token: backward gives rows
        errors = self.errors(copies, x, width, graph=True)
        rows = [torch.autograd.grad(column.sum(), copies, retain_graph=True)[0] for column in errors.unbind(1)]
        return torch.stack(rows, dim=1)

    def kinks(self, parameters: Tensor, width: int) -> Tensor:
        """[t, d]: points on both sides of the planes where a row of fc1 is 0, inside [-1, 1]^d."""
        rows = self.parts(parameters, width)["fc1"].flatten(0, 1)
        weight, bias = rows[:, None, :-1], rows[:, None, -1]
        length = weight.norm(dim=-1).clamp(min=1e-300)
        normal = weight / length.unsqueeze(-1)
        points = self.witness.grid(8).unsqueeze(0)
        off = (points * normal).sum(-1) + bias / length
        sides = torch.cat([points - (off + side).unsqueeze(-1) * normal for side in (-BESIDE, BESIDE)]).flatten(0, 1)
        return sides[(sides.abs() <= 1).all(dim=1)]

    def distance(self, parameters: Tensor, width: int) -> float:
        """W^{1,inf} to the witness on [-1, 1]^d: the largest error of value and derivatives, over a fine grid."""
        x = torch.cat([_fine_grid(self.witness), self.kinks(parameters, width)])
        return max(self.errors(parameters, part, width).abs().max().item() for part in x.split(4096))


@functools.cache
def _fine_grid(witness: Witness) -> Tensor:
    return witness.grid(2001 if witness.dimensions == 1 else 81)


def mixture(mixing: str, form: str, *activations: str) -> MixtureConfig:
    """Its settings, with the theorems' gates."""
    gates = {"gate": "tanh", "gate_bias": True} if mixing == "moa" else {}
    return MixtureConfig(kind=mixing, form=form, activations=activations, **gates)


def fixed_pair(witness: Witness, first: str, second: str) -> Layer:
    """The quadratic form with the one pair (first, second)."""
    names = (first,) if first == second else (first, second)
    return Layer(f"{first}*{second}", witness, mixture("la", "quadratic", *names), f"{first}*{second}")


# Rows of fc1 are (weight of x1, of x2, bias).
X1, X2 = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
LA_41 = Layer("LA", SUM, mixture("la", "type1", *TYPE1), unit=((1.0, 0.0),), coefficients={"relu": 1.0, "relu2": 1.0})
MOA_41 = Layer("MoA", RIDGE, mixture("moa", "type1", *TYPE1), unit=(X2,), coefficients={"relu": (STEEPNESS, 0.0, 0.0)})
# A pair (k, l) needs k <= l. Here relu comes before tanh, so the pairs are relu*relu and relu*tanh, and W1 reads x2.
# Where tanh comes before relu they are relu*relu and tanh*relu: W1 and W2 are exchanged, as in the paper's proof.
LA_42 = Layer(
    "LA",
    PAIRS,
    mixture("la", "quadratic", *QUADRATIC),
    unit=(X2, X1),
    coefficients={"relu*relu": 1.0, "relu*tanh": 1.0},
)
MOA_42 = Layer("MoA", TRIPLE, mixture("moa", "quadratic", *QUADRATIC), unit=(X2, X1), coefficients={"relu*relu": X1})
# The witnesses are made for a theorem's classes; other forms contain three of them.
ALSO = (
    Layer(
        "quadratic, relu*identity",
        SUM,
        mixture("la", "quadratic", "relu", "identity"),
        "relu*identity",
        unit=((1.0, 0.0), (1.0, 1.0)),
    ),
    Layer(
        "quadratic, relu*tanh",
        RIDGE,
        mixture("la", "quadratic", "relu", "tanh"),
        "relu*tanh",
        unit=(X2, (STEEPNESS, 0.0, 0.0)),
    ),
    Layer(
        "LA, bi-sided",
        PAIRS,
        mixture("la", "bi-sided", *QUADRATIC),
        unit=(X2, X1),
        coefficients={"relu": 1.0, "linear.relu": 1.0, "linear.tanh": 1.0},
    ),
)
FIXED_PAIRS = (("relu", "relu"), ("relu", "tanh"), ("silu", "identity"))  # the last is SwiGLU
LAYERS = (
    *(Layer(name, SUM, mixture("la", "type1", name), name) for name in TYPE1),
    Layer("LA", RIDGE, mixture("la", "type1", *TYPE1)),
    *(fixed_pair(witness, *pair) for witness in (PAIRS, TRIPLE) for pair in FIXED_PAIRS),
    Layer("LA", TRIPLE, mixture("la", "quadratic", *QUADRATIC)),
    LA_41,
    MOA_41,
    LA_42,
    MOA_42,
    *ALSO,
)


@dataclass(frozen=True)
class Fit:
    """The nearest layer found at a width: its parameters, and :meth:`Layer.distance`."""

    width: int
    parameters: Tensor
    distance: float


def solve_fc2(layer: Layer, parameters: Tensor, width: int, x: Tensor) -> Tensor:
    """Sets fc2 and its bias, in place, to what least squares of values and derivatives gives."""
    fc2 = layer.parts(parameters, width)["fc2"]
    fc2.zero_()
    first = math.prod(layer.shapes(width)["fc1"])
    columns = layer.jacobian(parameters, x, width)[..., first : first + width + 1].flatten(0, 1)
    missing = -layer.errors(parameters, x, width).flatten().unsqueeze(1)
    fc2[:] = torch.linalg.lstsq(columns, missing, driver="gelsd").solution[:, 0]
    return parameters


def aligned(layer: Layer, width: int, x1_branch: int) -> Tensor:
    """Weights with kinks at evenly spaced x1 from 0 on; the other branch reads x2, and fc2 is 0.

    Layers of one input get the fc2 that is best with ReLU: on [0, 1], m straight pieces of the witness' mean slope.
    They are 1/m away.
    """
    parameters = torch.zeros(layer.size(width), dtype=torch.float64)
    parts = layer.parts(parameters, width)
    sides = 1 + layer.witness.two_sided
    for unit in range(width):
        sign = -1.0 if layer.witness.two_sided and unit % 2 else 1.0
        parts["fc1"][x1_branch, unit, 0] = sign
        parts["fc1"][x1_branch, unit, -1] = -(unit // sides) / math.ceil(width / sides)
    if layer.mixture.gated:
        parts["fc1"][1 - x1_branch, :, 1] = 1
    else:
        parts["fc2"][:-1] = 2 / width
        parts["fc2"][0] = 1 + 1 / width
    return parameters


def starts(layer: Layer, width: int, generator: torch.Generator, x: Tensor) -> Iterator[Tensor]:
    """Parameters to fit from: with the witness' kinks (fixed layers), then random ones."""
    if layer.fixed is not None and layer.mixture.gated:
        yield from (solve_fc2(layer, aligned(layer, width, branch), width, x) for branch in (0, 1))
    elif layer.fixed is not None:
        yield aligned(layer, width, 0)
    for _ in range(RANDOM_STARTS if layer.fixed is None else 1):
        parameters = torch.randn(layer.size(width), generator=generator, dtype=torch.float64)
        weight = layer.parts(parameters, width)["fc1"][..., :-1]
        kinks = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
        layer.parts(parameters, width)["fc1"][..., -1] = -(weight * kinks).sum(-1)
        yield solve_fc2(layer, parameters, width, x)


def widened(layer: Layer, narrower: Fit, width: int, generator: torch.Generator) -> Tensor:
    """A narrower fit with further units of random weights, which fc2 does not read yet."""
    parameters = torch.randn(layer.size(width), generator=generator, dtype=torch.float64)
    old, new = layer.parts(narrower.parameters, narrower.width), layer.parts(parameters, width)
    new["fc1"][:, : narrower.width] = old["fc1"]
    new["fc2"].zero_()
    new["fc2"][: narrower.width], new["fc2"][-1] = old["fc2"][:-1], old["fc2"][-1]
    if layer.fixed is None:
        new["coefficients"][:] = old["coefficients"]
    return parameters


def as_la(layer: Layer, pair: Layer, found: Fit) -> Tensor:
    """The fixed pair's fit as LA's parameters."""
    return torch.cat([found.parameters, layer.one_hot(pair.fixed)])


def descend(layer: Layer, start: Tensor, width: int, x: Tensor) -> Iterator[Tensor]:
    """The start, and where Levenberg-Marquardt ends for each of the norms."""
    yield start
    parameters = start
    for power in POWERS:
        unit = layer.errors(parameters, x, width).abs().max()

        def roots(vector: np.ndarray, unit: Tensor = unit, power: int = power) -> np.ndarray:
            errors = layer.errors(torch.from_numpy(vector), x, width).flatten() / unit
            return (errors.sign() * errors.abs().pow(power / 2)).numpy()

        def slopes(vector: np.ndarray, unit: Tensor = unit, power: int = power) -> np.ndarray:
            errors = layer.errors(torch.from_numpy(vector), x, width).flatten() / unit
            outer = power / 2 * errors.abs().pow(power / 2 - 1) / unit
            return (layer.jacobian(torch.from_numpy(vector), x, width).flatten(0, 1) * outer.unsqueeze(1)).numpy()

        found = least_squares(roots, parameters.numpy(), jac=slopes, method="lm", max_nfev=STEPS)
        parameters = torch.from_numpy(found.x)
        yield parameters


def fit(layer: Layer, width: int, seed: int, given: Sequence[Tensor] = (), narrower: Fit | None = None) -> Fit:
    """Returns the nearest layer among all starts and the ends of fits from them.

    Starts are those given, the fit of a narrower layer, and the layer's own.
    """
    x = layer.witness.grid(61 if layer.witness.dimensions == 1 else 8)
    generator = torch.Generator().manual_seed(seed)
    before = list(given)
    if narrower is not None:
        before.append(widened(layer, narrower, width, generator))
    fits = [
        Fit(width, parameters, layer.distance(parameters, width))
        for start in (*before, *starts(layer, width, generator, x))
        for parameters in descend(layer, start, width, x)
    ]
    return min(fits, key=lambda found: found.distance)


def fit_all(widths: Sequence[int], seed: int) -> dict[Layer, list[Fit]]:
    """Every layer's fits by width; of layers that contain their witness, the closed form at width 1."""
    fits: dict[Layer, list[Fit]] = {}
    for layer in LAYERS:
        if layer.unit:
            unit = layer.closed_form()
            fits[layer] = [Fit(1, unit, layer.distance(unit, 1))]
            continue
        found: list[Fit] = []
        for index, width in enumerate(widths):
            pairs = [
                as_la(layer, pair, fits[pair][index])
                for pair in fits
                if layer.fixed is None and pair.fixed is not None and pair.witness is layer.witness
            ]
            found.append(fit(layer, width, seed, pairs, found[-1] if found else None))
        fits[layer] = found
    return fits


def norm(witness: Witness) -> float:
    """W^{1,inf} of the witness itself: the distance of the layer that is 0."""
    zero = next(layer for layer in LAYERS if layer.witness is witness)
    return zero.distance(torch.zeros(zero.size(1), dtype=torch.float64), 1)


def table(fits: Mapping[Layer, Sequence[Fit]]) -> str:
    """Distances by width, as text."""
    lines = []
    for witness in WITNESSES:
        found = {layer: fits[layer] for layer in fits if layer.witness is witness}
        widths = sorted({best.width for bests in found.values() for best in bests})
        heading = f"{witness.name}, norm {norm(witness):.3f}"
        lines.append(f"{heading:46}{''.join(f'{f"m={width}":>10}' for width in widths)}")
        if witness.bound is not None:
            bounds = "".join(f"{witness.bound(width):10.5f}" for width in widths)
            lines.append(f"  {witness.bound_text:44}{bounds}")
        for layer, bests in found.items():
            by_width = {best.width: best.distance for best in bests}
            shown = "".join(
                f"{by_width[width]:10.1e}" if layer.unit else f"{by_width[width]:10.5f}"
                for width in widths
                if width in by_width
            )
            lines.append(f"  {layer.name + (' (closed form)' if layer.unit else ''):44}{shown}")
    return "\n".join(lines)


def draw(fits: Mapping[Layer, Sequence[Fit]], path: Path) -> None:
    """Distances by width, a panel a witness; a star on the edge where one hidden unit is the witness."""
    bottom = 0.7 * min(best.distance for layer, bests in fits.items() if not layer.unit for best in bests)
    figure, panels = plt.subplots(2, 2, figsize=(11, 9), sharey=True)
    for witness, axes in zip(WITNESSES, panels.flat, strict=True):
        found = {layer: bests for layer, bests in fits.items() if layer.witness is witness}
        ticks = sorted({best.width for bests in found.values() for best in bests})
        if witness.bound is not None:
            bounds = [witness.bound(width) for width in ticks]
            axes.plot(ticks, bounds, color="gray", linestyle="--", label=witness.bound_text)
        for layer, bests in found.items():
            if layer.unit:
                label, style = f"{layer.name}: {bests[0].distance:.0e}", {"marker": "*", "markersize": 16}
                axes.plot(1, bottom, linestyle="", clip_on=False, alpha=0.6, label=label, **style)
            else:
                distances = [best.distance for best in bests]
                axes.plot([best.width for best in bests], distances, marker="o", alpha=0.7, label=layer.name)
        axes.set(xscale="log", yscale="log", xlabel="width m", ylabel="distance", title=witness.name)
        axes.set_ylim(bottom, None)
        axes.set_xticks(ticks, map(str, ticks))
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0.08, 0.02))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Fits, prints the table, and writes what --out asks for."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new; gets containment.png and containment.json")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="M", help="default: 1 4 16")
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="of the starts; default: 1")
    options = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        widths = sorted(set(options.widths))
        if not 1 <= widths[0] <= widths[-1] <= WIDEST:
            raise UserError(f"--widths {' '.join(map(str, options.widths))}: give widths from 1 to {WIDEST}")
        torch.set_num_threads(1)  # a second one only waits at matrices of this size
        fits = fit_all(widths, options.seed)
        print(table(fits))
        if options.out is not None:
            with written_folder("--out", options.out) as folder:
                draw(fits, folder / "containment.png")
                rows = [
                    {
                        "witness": layer.witness.name,
                        "layer": layer.name,
                        "closed_form": bool(layer.unit),
                        "width": best.width,
                        "distance": best.distance,
                        "lower_bound": None if layer.unit else layer.witness.bound and layer.witness.bound(best.width),
                    }
                    for layer, bests in fits.items()
                    for best in bests
                ]
                (folder / "containment.json").write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
