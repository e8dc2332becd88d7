"""Twenty steps are ten, a stop, and ten more: to the last bit, with dropout on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_moa.research import compare_runs
from megatron_moa.research.compare_runs import Record
from megatron_moa.training.exit_codes import EXIT_SAVED_ON_SIGNAL
from tests.support import launch
from tests.support.training import FORM_ARMS, MOE, ROOT, SWIGLU, TINY, TWO_KINDS, record, recorded

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 20
STOP_AT = 10
# Validation on the way draws from its own data and must not disturb training's.
_BASE = (
    f"--train-iters {STEPS} --hidden-dropout 0.1 --attention-dropout 0.1 --moa-backend eager "
    "--eval-interval 8 --eval-iters 1 --ckpt-format torch_dist"
).split()
_LA = "--moa-mixing la".split()
_MOA = "--moa-mixing moa --moa-gate-bias --moa-amplitude learned".split()
_DISTRIBUTED = "--use-distributed-optimizer".split()
_TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
_PP2 = "--pipeline-model-parallel-size 2".split()
_EP2 = [*MOE, "--expert-model-parallel-size", "2"]

CASES = {
    "dense-moa": (1, _MOA),
    "dense-la": (1, _LA),
    "tp2-sp-dp2-distopt": (4, [*_MOA, *_TP2, *_DISTRIBUTED]),
    "pp2": (2, [*_MOA, *_PP2]),
    "dp2": (2, _LA),
    "dp2-distopt": (2, [*_MOA, *_DISTRIBUTED]),
    "moe": (1, [*_MOA, *MOE]),
    "ep2": (2, [*_MOA, *_EP2]),
    "ep2-distopt": (2, [*_LA, *_EP2, *_DISTRIBUTED]),
    "bf16-distopt": (2, [*_MOA, *_DISTRIBUTED, "--bf16"]),
    "bf16": (1, [*_LA, "--bf16"]),
    "cyclic-data": (2, [*_MOA, "--dataloader-type", "cyclic"]),
    "wsd-mid-decay": (1, [*_MOA, *"--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 14".split()]),
    "stock": (1, ["--moa-mixing", "none", "--moa-backend", "auto"]),
}
_OFTEN = {"dp2-distopt"}


def assert_continued(whole: Record, first: Record, second: Record) -> None:
    """``second`` goes on from the end of ``first`` as ``whole`` did, bit for bit."""
    stopped = first.steps[-1].iteration
    assert [step.iteration for step in second.steps] == list(range(stopped + 1, STEPS + 1))
    assert first.steps + second.steps == whole.steps
    for ours, expected in ((second.start, first.end), (second.end, whole.end)):
        assert len(ours) == len(expected) > 0
        for piece, other in zip(ours, expected, strict=True):
            assert (piece.key, piece.offset, piece.rank) == (other.key, other.offset, other.rank)
            assert torch.equal(piece.data, other.data), piece.key


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in _OFTEN else pytest.mark.full) for case in CASES]
)
def test_resumed_run_is_the_same_run(case: str, tmp_path: Path) -> None:
    processes, flags = CASES[case]
    flags = [*SWIGLU, *_BASE, *flags]
    whole = recorded(tmp_path / "whole", *flags, processes=processes)
    save = ["--save", tmp_path / "saved", "--save-interval", "100"]
    first = recorded(tmp_path / "first", *flags, *save, "--exit-interval", str(STOP_AT), processes=processes)
    second = recorded(tmp_path / "second", *flags, "--load", tmp_path / "saved", processes=processes)
    assert first.steps[-1].iteration == STOP_AT
    assert_continued(whole, first, second)


_TP2_EP2 = [*_TP2, *"--expert-model-parallel-size 2 --expert-tensor-parallel-size 1".split()]


_SPLITS = {"tp2-ep2": _TP2_EP2, "pp2": _PP2}


@pytest.mark.parametrize(
    ("arm", "split"),
    [
        pytest.param(
            arm, split, id=f"{arm}-{name}", marks=() if (arm, name) == ("quadratic-moa", "pp2") else pytest.mark.full
        )
        for arm in FORM_ARMS
        for name, split in _SPLITS.items()
    ],
)
def test_one_sided_and_quadratic_resume_on_every_kind_of_layer(arm: str, split: list[str], tmp_path: Path) -> None:
    """Here the checkpoint in the middle is one that the whole run saved on its way."""
    flags = [*SWIGLU, *TWO_KINDS, *_BASE, *FORM_ARMS[arm].split(), *split]
    if arm in ("one-sided-moa", "quadratic-la"):
        flags += _DISTRIBUTED
    saved = tmp_path / "saved"
    whole = recorded(tmp_path / "whole", *flags, "--save", saved, "--save-interval", str(STOP_AT), processes=2)
    middle = ["--load", saved, "--ckpt-step", str(STOP_AT)]
    second = recorded(tmp_path / "second", *flags, *middle, processes=2)
    assert [step.iteration for step in second.steps] == list(range(STOP_AT + 1, STEPS + 1))
    assert second.steps == whole.steps[STOP_AT:]
    assert len(second.end) == len(whole.end) > 0
    for piece, other in zip(second.end, whole.end, strict=True):
        assert (piece.key, piece.offset, piece.rank) == (other.key, other.offset, other.rank)
        assert torch.equal(piece.data, other.data), piece.key


def _stopped_by_signal(arguments: list[str], folder: Path, at: int) -> None:
    """A recorded run whose last rank gets SIGTERM during step ``at``."""
    from megatron.training import training

    train_step = training.train_step
    steps = iter(range(1, STEPS + 1))

    def step(*args: object, **kwargs: object) -> object:
        if next(steps) == at and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args, **kwargs)

    training.train_step = step
    compare_runs.run(str(ROOT / "pretrain_gpt_moa.py"), arguments, folder)


def test_run_stopped_by_a_signal_resumes_as_the_same_run(tmp_path: Path) -> None:
    flags = [*TINY, *SWIGLU, *_BASE, *_MOA]
    saved = ["--save", str(tmp_path / "saved"), "--save-interval", "100", "--exit-signal-handler"]
    whole = recorded(tmp_path / "whole", *flags, processes=2)
    target = ([*flags, *saved], tmp_path / "first", 7)
    returncode, log = launch.launch(_stopped_by_signal, target, 2, ROOT)
    assert returncode == EXIT_SAVED_ON_SIGNAL, log
    second = recorded(tmp_path / "second", *flags, "--load", tmp_path / "saved", processes=2)
    first = Record.read(tmp_path / "first")
    assert first.steps[-1].iteration == 7
    assert_continued(whole, first, second)


def _with_random_states(arguments: list[str], folder: Path) -> None:
    """A run that leaves every stream's state at the first step's beginning and at the end, a file a rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.training import training

    train = training.train

    def call(*args: object, **kwargs: object) -> object:
        states = [{**get_cuda_rng_tracker().get_states(), "default": torch.get_rng_state()}]
        try:
            return train(*args, **kwargs)
        finally:
            states.append({**get_cuda_rng_tracker().get_states(), "default": torch.get_rng_state()})
            torch.save(states, folder / f"states{os.environ['RANK']}.pt")

    training.train = call
    folder.mkdir(exist_ok=True)
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), arguments)


