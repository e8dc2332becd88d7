"""Tests examples/theory/containment.py, and theorems 4.1 and 4.2 in the layers that are trained.

The theorems say: fixed ⊂ LA ⊂ MoA.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.mixture.config import DICTIONARIES, MixtureConfig
from tests.support.layers import build_feed_forward, make_config, randn64
from tests.support.scripts import load_script

containment = load_script("examples/theory/containment.py")
SUM, RIDGE, PAIRS, TRIPLE = containment.WITNESSES
FIXED = {layer.name: layer for layer in containment.LAYERS if layer.witness is SUM and layer.fixed and not layer.unit}
LA_RIDGE, LA_TRIPLE = (
    next(layer for layer in containment.LAYERS if layer.witness is witness and layer.fixed is None and not layer.unit)
    for witness in (RIDGE, TRIPLE)
)

TYPE1 = ("relu2", "gelu", "silu", "leaky_relu", "relu", "tanh")  # of theorem 4.1
QUADRATIC = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")  # of theorem 4.2
TANH_GATES = {"gate": "tanh", "gate_bias": True}
LAMBDA = 2.0


def relu(x: Tensor) -> Tensor:
    """Written out: the witnesses below owe nothing to the code."""
    return torch.where(x > 0, x, torch.zeros_like(x))


# By x1 and x2.
WITNESSES = {
    "relu(x1) + relu(x1)^2": lambda x1, x2: relu(x1) + relu(x1) * relu(x1),
    "tanh(2 x1) relu(x2)": lambda x1, x2: torch.tanh(LAMBDA * x1) * relu(x2),
    "relu(x2) (relu(x1) + tanh(x1))": lambda x1, x2: relu(x2) * (relu(x1) + torch.tanh(x1)),
    "relu(x2) relu(x1) tanh(x1)": lambda x1, x2: relu(x2) * relu(x1) * torch.tanh(x1),
}


def megatron_layer(mixture: MixtureConfig, width: int, **parameters: Tensor) -> MixedMLP:
    """The layer that pretraining builds, h 2, in float64; these parameters, all others zero."""
    config = make_config(mixture.gated, hidden_size=2, num_attention_heads=1, ffn_hidden_size=width)
    layer = build_feed_forward(config, mixture).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(parameters.pop(name.replace(".", "_"), torch.zeros_like(parameter)))
    assert not parameters
    return layer


def rows(*values: tuple[float, ...]) -> Tensor:
    """A float64 matrix of these rows."""
    return torch.tensor(values, dtype=torch.float64)


X1, X2 = (1.0, 0.0), (0.0, 1.0)  # rows of fc1


@pytest.mark.usefixtures("megatron")
class TestWitnesses:
    """The closed-form weights of width 1 in Megatron's layers, without biases but the gates'."""

    x = randn64(101, 2, 2, generator=torch.Generator().manual_seed(1))  # [s, b, h]

    @pytest.mark.parametrize(
        ("witness", "form", "mixing", "activations", "fc1", "coefficients"),
        [
            ("relu(x1) + relu(x1)^2", "type1", "la", TYPE1, [X1], {"relu": 1, "relu2": 1}),
            ("relu(x1) + relu(x1)^2", "type1", "la", DICTIONARIES["type1"], [X1], {"relu": 1, "relu2": 1}),
            ("tanh(2 x1) relu(x2)", "type1", "moa", TYPE1, [X2], {"relu": (LAMBDA, 0)}),
            ("tanh(2 x1) relu(x2)", "type1", "moa", DICTIONARIES["type1"], [X2], {"relu": (LAMBDA, 0)}),
            # relu comes before tanh: both pairs have it first, so W1 reads x2.
            (
                "relu(x2) (relu(x1) + tanh(x1))",
                "quadratic",
                "la",
                QUADRATIC,
                [X2, X1],
                {"relu*relu": 1, "relu*tanh": 1},
            ),
            # tanh comes before relu: there is no pair relu*tanh, so W1 and W2 are exchanged.
            (
                "relu(x2) (relu(x1) + tanh(x1))",
                "quadratic",
                "la",
                DICTIONARIES["bi-sided"],
                [X1, X2],
                {"relu*relu": 1, "tanh*relu": 1},
            ),
            ("relu(x2) relu(x1) tanh(x1)", "quadratic", "moa", QUADRATIC, [X2, X1], {"relu*relu": X1}),
            ("relu(x2) relu(x1) tanh(x1)", "quadratic", "moa", DICTIONARIES["bi-sided"], [X1, X2], {"relu*relu": X1}),
            # Forms that the theorems do not speak of.
            ("tanh(2 x1) relu(x2)", "quadratic", "la", QUADRATIC, [X2, (LAMBDA, 0)], {"relu*tanh": 1}),
            (
                "relu(x2) (relu(x1) + tanh(x1))",
                "bi-sided",
                "la",
                DICTIONARIES["bi-sided"],
                [X2, X1],
                {"relu": 1, "linear.relu": 1, "linear.tanh": 1},
            ),
        ],
    )
    def test_one_hidden_unit_is_the_witness(
        self,
        witness: str,
        form: str,
        mixing: str,
        activations: tuple[str, ...],
        fc1: list[tuple[float, float]],
        coefficients: dict[str, float | tuple[float, float]],
    ) -> None:
        gates = TANH_GATES if mixing == "moa" else {}
        settings = MixtureConfig(kind=mixing, form=form, activations=activations, backend="eager", **gates)
        values = torch.zeros(settings.num_coefficients, *((2,) if mixing == "moa" else ()), dtype=torch.float64)
        for name, value in coefficients.items():
            values[settings.coefficient_names.index(name)] = torch.tensor(value, dtype=torch.float64)
        layer = megatron_layer(
            settings,
            1,
            linear_fc1_weight=rows(*fc1),
            linear_fc2_weight=rows((1,), (0,)),  # the layer's first output is its one hidden unit
            **{"coefficients_weight" if mixing == "moa" else "coefficients_value": values},
        )
        output, _ = layer(self.x)
        wanted = WITNESSES[witness](*self.x.unbind(-1))
        torch.testing.assert_close(output[..., 0], wanted, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize(("form", "activations"), [("type1", TYPE1), ("quadratic", QUADRATIC)])
    def test_tanh_gates_with_bias_contain_every_la(self, form: str, activations: tuple[str, ...]) -> None:
        """Gate vectors 0: coefficients are tanh(b), once fc2 has made LA's smaller than 1."""
        la = MixtureConfig(kind="la", form=form, activations=activations, backend="eager")
        generator = torch.Generator().manual_seed(3)
        values = randn64(la.num_coefficients, generator=generator)
        assert values.min() < 0 < values.max()
        fc1 = randn64(3 * (1 + la.gated), 2, generator=generator)
        fc2 = randn64(2, 3, generator=generator)
        wanted, _ = megatron_layer(la, 3, linear_fc1_weight=fc1, linear_fc2_weight=fc2, coefficients_value=values)(
            self.x
        )
        size = 2 * values.abs().max()
        moa = MixtureConfig(form=form, activations=activations, backend="eager", **TANH_GATES)
        weights = {"linear_fc2_weight": size * fc2, "coefficients_bias": torch.atanh(values / size)}
        output, _ = megatron_layer(moa, 3, linear_fc1_weight=fc1, **weights)(self.x)
        torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)

    def test_learned_amplitudes_contain_the_la_witness(self) -> None:
        mixture = MixtureConfig(form="type1", activations=("relu", "relu2"), amplitude="learned", backend="eager")
        weights = {"linear_fc2_weight": rows((1,), (0,)), "coefficients_amplitude": rows((1, 1))[0]}
        output, _ = megatron_layer(mixture, 1, linear_fc1_weight=rows(X1), **weights)(self.x)  # gate vectors are zero
        wanted = WITNESSES["relu(x1) + relu(x1)^2"](*self.x.unbind(-1))
        torch.testing.assert_close(output[..., 0], wanted, rtol=1e-12, atol=1e-14)

    def test_la_has_one_jump_across_a_plane_and_the_witness_many(self) -> None:
        """Why tanh(lambda)/2: across x2 = 0 a Type I layer's derivative jumps by the same amount for every x1."""
        mixture = MixtureConfig(kind="la", form="type1", activations=TYPE1, backend="eager")
        generator = torch.Generator().manual_seed(2)
        weights = {
            "linear_fc1_weight": torch.cat([rows(X2), randn64(7, 2, generator=generator)]),
            "linear_fc2_weight": randn64(2, 8, generator=generator),
            "coefficients_value": 1 + torch.arange(6).double(),
        }
        layer = megatron_layer(mixture, 8, **weights)
        x1, side = torch.linspace(-1, 1, 10, dtype=torch.float64), 1e-9  # not 0, where all kinks of this layer cross

        def jump(function: object) -> Tensor:
            slopes = []
            for sign in (-1, 1):
                x = torch.stack([x1, torch.full_like(x1, sign * side)], dim=-1).requires_grad_()
                slopes.append(torch.autograd.grad(function(x).sum(), x)[0][:, 1])
            return slopes[1] - slopes[0]

        of_layer = jump(lambda x: layer(x.unsqueeze(1))[0][:, 0, 0])
        assert of_layer[0].abs() > 0.1
        torch.testing.assert_close(of_layer, of_layer[:1].expand(10), rtol=0, atol=1e-6)
        of_witness = jump(lambda x: WITNESSES["tanh(2 x1) relu(x2)"](*x.unbind(-1)))
        # No one jump is nearer to both ends than half their difference; an error is half of what the jumps differ by.
        assert (of_witness[-1] - of_witness[0]) / 4 == pytest.approx(RIDGE.bound(64), rel=1e-12)


