"""--moa-log-interval: the statistics against the coefficients themselves."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_moa.config import MixingConfig
from megatron_moa.mlp import MixedMLP
from megatron_moa.monitor import CoefficientMonitor
from tests.layers import build_model, logits_of, make_config, moe_settings

pytestmark = pytest.mark.usefixtures("megatron")


def logged(text: str, label: str) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by activation from the line of one layer."""
    (line,) = [line for line in text.splitlines() if f"| {label} |" in line]
    return {name: (float(m), float(s)) for name, m, s in re.findall(r"([\w.]+) (-?[\d.]+) \+- ([\d.]+)", line)}


def test_mean_and_deviation_are_those_of_the_recorded_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    mixing = MixingConfig(activations=("silu", "tanh"), backend="eager")
    model = build_model(make_config(), mixing)
    layers = [module for module in model.modules() if isinstance(module, MixedMLP)]
    monitor = CoefficientMonitor(mixing, interval=2)
    monitor.attach([model])
    seen: list[torch.Tensor] = []
    layers[1].coefficients.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    for iteration in range(4):
        monitor.begin_microbatch(iteration)
        seen.clear()
        for _ in range(2):  # micro-batches
            monitor.begin_microbatch(iteration)
            logits_of(model)
        recorded = torch.cat(list(seen)).flatten(0, 1)
        monitor.end_iteration()
        with torch.no_grad():
            layers[1].coefficients.weight.mul_(1.5)
        logits_of(model)  # validation between iterations is not recorded
    printed = capsys.readouterr().out
    assert {int(i) for i in re.findall(r"at iteration (\d+)", printed)} == {2, 4}
    values = logged(printed.split("at iteration 4", 1)[1].join(["at iteration 4", ""]), "layer 2")
    for index, name in enumerate(mixing.coefficient_names):
        column = recorded[:, index].double()
        assert values[name][0] == pytest.approx(column.mean().item(), abs=1e-4)
        assert values[name][1] == pytest.approx(column.std(correction=0).item(), abs=1e-4)


def test_shared_experts_have_lines_of_their_own_and_la_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    mixing = MixingConfig(mixing="la", activations=("silu", "tanh"), backend="eager")
    config = make_config(**moe_settings(moe_shared_expert_intermediate_size=12))
    model = build_model(config, mixing)
    monitor = CoefficientMonitor(mixing, interval=1)
    monitor.attach([model])
    monitor.begin_microbatch(0)
    logits_of(model)
    monitor.end_iteration()
    printed = capsys.readouterr().out
    for label in ("layer 1", "layer 1 shared expert", "layer 2", "layer 2 shared expert"):
        assert logged(printed, label)["linear.tanh"] == (0.5, 0.0)
