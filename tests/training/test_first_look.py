"""Checks that mistakes and --help are answered before torch and Megatron are imported.

In these tests neither can be imported at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moa.training.first_look import look
from tests.support.training import ROOT, SWIGLU, TINY

HEAVY = ("torch", "transformers", "megatron")
LIGHT_TOOLS = (
    "analyze_gates",
    "blend",
    "build_cache",
    "convert_from_hf",
    "convert_mixing",
    "convert_to_hf",
    "evaluate",
    "evaluate_text",
    "generate",
    "merge_data",
    "plot_runs",
    "preprocess_data",
    "study_report",
    "tabulate_runs",
    "train_tokenizer",
)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which an import of torch, transformers or Megatron is an error."""
    folder = tmp_path_factory.mktemp("heavy")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is imported')\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


def answer(environment: dict[str, str], *command: str) -> tuple[int, str]:
    """Exit code and output of a script of the project."""
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--moa-activations", "swishy"], "--moa-activations swishy: unknown; choose from"),
        ([*TINY, *SWIGLU, "--moa-gate", "relu"], "--moa-gate relu: unknown"),
        ([*TINY, "--moa-form", "bi-sided"], "--moa-form bi-sided: "),
        (["--no-such-flag", "3"], "--no-such-flag: neither Megatron"),
        (["--openai-gelu"], "--openai-gelu: has no effect"),
        (["--use-checkpoint-args", "--load", "/nonexistent"], "--load /nonexistent: no checkpoint"),
        (
            ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "/nonexistent/t.model"],
            "--tokenizer-model /nonexistent/t.model: no such file",
        ),
        (
            ["--tokenizer-type", "NullTokenizer", "--vocab-size", "63", "--data-path", "/nonexistent/corpus"],
            "--data-path /nonexistent/corpus",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_a_training_answers_at_once(without_torch: dict[str, str], flags: list[str], part: str) -> None:
    returncode, printed = answer(without_torch, "pretrain_gpt_moa.py", *flags)
    assert returncode == 2, printed
    assert printed.startswith(f"pretrain_gpt_moa.py: error: {part}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_training_is_not_started_once_for_each_task(without_torch: dict[str, str], name: str) -> None:
    environment = {key: value for key, value in without_torch.items() if key != "RANK"}
    for further, asks in (({}, True), ({"RANK": "0"}, False)):  # the latter is a launcher's
        command = ("pretrain_gpt_moa.py", *TINY, *SWIGLU, "--moa-activations", "swishy")
        returncode, printed = answer({**environment, name: "8", **further}, *command)
        assert returncode == 2, printed
        assert (f"error: {name} is 8 but RANK is not set: " in printed) == asks
        assert (f"for trainings of their own unset {name}\n" in printed) == asks
    returncode, printed = answer({**environment, name: "1"}, *command)
    assert "swishy" in printed


def test_help_shows_our_flags_and_names_megatrons(without_torch: dict[str, str]) -> None:
    returncode, printed = answer(without_torch, "pretrain_gpt_moa.py", "--help")
    assert returncode == 0
    assert "--moa-keep-last N" in printed
    assert "--tensor-model-parallel-size" in printed
    assert "--help-megatron" in printed


@pytest.mark.parametrize("tool", LIGHT_TOOLS)
def test_tools_answer_at_once(without_torch: dict[str, str], tool: str) -> None:
    returncode, printed = answer(without_torch, f"tools/{tool}.py", "--no-such-flag")
    assert returncode == 2, printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("tool", ["convert_from_hf", "convert_mixing", "convert_to_hf"])
def test_conversions_name_a_mistyped_flag_at_once(without_torch: dict[str, str], tool: str) -> None:
    source = "--hf" if tool == "convert_from_hf" else "--load"
    flags = [source, "x", "--out", "y", "--tolerence", "1"]
    flags += ["--mixing", "moa"] if tool == "convert_mixing" else []
    returncode, printed = answer(without_torch, f"tools/{tool}.py", *flags)
    assert returncode == 2, printed
    assert printed.startswith(f"{tool}.py: error: --tolerence: "), printed
    assert printed.count("\n") == 1


def test_what_is_right_is_left_to_megatrons_parser(tmp_path: Path) -> None:
    look("program", [*TINY, *SWIGLU, "--moa-activations", "silu", "tanh", "--num-workers=0"])
    look("program", ["--help-megatron"])
    look("program", ["--use-checkpoint-args", "--load", str(tmp_path), "--moa-form", "quadratic"])
