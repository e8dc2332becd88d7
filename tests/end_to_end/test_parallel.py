"""The same model, however it is split: every loss, every gradient and every copy, against one process.

The matrix has a row for every split and a column for every arm (stock SwiGLU; LA and MoA in four forms). A split
changes the mixture's arithmetic through the kind of its coefficients (none, [n], [tokens, n]) and through its form, and
these two do not meet in code. So it is covered by pairs rather than in full: every split with stock, LA and MoA, and
the form moving on from row to row, LA's two ahead of MoA's. Each form thus meets every kind of communication.
One-sided and quadratic LA and MoA also run in a model with dense layers, routed and shared experts under TP 2 with
sequence parallelism and EP 2, and under PP 2. ``make test`` runs two of these and one split of each kind, with the arms
in turn; ``make test-all`` all pairs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moa.mixture.config import FORMS
from megatron_moa.research.compare_runs import Record, RunComparison
from tests.support.training import FORM_ARMS, MOE, SWIGLU, TWO_KINDS, recorded

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 12  # after which copies must be equal
LOSS_STEPS = 10
TOLERANCE = 1e-5  # relative: of a loss to itself, of a gradient to its own largest entry

# name: (processes, flags)
SPLITS = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp4": (4, "--tensor-model-parallel-size 4"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "tp4-sp": (4, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-virtual": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, ""),
    "dp2-distopt": (2, "--use-distributed-optimizer"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"),
    "tp2-dp2-distopt": (4, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
}
_SHARED = "--moe-shared-expert-intermediate-size 32"
_ALLGATHER = "--moe-token-dispatcher-type allgather"
MOE_SPLITS = {
    "ep2-alltoall": (2, "--expert-model-parallel-size 2"),
    "ep2-allgather": (2, f"--expert-model-parallel-size 2 {_ALLGATHER}"),
    "ep2-etp2": (4, "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    "tp2-ep2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
                   " --expert-tensor-parallel-size 1"),
    "tp2-ep2-etp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"),
    "tp2-sp-etp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "ep2-distopt": (4, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
}  # fmt: skip
SHARED_SPLITS = {
    "shared-tp2-sp": (2, f"--tensor-model-parallel-size 2 --sequence-parallel {_SHARED}"),
    "shared-ep2": (2, f"--expert-model-parallel-size 2 {_SHARED}"),
    "shared-ep2-overlap": (2, f"--expert-model-parallel-size 2 {_SHARED} --moe-shared-expert-overlap"),
}

# Further settings of the gates, one a form, so that they are split too.
_GATES = {
    "type1": "--moa-gate softmax --moa-gate-init-std 0.2",
    "one-sided": "--moa-gate tanh --moa-gate-bias --moa-gate-init-std 0.2",
    "bi-sided": "",
    "quadratic": "--moa-gate-bias --moa-amplitude learned --moa-gate-init-std 0.2",
}
_FORM_SPLITS = {
    "tp2-sp-ep2": MOE_SPLITS["tp2-ep2"][1],
    "pp2": SPLITS["pp2"][1],
}
_QUICK = {"dp2-distopt", "tp2-pp2", "tp2-sp-etp2"}


_IN_TURN = ("moa", "la", "moa", "moa", "none")  # MoA most often: it has the most to split


def _arm(mixing: str, form: str) -> str:
    if mixing == "none":
        return f"--moa-mixing none {' '.join(SWIGLU)}"
    gated = "--ffn-hidden-size 48" if form == "type1" else " ".join(SWIGLU)
    gates = _GATES[form] if mixing == "moa" else ""
    return f"--moa-mixing {mixing} --moa-form {form} --moa-backend eager {gated} {gates}"


def _cases(splits: dict[str, tuple[int, str]]) -> list[object]:
    cases = []
    for row, (name, (processes, flags)) in enumerate(splits.items()):
        for column, mixing in enumerate(("moa", "la", "none")):
            form = FORMS[(row + row // len(FORMS) + 2 * column) % len(FORMS)]
            in_turn = mixing == _IN_TURN[row % len(_IN_TURN)] and name in _QUICK
            label = f"{name}-{mixing}" if mixing == "none" else f"{name}-{mixing}-{form}"
            marks = () if in_turn else pytest.mark.full
            cases.append(pytest.param(_arm(mixing, form), processes, flags, id=label, marks=marks))
    return cases


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Record]]:
    """Records of one process by the model's flags, made when first asked for."""

    class References(dict):
        def __missing__(self, flags: str) -> tuple[Path, Record]:
            folder = tmp_path_factory.mktemp("one")
            self[flags] = folder, recorded(folder, *flags.split())
            return self[flags]

    return References()


def _assert_equal(
    one_process: dict[str, tuple[Path, Record]], folder: Path, model: str, processes: int, flags: str
) -> None:
    start, expected = one_process[model]
    run = recorded(folder, *model.split(), *flags.split(), processes=processes, start_from=start)
    comparison = RunComparison.of(expected, run, steps=LOSS_STEPS)
    assert len(comparison.losses) == LOSS_STEPS
    assert comparison.replicated > 0 or "pipeline" in flags
    assert comparison.within(TOLERANCE), comparison


# One layer a virtual stage; a sample a micro-batch, so that no split changes which samples share one (the router's
# auxiliary loss depends on it).
_BASE = f"--num-layers 4 --num-query-groups 4 --train-iters {STEPS} --micro-batch-size 1"


@pytest.mark.parametrize(("arm", "processes", "flags"), _cases(SPLITS))
def test_dense(
    one_process: dict[str, tuple[Path, Record]], tmp_path: Path, arm: str, processes: int, flags: str
) -> None:
    _assert_equal(one_process, tmp_path, f"{_BASE} {arm}", processes, flags)


def test_a_layout_that_is_written_out(one_process: dict[str, tuple[Path, Record]], tmp_path: Path) -> None:
    """Four virtual stages of unequal lengths, the last one without a layer."""
    layout = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|tt|L"
    _assert_equal(one_process, tmp_path, f"{_BASE} {_arm('moa', 'bi-sided')}", 2, layout)


@pytest.mark.parametrize(("arm", "processes", "flags"), _cases(MOE_SPLITS))
def test_moe(one_process: dict[str, tuple[Path, Record]], tmp_path: Path, arm: str, processes: int, flags: str) -> None:
    _assert_equal(one_process, tmp_path, f"{_BASE} {arm} {' '.join(MOE)}", processes, flags)


@pytest.mark.parametrize(("arm", "processes", "flags"), _cases(SHARED_SPLITS))
def test_shared_experts(
    one_process: dict[str, tuple[Path, Record]], tmp_path: Path, arm: str, processes: int, flags: str
) -> None:
    _assert_equal(one_process, tmp_path, f"{_BASE} {arm} {' '.join(MOE)} {_SHARED}", processes, flags)


@pytest.mark.full
@pytest.mark.parametrize("arm", FORM_ARMS)
def test_one_sided_and_quadratic_on_every_kind_of_layer(
    one_process: dict[str, tuple[Path, Record]], tmp_path: Path, arm: str
) -> None:
    backend = "--moa-backend eager"
    model = f"{_BASE} {' '.join([*SWIGLU, *TWO_KINDS])} {FORM_ARMS[arm]} {backend}"
    for name, flags in _FORM_SPLITS.items():
        (tmp_path / name).mkdir()
        _assert_equal(one_process, tmp_path / name, model, 2, flags)
