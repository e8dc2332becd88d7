"""examples/theory/containment.py, and what it claims in the layers that are trained: fixed ⊂ LA ⊂ MoA by witnesses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_moa.config import TYPE1_DICTIONARY, MixingConfig
from megatron_moa.mlp import MixedMLP
from tests.layers import build_feed_forward, make_config, randn64


def load_script() -> ModuleType:
    """The example as a module."""
    path = Path(__file__).resolve().parents[1] / "examples/theory/containment.py"
    spec = importlib.util.spec_from_file_location("containment", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


containment = load_script()
LAYERS = {layer.name: layer for layer in containment.LAYERS}

ROUNDING = {"rtol": 4 * torch.finfo(torch.float64).eps, "atol": 1e-15}


def megatron_layer(mixing: MixingConfig, width: int, **parameters: Tensor) -> MixedMLP:
    """The layer that pretraining builds, h 2, in float64; these parameters, all others zero."""
    config = make_config(mixing.gated, hidden_size=2, num_attention_heads=1, ffn_hidden_size=width)
    layer = build_feed_forward(config, mixing).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(parameters.pop(name, torch.zeros_like(parameter)))
    assert not parameters
    return layer


def column(*values: float) -> Tensor:
    """A weight [1, n] of these values."""
    return torch.tensor([values], dtype=torch.float64)


ONE_OUTPUT = {"linear_fc2.weight": column(1, 0).T}  # the layer's first output is its one hidden unit


@pytest.mark.usefixtures("megatron")
class TestWitnesses:
    """The closed-form weights in Megatron's layers, at float64's precision."""

    x = randn64(101, 2, 2, generator=torch.Generator().manual_seed(1))  # [s, b, h]

    def test_la_of_width_1_is_relu_plus_its_square(self) -> None:
        mixing = MixingConfig(mixing="la", form="type1", activations=("relu", "relu2"), backend="eager")
        weights = {"linear_fc1.weight": column(1, 0), "coefficients.value": column(1, 1)[0], **ONE_OUTPUT}
        output, _ = megatron_layer(mixing, 1, **weights)(self.x)
        wanted = containment.SUM.function(self.x.view(-1, 2)).view(101, 2)
        torch.testing.assert_close(output[..., 0], wanted, **ROUNDING)

    def test_moa_with_learned_amplitude_is_that_la(self) -> None:
        mixing = MixingConfig(form="type1", activations=("relu", "relu2"), amplitude="learned", backend="eager")
        weights = {"linear_fc1.weight": column(1, 0), "coefficients.amplitude": column(1, 1)[0], **ONE_OUTPUT}
        output, _ = megatron_layer(mixing, 1, **weights)(self.x)  # its gates' vectors are zero
        wanted = containment.SUM.function(self.x.view(-1, 2)).view(101, 2)
        torch.testing.assert_close(output[..., 0], wanted, **ROUNDING)

    def test_moa_of_width_1_is_a_ridge_whose_height_varies_along_it(self) -> None:
        mixing = MixingConfig(form="type1", activations=("relu",), gate="tanh", backend="eager")
        gate = column(containment.STEEPNESS, 0)
        weights = {"linear_fc1.weight": column(0, 1), "coefficients.weight": gate, **ONE_OUTPUT}
        output, _ = megatron_layer(mixing, 1, **weights)(self.x)
        wanted = containment.RIDGE.function(self.x.view(-1, 2)).view(101, 2)
        torch.testing.assert_close(output[..., 0], wanted, **ROUNDING)

    def test_la_is_a_sum_of_ridges_and_the_witness_is_not(self) -> None:
        """Differences along directions orthogonal to each row of fc1, one after the other, leave nothing of LA."""
        directions = column(2, 1), column(1, -3), column(-1, 2), column(1, 1)
        fc1 = torch.cat(directions)  # [f, h]
        mixing = MixingConfig(mixing="la", form="type1", activations=("identity", *TYPE1_DICTIONARY), backend="eager")
        weights = {"linear_fc1.weight": fc1, "coefficients.value": 1 + torch.arange(7).double(), **ONE_OUTPUT}
        weights["linear_fc2.weight"] = randn64(2, 4, generator=torch.Generator().manual_seed(2))
        layer = megatron_layer(mixing, 4, **weights)
        orthogonal = 0.2 * torch.stack([-fc1[:, 1], fc1[:, 0]], dim=1)
        shifts = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)  # [16, 4]
        signs = (-1) ** shifts.sum(dim=1)
        points = column(0.3, 1.5) + shifts @ orthogonal  # [16, h]; x₂ > 0, where the witness has all derivatives
        assert points[:, 1].min() > 0
        of_layer = layer(points.unsqueeze(1))[0][:, 0, 0]
        assert (signs @ of_layer).abs() < 1e-12 * of_layer.abs().max()
        of_witness = containment.RIDGE.function(points)
        assert (signs @ of_witness).abs() > 0.05 * of_witness.abs().max()


@pytest.mark.parametrize("name", [layer.name for layer in containment.LAYERS if layer.exact is not None])
def test_one_hidden_unit_is_the_target_and_a_fit_finds_it(name: str) -> None:
    layer = LAYERS[name]
    assert layer.error(torch.tensor(layer.exact, dtype=torch.float64), 1) < containment.EXACT
    assert containment.fit(layer, 1, seed=2, starts=60).error < containment.EXACT


@pytest.mark.parametrize(
    ("name", "width", "low", "high"),
    [
        ("ReLU", 1, 0.05, 0.1),
        ("ReLU", 4, 0.0041, 0.03),  # 0.0041: the bound
        ("relu2", 1, 0.01, 0.03),
        ("relu2", 4, 1e-6, 1e-3),
        ("GELU", 1, 0.03, 0.1),
        ("GELU", 4, 1e-4, 0.02),
        ("tanh", 1, 0.02, 0.1),
        ("tanh", 4, 1e-4, 0.02),
        ("SwiGLU", 1, 5e-4, 5e-3),
        ("SwiGLU", 4, 1e-5, 2e-3),
        ("LA over seven activations", 1, 0.3, 0.9),
        ("LA over seven activations", 4, 0.02, 0.3),
    ],
)
def test_others_come_near_and_stay_off(name: str, width: int, low: float, high: float) -> None:
    assert low < containment.fit(LAYERS[name], width, seed=2).error < high


@pytest.mark.parametrize("width", [1, 4, 64])
def test_bound_is_that_of_the_best_straight_pieces(width: int) -> None:
    """Free of each other, without a hinge in common: what no ReLU layer can be better than."""
    x = torch.linspace(0, 2, 2000 * (width + 1) + 1, dtype=torch.float64)
    wanted, missing = containment.SUM.function(x.unsqueeze(1)), 0.0
    for piece, values in zip(x[:-1].chunk(width + 1), wanted[:-1].chunk(width + 1), strict=True):
        lines = torch.stack([torch.ones_like(piece), piece], dim=1)
        best = torch.linalg.lstsq(lines, values.unsqueeze(1), driver="gelsd").solution
        missing += (lines @ best - values.unsqueeze(1)).square().sum()
    assert containment.relu_bound(width) == pytest.approx((missing / wanted.square().sum()).sqrt().item(), rel=2e-3)


def test_script_writes_its_table_picture_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        containment.main(["--widths", "2", "1", "--out", str(tmp_path / "out")])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert (tmp_path / "out/containment.png").read_bytes().startswith(b"\x89PNG")
    fits = json.loads((tmp_path / "out/containment.json").read_text())["fits"]
    by_layer: dict[str, dict[int, float]] = {}
    for row in fits:
        by_layer.setdefault(row["layer"], {})[row["width"]] = row["error"]
    assert list(by_layer) == list(LAYERS)
    for name, errors in by_layer.items():
        exact = LAYERS[name].exact is not None
        assert list(errors) == ([1] if exact else [1, 2])
        assert all((error < containment.EXACT) == exact for error in errors.values())
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(f"{name}  ")]
        assert all(f"{error:.1e}" in line for error in errors.values())
    assert all(by_layer["ReLU"][width] > containment.relu_bound(width) for width in (1, 2))


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
