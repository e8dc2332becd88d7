"""Optimizer state that Megatron cannot load under a run's split is refused in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.optimizer_resharding import check_saved_split

CHECKPOINT = Checkpoint("--load", Path("somewhere"), 4)


def muon(expert_parallel: int, expert_tensor: int = 1, tensor: int = 1, **changes: object) -> argparse.Namespace:
    """A MoE's settings; Megatron turns --use-distributed-optimizer off beside Muon."""
    sizes = {"expert_model_parallel_size": expert_parallel, "expert_tensor_parallel_size": expert_tensor}
    plain = {"optimizer": "muon", "use_distributed_optimizer": False}
    loading = {"finetune": False, "no_load_optim": False, "num_experts": 4, "tensor_model_parallel_size": tensor}
    return argparse.Namespace(**{**plain, **loading, **sizes, **changes})


@pytest.mark.parametrize(
    ("saved", "run"),
    [
        (muon(1), muon(2)),
        (muon(2), muon(1)),
        (muon(1), muon(1, expert_tensor=1, tensor=2)),
    ],
)
def test_muon_goes_on_where_experts_are_split_as_before(saved: argparse.Namespace, run: argparse.Namespace) -> None:
    with pytest.raises(UserError) as error:
        check_saved_split(run, saved, CHECKPOINT)
    text = str(error.value)
    assert f"--expert-model-parallel-size {saved.expert_model_parallel_size} --expert-tensor-parallel-size 1 " in text
    assert "in both, or in neither; go on under the sizes it was saved with, or with --no-load-optim" in text
    check_saved_split(argparse.Namespace(**{**vars(run), "no_load_optim": True}), saved, CHECKPOINT)
    dense = {"num_experts": None}
    check_saved_split(argparse.Namespace(**vars(run) | dense), argparse.Namespace(**vars(saved) | dense), CHECKPOINT)


def test_muon_goes_on_under_other_sizes() -> None:
    check_saved_split(muon(4), muon(2), CHECKPOINT)
    check_saved_split(muon(1, expert_tensor=2, tensor=2), muon(1), CHECKPOINT)
