"""--moa-init-scale: the output's mean square at step 0 against SwiGLU's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_moa.errors import UserError
from megatron_moa.layers.init_scale import coefficient_scale, initial_std
from megatron_moa.mixture.config import FORMS, MixtureConfig
from megatron_moa.mixture.start_scale import matching_scale, output_scale
from tests.support.layers import build_feed_forward, make_config

pytestmark = pytest.mark.usefixtures("megatron")

SETTINGS = [{"kind": "la"}, {"kind": "moa"}, {"kind": "moa", "amplitude": "learned"}]


INIT_STD = 0.05  # of fc1's weights


def mean_square(mixture: MixtureConfig | None, gated: bool) -> float:
    """Of the input to fc2 on normalised random input, over a few wide layers."""
    config = make_config(gated, hidden_size=512, ffn_hidden_size=1024, init_method_std=INIT_STD)
    tensor_parallel.model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    torch.manual_seed(11)
    results = []
    for _ in range(4):
        layer = build_feed_forward(config, mixture)
        x = torch.randn(256, 1, 512)
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        if mixture is not None:
            out = layer.fc1_and_mixture(x)
        else:
            z, _ = layer.linear_fc1(x)
            first, second = z.chunk(2, -1)
            out = torch.nn.functional.silu(first) * second if gated else torch.nn.functional.gelu(z)
        results.append(out.square().mean().item())
    return sum(results) / len(results)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_matched_scale_is_swiglus_in_a_real_layer(form: str, settings: dict) -> None:
    gated = form != "type1"
    mixture = MixtureConfig(form=form, init_scale="matched", backend="eager", **settings)
    # Two to three standard deviations over seeds: a layer's gates are only n draws, LA has none.
    tolerance = 0.012 if mixture.kind == "la" else 0.06
    assert mean_square(mixture, gated) == pytest.approx(mean_square(None, gated), rel=tolerance)


@pytest.mark.parametrize("form", ["one-sided", "bi-sided", "quadratic"])
@pytest.mark.parametrize("mixing_name", ["la", "moa"])
def test_the_papers_scale_is_what_is_reported(mixing_name: str, form: str) -> None:
    mixture = MixtureConfig(mixing_name, form, backend="eager")
    ratio = (mean_square(mixture, True) / mean_square(None, True)) ** 0.5
    assert ratio > 1.5  # the reason for the option
    assert output_scale(mixture, INIT_STD, 512) == pytest.approx(ratio, rel=0.04)


def test_the_gates_own_standard_deviation_decides_the_scale() -> None:
    """Checks that the output grows with the gates' standard deviation, not with fc1's alone.

    Sharp tanh gates are +-1, flat ones near 0.
    """
    flat, sharp = (MixtureConfig(gate="tanh", gate_init_std=std, backend="eager") for std in (0.002, 0.5))
    assert mean_square(sharp, True) > 100 * mean_square(flat, True)
    for mixture in (flat, sharp):
        ratio = (mean_square(mixture, True) / mean_square(None, True)) ** 0.5
        assert output_scale(mixture, INIT_STD, 512) == pytest.approx(ratio, rel=0.1)
        matched = dataclasses.replace(mixture, init_scale="matched")
        assert mean_square(matched, True) == pytest.approx(mean_square(None, True), rel=0.2)


def test_the_width_of_mup_decides_the_scale() -> None:
    """Megatron draws fc1 with --init-method-std over the root of the width's multiple."""
    mup = {"hidden_size": 512, "init_method_std": INIT_STD, "use_mup": True, "mup_base_hidden_size": 32}
    config = make_config(True, ffn_hidden_size=1024, **mup)
    layer = build_feed_forward(config, MixtureConfig(backend="eager"))
    assert initial_std(config) == INIT_STD / 4
    assert layer.linear_fc1.weight.std().item() == pytest.approx(INIT_STD / 4, rel=0.01)
    matched = MixtureConfig(init_scale="matched", backend="eager")
    assert coefficient_scale(matched, config) == matching_scale(matched, INIT_STD / 4, 512)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"init_method": torch.nn.init.xavier_uniform_}, "--init-method-xavier-uniform"),
        ({"moe_latent_size": 16}, "--moe-latent-size"),
    ],
)
def test_no_scale_is_reckoned_from_preactivations_that_are_not_known(settings: dict, flag: str) -> None:
    config = dataclasses.replace(make_config(True), **settings)
    assert initial_std(config) is None
    assert coefficient_scale(MixtureConfig(), config) == 1
    with pytest.raises(UserError, match=f"--moa-init-scale matched: .*; drop {flag}, or take --moa-init-scale paper"):
        coefficient_scale(MixtureConfig(init_scale="matched"), config)


def test_scale_of_fixed_amplitude_is_in_the_checkpoint() -> None:
    layer = build_feed_forward(make_config(), MixtureConfig(init_scale="matched", backend="eager"))
    assert "coefficients.scale" in layer.state_dict()
    keys = layer.sharded_state_dict(prefix="mlp.")
    assert "mlp.coefficients.scale" in keys


@pytest.mark.parametrize(
    ("mixture", "init_std"),
    [
        (MixtureConfig(init_scale="matched"), 0.0),
        (MixtureConfig(kind="la", initial_coefficients=0.0, init_scale="matched"), 0.02),
        (MixtureConfig(amplitude="learned", initial_coefficients=0.0, init_scale="matched"), 0.02),
    ],
)
def test_no_scale_makes_nothing_as_large_as_swiglu(mixture: MixtureConfig, init_std: float) -> None:
    with pytest.raises(UserError, match="start at 0"):
        matching_scale(mixture, init_std, 64)