@pytest.mark.parametrize("layer", [layer for layer in containment.LAYERS if layer.unit], ids=lambda layer: layer.name)
def test_closed_forms_are_their_witness(layer: object) -> None:
    assert layer.distance(layer.closed_form(), 1) < 1e-12


@pytest.mark.parametrize("witness", containment.WITNESSES, ids=lambda witness: witness.name)
def test_witnesses_are_the_theorems(witness: object) -> None:
    x = witness.grid(20)
    wanted = WITNESSES[witness.name](x[:, 0], x[:, -1])
    torch.testing.assert_close(witness.function(x), wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_bounds_are_the_theorems(width: int) -> None:
    assert SUM.bound(width) == 1 / (1 + width)
    assert RIDGE.bound(width) == math.tanh(2) / 2
    assert PAIRS.bound is TRIPLE.bound is None


class TestDistance:
    @pytest.mark.parametrize(
        ("witness", "norm"),
        [
            (SUM, 3),  # slope at 1
            (RIDGE, 2),  # d/dx1 at (0, 1)
            (PAIRS, 2),  # d/dx1 right of (0, 1)
            (TRIPLE, math.tanh(1) + 1 - math.tanh(1) ** 2),  # d/dx1 at (1, 1)
        ],
        ids=lambda value: getattr(value, "name", None),
    )
    def test_of_zero_is_the_norm(self, witness: object, norm: float) -> None:
        assert containment.norm(witness) == pytest.approx(norm, rel=1e-9)

    def test_sees_both_sides_of_the_layer_s_own_kink(self) -> None:
        """3 relu(x - 0.3): its slope is off by 1.6 just left of the kink, by less than 1.5 everywhere else."""
        off = FIXED["relu"].distance(torch.tensor([1, -0.3, 3, 0], dtype=torch.float64), 1)
        assert off == pytest.approx(1.6, rel=1e-9)

    def test_kinks_lie_beside_every_plane_inside_the_square(self) -> None:
        parameters = torch.randn(LA_TRIPLE.size(3), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        x = LA_TRIPLE.kinks(parameters, 3)
        assert x.abs().max() <= 1
        fc1 = LA_TRIPLE.parts(parameters, 3)["fc1"].flatten(0, 1)
        height = (x @ fc1[:, :2].T + fc1[:, 2]) / fc1[:, :2].norm(dim=1)
        crossed = [line for line in height.T if (line.abs() < 1e-10).any()]
        assert len(crossed) >= 4
        for line in crossed:
            near = line[line.abs() < 1e-10]
            assert near.min() < -5e-13
            assert near.max() > 5e-13


def test_jacobian_is_the_difference_quotient() -> None:
    generator = torch.Generator().manual_seed(4)
    parameters, direction = torch.randn(2, LA_TRIPLE.size(3), generator=generator, dtype=torch.float64)
    x = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    ends = [LA_TRIPLE.errors(parameters + step * direction, x, 3) for step in (-1e-6, 1e-6)]
    slope = LA_TRIPLE.jacobian(parameters, x, 3) @ direction
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-6, atol=1e-6)


class TestFits:
    """A fit below a lower bound would refute the theorem, or show a wrong distance."""

    ROUNDING = 1e-8  # slopes are taken 1e-12 beside a kink; fits stay below weights of 1e4 here

    @pytest.mark.parametrize("width", [1, 3])
    @pytest.mark.parametrize("name", TYPE1)
    def test_fixed_layers_stay_above_the_bound_of_4_1(self, name: str, width: int) -> None:
        found = containment.fit(FIXED[name], width, seed=2)
        assert found.distance >= 1 / (width + 1) - self.ROUNDING
        if name == "relu":
            assert found.distance <= 1 / width + self.ROUNDING  # straight pieces of equal lengths
        elif name == "leaky_relu":
            assert found.distance < 1 / width + 0.05
        else:  # continuous slopes, where the witness' jumps by 1
            assert 0.5 - self.ROUNDING <= found.distance < 0.55

    @pytest.mark.parametrize(("width", "high"), [(1, 1.3), (4, 0.6)])
    def test_la_stays_above_the_bound_of_4_1(self, width: int, high: float) -> None:
        assert math.tanh(2) / 2 - self.ROUNDING <= containment.fit(LA_RIDGE, width, seed=2).distance < high

    def test_no_bound_of_4_2_could_hold_at_every_width(self) -> None:
        """A fixed pair comes as near as one likes: relu(x2) times straight pieces in x1."""
        (pair,) = (layer for layer in containment.LAYERS if layer.witness is PAIRS and layer.name == "relu*relu")
        x = PAIRS.grid(12)
        distances = []
        for width in (2, 8, 32):
            parameters = containment.solve_fc2(pair, containment.aligned(pair, width, 1), width, x)
            distances.append(pair.distance(parameters, width))
        assert 0.2 < distances[0] < 0.6
        assert 1e-3 < distances[2] < 0.4 * distances[1] < 0.4 * 0.4 * distances[0]

    def test_la_is_at_least_as_near_as_a_fixed_pair_and_a_wider_layer_as_a_narrower(self) -> None:
        (pair,) = (layer for layer in containment.LAYERS if layer.witness is TRIPLE and layer.name == "relu*tanh")
        of_pair = containment.fit(pair, 1, seed=2)
        start = containment.as_la(LA_TRIPLE, pair, of_pair)
        assert LA_TRIPLE.distance(start, 1) == pytest.approx(of_pair.distance, rel=1e-9)
        of_la = containment.fit(LA_TRIPLE, 1, seed=2, given=[start])
        assert 0.01 < of_la.distance <= of_pair.distance * (1 + 1e-9)
        wider = containment.widened(LA_TRIPLE, of_la, 3, torch.Generator().manual_seed(1))
        assert LA_TRIPLE.distance(wider, 3) <= of_la.distance * (1 + 1e-9) + 1e-3  # the wider one's grid has more kinks


def test_script_writes_its_table_picture_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containment, "STEPS", 2)
    monkeypatch.setattr(containment, "_fine_grid", lambda witness: witness.grid(20))
    threads = torch.get_num_threads()
    try:
        containment.main(["--widths", "2", "1", "--out", str(tmp_path / "out")])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (tmp_path / "out/containment.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out/containment.json").read_text())["rows"]
    expected = [
        (layer.witness.name, layer.name, bool(layer.unit), width)
        for layer in containment.LAYERS
        for width in ((1,) if layer.unit else (1, 2))
    ]
    assert [(row["witness"], row["layer"], row["closed_form"], row["width"]) for row in written] == expected
    for row in written:
        assert format(row["distance"], "10.1e" if row["closed_form"] else "10.5f") in printed
        if row["closed_form"]:
            assert row["distance"] < 1e-12
        elif row["lower_bound"] is not None:
            assert row["distance"] >= row["lower_bound"] - 1e-8
    bounded = {row["witness"] for row in written if row["lower_bound"] is not None}
    assert bounded == {SUM.name, RIDGE.name}
    lines = [line.split() for line in printed.splitlines()]
    assert "every fixed layer: at least 1/(m+1) 0.50000 0.33333".split() in lines
    assert "every LA: at least tanh(2)/2 0.48201 0.48201".split() in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "0", "2"], "--widths 0 2: give widths from 1 to 64"),
        (["--widths", "99"], "--widths 99: give widths from 1 to 64"),
        (["--widths", "many"], "argument --widths: invalid int value: 'many'; see containment.py --help"),
    ],
)
def test_wrong_widths_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        containment.main(flags)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"containment.py: error: {message}\n"
