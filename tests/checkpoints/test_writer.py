"""Checks that megatron_moa/checkpoints/writer.py writes what Megatron's own saving would have written.

The writer takes one tensor at a time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_moa.checkpoints.files import TRACKER, find_damage, read_tracker
from megatron_moa.checkpoints.tensors import OPTIMIZER, CheckpointTensors
from tests.support import launch
from tests.support.training import MOE, ROOT, SWIGLU, TINY, recorded

TIED = [flag for flag in TINY if flag not in ("--disable-bias-linear", "--untie-embeddings-and-output-weights")]
EAGER = ["--moa-backend", "eager"]
TP, PP, EP = (f"--{kind}-model-parallel-size" for kind in ("tensor", "pipeline", "expert"))
SHARED = "--qk-layernorm --moe-shared-expert-intermediate-size 32".split()
GROUPED = "--moe-grouped-gemm --moe-router-enable-expert-bias --moe-router-score-function sigmoid".split()
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
# how it is trained (flags, processes), and another split
CASES = {
    "MoE, shared expert, moa, EP 2 to TP 2": (
        [*TINY, *SWIGLU, *MOE, *SHARED, *EAGER, EP, "2"],
        2,
        [TP, "2", EP, "1", "--sequence-parallel"],
    ),
    "grouped experts, expert bias, bf16, EP 1 to EP 2": (
        [*TINY, *SWIGLU, *MOE, *GROUPED, "--moa-mixing", "none", "--bf16"],
        1,
        [EP, "2"],
    ),
    "tied, learned positions, biases, la, TP 2 to PP 2": (
        [*TIED, *GPT2, "--moa-mixing", "la", *EAGER, TP, "2"],
        2,
        [TP, "1", PP, "2"],
    ),
    "SwiGLU, a scale of the gates, PP 2 to TP 2": (
        [*TINY, *SWIGLU, "--moa-init-scale", "matched", *EAGER, PP, "2"],
        2,
        [TP, "2", PP, "1"],
    ),
}
_OFTEN = next(iter(CASES))


def rewrite(source: Path, out: Path, wrong: str = "") -> None:
    """Runs in a process of its own: writes a checkpoint again, or tries to with a tensor of another shape."""
    from megatron_moa.checkpoints.tensors import ModelTensors
    from megatron_moa.checkpoints.writer import write_release
    from megatron_moa.trained.from_megatron import prepare_checkpoint

    prepared = prepare_checkpoint(str(source), ["--transformer-impl", "local"])
    model = prepared.build_empty()
    tensors = ModelTensors(prepared.checkpoint.path, model)
    asked = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name][:-1] if name == wrong else tensors[name]

    write_release(model, prepared.saved, out, read)
    assert asked == list(tensors)  # each once


def _launch(target: Callable[..., None], *arguments: object, processes: int = 1, code: int = 0) -> str:
    returncode, log = launch.launch(target, arguments, processes, ROOT)
    assert returncode == code, log[-3000:]
    return log


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == _OFTEN else pytest.mark.full) for case in CASES]
)
def test_is_what_megatron_writes(case: str, tmp_path: Path) -> None:
    flags, processes, split = CASES[case]
    source, out = tmp_path / "source", tmp_path / "out"
    training = [*flags, "--train-iters", "2", "--save", str(source), "--save-interval", "2"]
    _launch(launch.script, str(ROOT / "pretrain_gpt_moa.py"), training, processes=processes)
    log = _launch(rewrite, source, out)
    assert "written: 100%" in log
    assert read_tracker(out) is None
    assert find_damage(out / "release") is None

    # The same keys and tensors to the last bit, and the same description of each, but for how it was cut.
    before, after = CheckpointTensors(source / "iter_0000002"), CheckpointTensors(out / "release")
    kept = {key for key in before.tensors if not key.startswith(OPTIMIZER)}
    assert kept == set(after.tensors)
    for key in kept:
        first, second = before.read(key), after.read(key)
        assert first.dtype == second.dtype, key
        assert torch.equal(first, second), key
    entries = [
        pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
        for folder in (source / "iter_0000002", out / "release")
    ]
    for key, entry in entries[1].items():
        if key != "common_state/shard_0_1" and "_extra_state" not in key:
            assert entry.properties == entries[0][key].properties, key
    assert before.content_metadata == after.content_metadata
    assert vars(before.args) == vars(after.args)

    # Another split goes on from it with the loss that the training itself would have gone on with.
    go_on = ["--use-checkpoint-args", "--train-iters", "1"]
    started = ["--pretrained-checkpoint", source]
    expected = recorded(tmp_path / "a", *go_on, *started, model=flags, processes=processes)
    started = [*split, "--pretrained-checkpoint", out]
    actual = recorded(tmp_path / "b", *go_on, *started, model=flags, processes=2)
    losses = [run.steps[0].losses["lm loss"] for run in (expected, actual)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if "bf16" in case else 1e-6)

    if case == _OFTEN:
        name = "decoder.layers.1.self_attention.linear_proj.weight"
        log = _launch(rewrite, source, tmp_path / "wrong", name, code=1)
        assert f"{name}: is (31, 32), the model's is (32, 32)" in log
        assert not (tmp_path / "wrong" / TRACKER).exists()  # so nobody takes it for a checkpoint