def test_every_expert_rank_gets_its_own_random_states_back(tmp_path: Path) -> None:
    flags = [*TINY, *SWIGLU, *_BASE, *_LA, *_EP2]
    save = ["--save", str(tmp_path / "saved"), "--save-interval", "100", "--exit-interval", "2"]
    for name, further in (("first", save), ("second", ["--load", str(tmp_path / "saved")])):
        returncode, log = launch.launch(_with_random_states, ([*flags, *further], tmp_path / name), 2, ROOT)
        assert returncode == 0, log
    ends, starts = [], []
    for rank in (0, 1):
        ends.append(torch.load(tmp_path / f"first/states{rank}.pt", weights_only=True)[1])
        starts.append(torch.load(tmp_path / f"second/states{rank}.pt", weights_only=True)[0])
        assert ends[rank].keys() == starts[rank].keys()
        for stream, state in ends[rank].items():
            assert torch.equal(state, starts[rank][stream]), f"rank {rank}, {stream}"
    assert not torch.equal(ends[0]["expert-parallel-rng"], ends[1]["expert-parallel-rng"])


def test_random_states_of_expert_ranks_need_the_same_split(tmp_path: Path) -> None:
    flags = [*SWIGLU, *_BASE, *_LA, *MOE]
    save = ["--save", tmp_path / "saved", "--save-interval", "100", "--exit-interval", "2"]
    record(tmp_path / "ep2", *flags, *_EP2, *save, processes=2)
    run = record(tmp_path / "one", *flags, "--load", tmp_path / "saved", "--no-load-optim", "--train-iters", "3")
    assert "random number states are not restored: saved with --expert-model-parallel-size 2, loaded with 1" in run.log
