"""hf: the Python files of an export, alone and beside an installed megatron_moa."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_moa.hf.exported_code import code_files
from megatron_moa.mixture import config
from tests.support.tiny_hf import EQUAL, KINDS, build, tokens_of


@pytest.fixture
def exported_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package that can be imported: the Python files of an export."""
    (tmp_path / "alone").mkdir()
    for name, text in {"__init__.py": "", **code_files()}.items():
        (tmp_path / "alone" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "alone"
    for name in [name for name in sys.modules if name.partition(".")[0] == "alone"]:
        del sys.modules[name]


@pytest.fixture
def alone(exported_code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The modeling file of an export, imported as where megatron_moa is not installed."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "megatron_moa.mixture.config", None)
        return importlib.import_module(f"{exported_code}.modeling_gpt_moa")


@pytest.mark.parametrize(("version", "source"), [(2, "megatron_moa.mixture.functional"), (3, "alone.reference")])
def test_an_export_uses_a_megatron_moa_of_its_format_version(
    version: int, source: str, exported_code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_moa.mixture.config.FORMAT_VERSION", version)
    module = importlib.import_module(f"{exported_code}.modeling_gpt_moa")
    assert {module.mixed_activation.__module__, module.gate_coefficients.__module__} == {source}
    assert module.GPTMoAConfig().mixing_format_version == 2


@pytest.mark.parametrize("names", ["ACTIVATION_NAMES", "FORMS", "GATES"])
def test_an_export_uses_its_own_code_where_the_installed_one_lacks_a_name(
    names: str, exported_code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, names, getattr(config, names)[1:])
    module = importlib.import_module(f"{exported_code}.modeling_gpt_moa")
    assert {module.mixed_activation.__module__, module.gate_coefficients.__module__} == {"alone.reference"}


COMPILED = [
    pytest.param(kind, "compile", marks=[pytest.mark.slow, pytest.mark.full])
    for kind in KINDS  # test_graphs.py compiles their forward pass
]

BACKENDS = [(kind, backend) for kind in (*KINDS, "one-sided") for backend in ("eager", "triton")]


@pytest.mark.parametrize(("kind", "backend"), [*BACKENDS, *COMPILED])
def test_fused_kernels_compute_what_an_export_does_without_them(kind: str, backend: str, alone: ModuleType) -> None:
    assert alone.mixed_activation.__module__ == "alone.reference"
    changed = {"mixing": {**KINDS["moa"]["mixing"], "form": "one-sided"}} if kind == "one-sided" else {}
    fused = build("moa" if changed else kind, mixing_backend=backend, **changed)
    plain = alone.GPTMoAForCausalLM(alone.GPTMoAConfig(**fused.config.to_diff_dict()))
    plain.load_state_dict(fused.state_dict())
    tokens = tokens_of(fused, 1, 7)
    results = [model(tokens, labels=tokens) for model in (fused, plain)]
    torch.testing.assert_close(results[0].logits, results[1].logits, **EQUAL)
    for result in results:
        result.loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)
