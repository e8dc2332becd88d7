"""A tensor that a checkpoint lacks, or has in another shape, is one line before anything is loaded."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_moa.checkpoints.guard import match_tensors
from megatron_moa.errors import UserError
from megatron_moa.training.parser import parser_defaults
from tests.support.checkpoints import write_checkpoint

BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_{}.exp_avg"
SETTINGS = {"overlap_grad_reduce": False, "ddp_bucket_size": None, "bf16": False, "data_parallel_size": 2}


def asked(tensors: dict[str, int], **settings: object) -> dict[str, ShardedTensor]:
    return {
        key: ShardedTensor.from_rank_offsets(key, torch.empty(size), allow_shape_mismatch=key == "padded", **settings)
        for key, size in tensors.items()
    }


def stored(root: Path, tensors: dict[str, int]) -> str:
    folder = write_checkpoint(root / "iter_0000002", {key: torch.zeros(n) for key, n in tensors.items()}, SETTINGS)
    return str(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The run's settings, which are the checkpoint's."""
    args = argparse.Namespace(**{**parser_defaults(), **SETTINGS})
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", args)
    return args


def test_what_fits_is_loaded(tmp_path: Path, run: argparse.Namespace) -> None:
    tensors = {"weight": 4, "padded": 6, BUCKET.format(0): 9}
    folder = stored(tmp_path, tensors)
    match_tensors(asked({**tensors, "padded": 8}), folder)
    match_tensors(asked({"weight": 4, "padded": 6}), folder)  # without the optimizer


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({BUCKET.format(0): 9}, {BUCKET.format(0): 5, BUCKET.format(1): 4}),
        ({BUCKET.format(0): 5, BUCKET.format(1): 4}, {BUCKET.format(0): 9}),
        ({BUCKET.format(0): 9}, {BUCKET.format(0): 9, BUCKET.format(1): 4}),
        ({BUCKET.format(0).replace("float32)", "bfloat16)"): 9}, {BUCKET.format(0): 9}),
    ],
)
def test_other_buckets_of_the_optimizer(
    tmp_path: Path, run: argparse.Namespace, here: dict[str, int], there: dict[str, int]
) -> None:
    folder = stored(tmp_path, {"weight": 4, **there})
    run.overlap_grad_reduce, run.data_parallel_size = True, 4
    with pytest.raises(UserError) as error:
        match_tensors(asked({"weight": 4, **here}), folder)
    text = str(error.value)
    assert text.startswith(f"--load {folder}: has the optimizer's state in other buckets than this run (")
    assert "(no --overlap-grad-reduce there, --overlap-grad-reduce here, a data-parallel size of 2 there, 4" in text
    assert "--no-load-optim; saved with --dist-ckpt-optim-fully-reshardable" in text
    assert "\n" not in text


BUCKETS = {BUCKET.format(0): 9}, {BUCKET.format(0): 5, BUCKET.format(1): 4}


@pytest.mark.parametrize(
    ("here", "there", "what"),
    [
        ({"weight": 4, "bias": 1}, {"weight": 4}, "lacks 1 tensors (bias)"),
        ({}, {"weight": 4}, "has 1 tensors (weight) that"),
        ({"weight": 5}, {"weight": 4}, "has 1 tensors (weight) in other shapes"),
    ],
)
def test_another_model_is_named_before_its_optimizers_buckets(
    tmp_path: Path, run: argparse.Namespace, here: dict[str, int], there: dict[str, int], what: str
) -> None:
    folder = stored(tmp_path, {**there, **BUCKETS[1]})
    with pytest.raises(UserError, match=re.escape(f"the checkpoint {what}")) as error:
        match_tensors(asked({**here, **BUCKETS[0]}), folder)
    assert str(error.value).endswith("saved with")  # --no-load-optim is no remedy


def test_a_checkpoint_without_buckets_lacks_them(tmp_path: Path, run: argparse.Namespace) -> None:
    folder = stored(tmp_path, {"weight": 4, "optimizer.state.exp_avg.weight": 4})
    with pytest.raises(UserError, match=r"lacks 1 tensors \(optimizer.distributed.*, or with --no-load-optim"):
        match_tensors(asked({"weight": 4, **BUCKETS[0]}), folder)


@pytest.mark.parametrize(
    ("here", "what", "remedy"),
    [
        ({"weight": 4, "bias": 1}, "lacks 1 tensors (bias) that this run has", "saved with"),
        ({}, "has 1 tensors (weight) that this run lacks", "saved with"),
        ({"weight": 5}, "has 1 tensors (weight) in other shapes than this run", "saved with"),
        ({"weight": 4, "optimizer.state.exp_avg.weight": 4}, "lacks 1 tensors (opt", "or with --no-load-optim"),
    ],
)
def test_the_flag_and_the_remedy_are_named(
    tmp_path: Path, run: argparse.Namespace, here: dict[str, int], what: str, remedy: str
) -> None:
    folder = stored(tmp_path, {"weight": 4})
    with pytest.raises(UserError) as error:
        match_tensors(asked(here), folder, "--pretrained-checkpoint")
    text = str(error.value)
    assert text.startswith(f"--pretrained-checkpoint {folder}: the checkpoint {what}")
    assert text.endswith(remedy)
