"""Checks that Transformer Engine and Apex are kept out where there is no CUDA device.

This holds by whatever way Megatron is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.training import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")

FUSED = "class FusedAdam: pass\nclass FusedSGD: pass"
HALF_INSTALLED = "raise FileNotFoundError('no shared object file')"
ASK = (
    "import importlib.util, {first}; from megatron.core.extensions.transformer_engine import HAVE_TE; "
    "from megatron.core.optimizer import Adam; "
    "print(HAVE_TE, importlib.util.find_spec('transformer_engine') is not None, Adam.__module__)"
)


def python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code where packages transformer_engine and apex lie in ``folder``."""
    variables = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a Transformer Engine whose import fails in a way that Megatron does not expect, and an Apex."""
    for name, source in (("transformer_engine", HALF_INSTALLED), ("apex", ""), ("apex/optimizers", FUSED)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("first", ["megatron_moa.trained.from_megatron", "megatron_moa.cpu.switch"])
def test_megatron_runs_without_it(folder: Path, first: str) -> None:
    result = python(folder, ASK.format(first=first))
    assert result.stdout.split() == ["False", "True", "torch.optim.adamw"], result.stderr


def test_the_variable_lets_it_in(folder: Path) -> None:
    result = python(folder, "import megatron_moa, transformer_engine", MEGATRON_MOA_TE_ON_CPU="1")
    assert "FileNotFoundError: no shared object file" in result.stderr


def test_a_missing_package_stays_missing(tmp_path: Path) -> None:
    code = (
        "import megatron_moa, importlib.util, sys; "
        "print(importlib.util.find_spec('transformer_engine'), 'torch' in sys.modules)"
    )
    assert python(tmp_path, code).stdout.split() == ["None", "False"]
