"""The same model, however it is split: losses on two gloo processes agree with one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import MOE, SWIGLU, Run, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 10
CHECKPOINT_AT = 3
TOLERANCE = 1e-4  # of the loss, which starts near ln 64 = 4.2

MIXINGS = ("moa", "la")


def _from_checkpoint(folder: Path) -> list[str]:
    """Starts where the one-process run was after three steps: other splits draw other initial values."""
    return ["--load", str(folder), "--ckpt-step", str(CHECKPOINT_AT), "--no-load-rng"]


def _train(mixing: str, *arguments: str, processes: int = 1, steps: int = STEPS) -> Run:
    flags = ["--moa-mixing", mixing, "--moa-backend", "eager", "--train-iters", str(steps), "--moa-log-interval", "6"]
    return train(*SWIGLU, *flags, *arguments, processes=processes)


def _save(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", str(CHECKPOINT_AT), "--ckpt-format", "torch_dist"]


@pytest.fixture(scope="module", params=MIXINGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Run]:
    """A dense model on one process, its checkpoint after three steps, and its losses."""
    folder = tmp_path_factory.mktemp(f"dense-{request.param}")
    return request.param, folder, _train(request.param, *_save(folder), steps=CHECKPOINT_AT + STEPS)


@pytest.fixture(scope="module", params=MIXINGS)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Run]:
    """A MoE model's checkpoint, and the losses of one process that starts from its weights.

    From the weights alone, on both sides: Megatron's plain optimizer cannot load its state under another expert
    split ("Expected 2 entries in state dict, but got 4").
    """
    folder = tmp_path_factory.mktemp(f"moe-{request.param}")
    _train(request.param, *MOE, *_save(folder), steps=CHECKPOINT_AT)
    return request.param, folder, _train(request.param, *MOE, "--load", str(folder), "--finetune")


def _assert_same(run: Run, expected: Run, iterations: range) -> None:
    for iteration in iterations:
        assert run.losses[iteration] == pytest.approx(expected.losses[iteration], abs=TOLERANCE), iteration
        norm = expected.grad_norms[iteration]
        assert run.grad_norms[iteration] == pytest.approx(norm, rel=2e-3), f"gradient norm at {iteration}"
    logged = {key for key in expected.coefficients if key[0] in iterations}
    assert {layer for _, layer in logged} == {1, 2}
    assert logged <= set(run.coefficients)
    for key in logged:
        assert run.coefficients[key] == pytest.approx(expected.coefficients[key], abs=2e-3), key


@pytest.mark.parametrize(
    "flags",
    [
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2",
    ],
)
def test_dense_splits_train_as_one_process(dense: tuple[str, Path, Run], flags: str) -> None:
    mixing, folder, expected = dense
    steps = CHECKPOINT_AT + STEPS
    run = _train(mixing, *_from_checkpoint(folder), *flags.split(), processes=2, steps=steps)
    _assert_same(run, expected, range(CHECKPOINT_AT + 1, steps + 1))


def test_distributed_optimizer_trains_as_one_process(dense: tuple[str, Path, Run]) -> None:
    mixing, _, expected = dense
    run = _train(mixing, "--use-distributed-optimizer", processes=2, steps=CHECKPOINT_AT + STEPS)
    _assert_same(run, expected, range(1, STEPS + 1))


@pytest.mark.parametrize(
    "flags",
    [
        "--expert-model-parallel-size 2",
        # Each expert's columns on two ranks: tokens are gathered, and their gradient summed, by the dispatcher.
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
    ],
)
def test_expert_splits_train_as_one_process(moe: tuple[str, Path, Run], flags: str) -> None:
    mixing, folder, expected = moe
    run = _train(mixing, *MOE, *flags.split(), "--load", str(folder), "--finetune", processes=2)
    _assert_same(run, expected, range(1, STEPS + 1))
