"""Loads optimizer state of torch's Adam into a fused one, and the other way round.

The two count their steps in different places.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from megatron_moa.megatron_fixes import optimizer_resharding

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class FusedAdam(torch.optim.Optimizer):
    """Lays AdamW out as Transformer Engine and Apex do.

    There is one number of steps a group, and a setting of their own.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, {**settings, "bias_correction": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first_rate, second_rate = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 1 - first_rate)
                second = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad**2, 1 - second_rate)
                if group["bias_correction"]:
                    first = first / (1 - first_rate ** group["step"])
                    second = second / (1 - second_rate ** group["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))


def train(adam: torch.optim.Optimizer, seeds: range) -> torch.Tensor:
    """Steps with a random gradient for each seed; returns the parameter."""
    (parameter,) = adam.param_groups[0]["params"]
    for seed in seeds:
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        adam.step()
    return parameter.detach().clone()


def saved(adam: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state as Megatron saves it: steps of parameters apart."""
    state = copy.deepcopy(adam.state_dict())
    steps = [of.pop("step") for of in state["state"].values() if "step" in of]
    if steps:
        state["state"]["common_step"] = steps[0]
    return state


@pytest.mark.parametrize("first", [torch.optim.AdamW, FusedAdam])
@pytest.mark.parametrize("second", [torch.optim.AdamW, FusedAdam])
def test_training_goes_on_with_either_adam(
    megatron: None, monkeypatch: pytest.MonkeyPatch, first: type, second: type
) -> None:
    monkeypatch.setattr(megatron_optimizer, "Adam", second)
    optimizer_resharding.install()
    start = torch.randn(5, generator=torch.Generator().manual_seed(9))
    one = first([torch.nn.Parameter(start.clone())], **SETTINGS)
    middle = train(one, range(3))
    other = second([torch.nn.Parameter(middle)], **SETTINGS)
    FP32Optimizer(other, OptimizerConfig(), lambda *_: None).load_state_dict(saved(one))
    torch.testing.assert_close(train(other, range(3, 6)), train(one, range(3, 6)), rtol=1e-5, atol=1e-6)
