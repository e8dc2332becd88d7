"""tools/kernel_resources.py, tools/tune_kernels.py, and the configurations that the kernels are launched with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_moa.errors import UserError
from megatron_moa.kernels.configurations import VARIABLE, Configuration, configuration, default_configuration, using
from tests.training import ROOT
from tools.tune_kernels import candidates, write

CPU = torch.device("cpu")


def count(folder: Path, *flags: str) -> dict[tuple[str, str], dict]:
    """What the tool writes of forward and backward, by form and direction."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = folder / "counts.jsonl"
    command = [sys.executable, str(ROOT / "tools/kernel_resources.py"), "--json", str(file), *flags]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {(record["form"], record["direction"]): record for record in records}


def test_machine_code_for_hopper_keeps_its_values_in_registers_and_shares_terms(tmp_path: Path) -> None:
    whole = count(tmp_path, "--form", "type1", "bi-sided", "--ffn", "4096")
    assert {record["spilled"] for record in whole.values()} == {0}
    assert all(record["registers"] <= 255 for record in whole.values())
    for (form, direction), record in whole.items():
        branches = 2 if form == "bi-sided" else 1
        # Two exp2 and two rsqrt serve all seven activations of a branch, and their derivatives.
        assert record["instructions"]["MUFU"] == 4 * branches, (form, direction)
    (tmp_path / "counts.jsonl").unlink()
    two = count(tmp_path, "--form", "bi-sided", "--ffn", "4096", "--activations", "silu", "gelu")
    assert two["bi-sided", "forward"]["instructions"]["MUFU"] == 8
    issued = [sum(r["bi-sided", "backward"]["instructions"].values()) for r in (two, whole)]
    assert issued[1] < 1.8 * issued[0]  # seven activations for less than twice the instructions of two


def test_a_row_is_covered_with_little_waste() -> None:
    for f in (704, 1408, 2816, 3072, 5120, 8192):
        chosen = default_configuration(f)
        assert chosen.block == 256 * chosen.warps
        assert -f % chosen.block <= 0.15 * f


def test_a_tuned_file_is_used_and_a_broken_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels.json"
    entry = {"kernel": "forward", "form": "bi-sided", "f": 704, "block": 2048, "warps": 16, "rows": 4}
    write(file, "cpu", [entry])
    write(file, "sm90", [{**entry, "block": 512}])
    write(file, "cpu", [{**entry, "f": 100}, {**entry, "warps": 8}])
    monkeypatch.setenv(VARIABLE, str(file))
    assert configuration("forward", "bi-sided", 704, CPU) == Configuration(2048, 8, 4)
    assert configuration("backward", "bi-sided", 704, CPU) == default_configuration(704)
    assert len(json.loads(file.read_text())["cpu"]) == 2
    for name, text in (("cut", '{"cpu": ['), ("lacking", '{"cpu": [{"kernel": "forward"}]}')):
        broken = tmp_path / name
        broken.write_text(text)
        monkeypatch.setenv(VARIABLE, str(broken))
        with pytest.raises(UserError, match=f"{VARIABLE}={broken}: .*tools/tune_kernels.py"):
            configuration("forward", "bi-sided", 704, CPU)


def test_a_candidate_holds_inside_only() -> None:
    mine = Configuration(4096, 16)
    with using("forward", "type1", 64, mine):
        assert configuration("forward", "type1", 64, CPU) == mine
        assert configuration("backward", "type1", 64, CPU) != mine
    assert configuration("forward", "type1", 64, CPU) == default_configuration(64)
    assert len(set(candidates("backward", "la"))) > len(set(candidates("forward", "la"))) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/tune_kernels.py"), "--ffn", "64", "--output", str(tmp_path / "k.json")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert "there is no GPU" in run.stderr
    assert not (tmp_path / "k.json").exists()
