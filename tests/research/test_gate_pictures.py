"""research/gates/pictures.py: what is drawn of the gates of each form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from megatron_moa.mixture import reference
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.gates.pictures import draw_curves, quadratic_map


def test_a_map_of_the_quadratic_form_is_the_reference() -> None:
    mixture = MixtureConfig(form="quadratic", activations=("silu", "relu2", "tanh"))
    coefficients = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    basis = torch.stack([reference.DEFINITIONS[name](x) for name in mixture.activations])
    y, z = torch.meshgrid(x, x, indexing="ij")
    expected = reference.mix(torch.stack((y, z), -1), coefficients, mixture)[..., 0]
    torch.testing.assert_close(quadratic_map(basis, coefficients), expected)
    torch.testing.assert_close(quadratic_map(basis, torch.stack((coefficients, -coefficients))[1]), -expected)


@pytest.mark.parametrize(
    ("form", "titles"),
    [
        ("type1", ["layer 1, activated branch"]),
        ("one-sided", ["layer 1, linear branch"]),
        ("bi-sided", ["layer 1, activated branch", "layer 1, linear branch"]),
        ("quadratic", ["layer 1, mean coefficients", "layer 1, std over 2 random tokens"]),
    ],
)
def test_every_mixed_branch_has_a_picture_of_its_own(
    form: str, titles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = MixtureConfig(form=form, activations=("relu", "tanh"))
    n = mixture.num_coefficients
    sampled = [[0.5 + k for k in range(n)], [0.1 * k for k in range(n)]]
    gates = [{"name": name, "mean": 1.0 + k} for k, name in enumerate(mixture.coefficient_names)]
    site = {"title": "layer 1", "gates": gates, "sampled": sampled}
    curves: dict[int, list[Tensor]] = {}
    shown: list[str] = []
    monkeypatch.setattr(Axes, "plot", lambda axes, _, y, **__: curves.setdefault(id(axes), []).append(y))
    monkeypatch.setattr(Axes, "set_title", lambda _, title, **__: shown.append(title))
    model = {"form": form, "activations": list(mixture.activations)}
    draw_curves({"sites": [site], "mixing": model}, tmp_path / "curves.png")
    assert shown == titles
    assert (tmp_path / "curves.png").is_file()
    if form != "quadratic":
        x = torch.linspace(-4, 4, 161, dtype=torch.float64)
        for number, drawn in enumerate(curves.values()):
            first, second = (1.0 + number * 2 + k for k in range(2))  # the means of this branch
            torch.testing.assert_close(drawn[-1], first * x.relu() + second * x.tanh())
            assert len(drawn) == 3
