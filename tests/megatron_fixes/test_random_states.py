"""Random number states go to the kind of device that saved them, and where all ranks' were kept."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.megatron_fixes.random_states import check_saved

SPLIT = {"world_size": 2, "tensor_model_parallel_size": 1, "expert_model_parallel_size": 2, "num_experts": 4}
CHECKPOINT = Checkpoint("--load", Path("somewhere"), 4)


def settings(**changes: object) -> argparse.Namespace:
    plain = {"rank": 0, "no_load_rng": False, "finetune": False, "ckpt_format": "torch_dist"}
    return argparse.Namespace(**plain, ckpt_convert_format=None, **changes)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Saves on one kind of device, loads on another, and returns what was printed."""

    def call(there: bool, here: bool, checkpoint: Checkpoint = CHECKPOINT, **changes: object) -> str:
        saved, args = settings(**changes), settings(**changes)
        for on_gpu, arguments in ((there, (saved, None)), (here, (args, saved, checkpoint))):
            monkeypatch.setattr("torch.cuda.is_available", lambda on_gpu=on_gpu: on_gpu)
            check_saved(*arguments)
        printed = capsys.readouterr().out
        assert args.no_load_rng == bool(printed)
        return printed

    return call


def test_another_kind_of_device(check) -> None:
    assert "are not restored: saved on a CPU, loaded on a GPU" in check(False, True)
    assert "are not restored: saved on a GPU, loaded on a CPU" in check(True, False)
    assert not check(True, True)
    for checkpoint in (Checkpoint("--pretrained-checkpoint", Path("x"), 4), Checkpoint("--load", Path("x"), None)):
        assert not check(False, True, checkpoint)  # nothing would be restored


def test_only_one_format_holds_every_ranks(check) -> None:
    assert not check(False, False, **SPLIT)
    saved = settings(**SPLIT)
    for name, value in (("ckpt_format", "torch"), ("ckpt_convert_format", "torch")):
        other = argparse.Namespace(**{**vars(saved), name: value})
        check_saved(other, None)
        args = settings(**SPLIT)
        check_saved(args, other, CHECKPOINT)
        assert args.no_load_rng
