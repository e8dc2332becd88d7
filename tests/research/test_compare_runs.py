"""Records of runs, their comparison, and the tool that prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_moa.research.compare_runs import Record, RecordedStep, RunComparison, TensorPiece, assemble
from tests.support.training import run_script
from tools import compare_parallel

TOOL = "tools/compare_parallel.py"


def record_of(gradient: torch.Tensor, end: list[TensorPiece], loss: float = 4.0) -> Record:
    gradients = [TensorPiece("w", (4, 2), (0, 0), gradient[:2]), TensorPiece("w", (4, 2), (2, 0), gradient[2:])]
    return Record(gradients=gradients, end=end, steps=[RecordedStep(1, {"lm loss": loss}, 1.0)])


def test_pieces_make_the_whole() -> None:
    whole = torch.arange(8.0).view(4, 2)
    pieces = record_of(whole, []).gradients
    assert torch.equal(assemble(pieces)["w"], whole)
    assert torch.equal(pieces[1].of(whole), whole[2:])


def test_equal_records_agree() -> None:
    gradient = torch.arange(8.0).view(4, 2)
    comparison = RunComparison.of(record_of(gradient, []), record_of(gradient, []))
    assert comparison.within(0.0)
    assert comparison.gradients == {"w": (7.0, 0.0)}


def test_each_difference_is_found() -> None:
    gradient = torch.arange(8.0).view(4, 2)
    a = record_of(gradient, [])
    other = gradient.clone()
    other[3, 0] += 0.07  # of 7, in the second rank's part
    assert RunComparison.of(a, record_of(other, [])).gradients["w"][1] == pytest.approx(0.01, rel=1e-4)
    assert not RunComparison.of(a, record_of(other, [])).within(1e-3)
    assert not RunComparison.of(a, record_of(gradient, [], loss=4.1)).within(1e-3)
    copies = [TensorPiece("g", (2,), (0,), torch.tensor([1.0, x]), rank) for rank, x in enumerate((2.0, 2.0000002))]
    drifted = RunComparison.of(a, record_of(gradient, copies))
    assert drifted.differing == ["g"]
    assert not drifted.within(1e-3)
    without = record_of(gradient, [])
    without.gradients = []
    assert RunComparison.of(a, without).missing == ["w"]


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 4),
        ("--expert-model-parallel-size 2", 2),
        ("--expert-model-parallel-size 2 --expert-tensor-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 2),
    ],
)
def test_fewest_processes(flags: str, processes: int) -> None:
    assert compare_parallel.fewest_processes(flags.split()) == processes


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.distributed
def test_tool_finds_a_split_equal() -> None:
    split = "--tensor-model-parallel-size 2 --sequence-parallel"
    run = run_script(TOOL, ["--b", split, "--steps", "3", "--", "--moa-mixing", "la", "--moa-backend", "eager"])
    assert "setting b, 2 processes" in run.log
    assert "| decoder.layers.mlp.coefficients.value[1] |" in run.log
    assert run.log.rstrip().endswith("within 1e-05")
    assert "NOT within" not in run.log


def test_tool_tells_a_failed_run() -> None:
    run = run_script(TOOL, ["--a", "--moa-gate what"], check=False)
    assert run.returncode == 2
    assert "--moa-gate what: unknown" in run.log
    assert "compare_parallel.py: error: " in run.log.splitlines()[-1]


def test_tool_compares_records_that_are_there(tmp_path: Path) -> None:
    for name, value in (("a", 2.0), ("b", 2.0), ("other", 1.9)):
        (tmp_path / name).mkdir()
        piece = ("w", (2,), (0,), torch.tensor([1.0, value]))
        saved = {"world_size": 1, "start": [piece], "gradients": [piece], "end": [piece]}
        torch.save({**saved, "steps": [(1, {"lm loss": 4.0}, 1.0)]}, tmp_path / name / "rank00000.pt")
    run = run_script(TOOL, ["--records", tmp_path / "a", tmp_path / "b"])
    assert "| w | 2.000e+00 | 0.0e+00 |" in run.log
    assert run.log.rstrip().endswith("within 1e-05")
    run = run_script(TOOL, ["--records", tmp_path / "a", tmp_path / "other"], check=False)
    assert run.returncode == 1
    assert run.log.rstrip().endswith("NOT within 1e-05")


def test_an_unfinished_record_is_refused(tmp_path: Path) -> None:
    torch.save({"world_size": 2, "start": [], "gradients": [], "end": [], "steps": []}, tmp_path / "rank00000.pt")
    with pytest.raises(ValueError, match="1 ranks' records there"):
        Record.read(tmp_path)
