"""Runs transformers' own common tests of models on ours.

The environment variable TRANSFORMERS_TESTS names the folder ``tests`` of the sources of the installed transformers.
``make test-latest`` takes it from the source distribution, which lacks the subfolders: the tests of generation and of
exporters are there only in a git checkout, whose folder the variable may name as well. The project's own tests
generate in every way, and export, with the same transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.loading import register
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM, GPTMoAModel
from tests.support.tiny_hf import KINDS

_SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "MoA": KINDS["moa"],
    "LA": {"mixing": {"mixing": "la", "form": "bi-sided", "activations": ["silu", "relu2"]}},
    "Type1": KINDS["GPT-2-like"],
    "Experts": {**KINDS["la, experts"], "moe_layers": [True, True]},
    "SigmoidExperts": {
        **KINDS["la, experts"],
        "mixing": {**KINDS["moa"]["mixing"], "init_scale": "matched"},
        "router_score": "sigmoid",
        "router_bias": True,
        "qk_norm": True,
    },
}

# Tests that our models cannot pass: for which variants, and why. Each has to fail, so that a row shows when it is no
# longer needed.
EXCEPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "test_keep_in_fp32_modules_exist": (
        ("MoA", "LA", "Type1", "Experts"),
        "the class lists every buffer that stays float32, and only some settings have them",
    ),
    "test_bc_cache_name_forward": (
        tuple(VARIANTS),
        "a cache under its old name is taken without a warning, since exports serve older transformers as well",
    ),
    **dict.fromkeys(
        (
            "test_model_rope_scaling_from_config_0_linear",
            "test_model_rope_scaling_from_config_1_dynamic",
            "test_model_rope_scaling_from_config_2_yarn",
        ),
        (("Type1",), "learned positions end at max_position_embeddings, whatever scaling the test asks for"),
    ),
}


def _transformers_tests() -> ModuleType:
    """Transformers' common tests, as a package of another name than this project's tests have."""
    package = ModuleType("transformers_tests")
    package.__path__ = [os.environ["TRANSFORMERS_TESTS"]]
    sys.modules[package.__name__] = package
    for folder, module, mixin in (
        ("generation", "test_utils", "GenerationTesterMixin"),
        ("exporters", "test_export", "ExportTesterMixin"),
    ):
        if not (Path(os.environ["TRANSFORMERS_TESTS"]) / folder).is_dir():
            for name in (f"transformers_tests.{folder}", f"transformers_tests.{folder}.{module}"):
                sys.modules[name] = ModuleType(name)
            setattr(sys.modules[name], mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common")


class _ModelTester:
    """What the common tests ask for: a small model's settings and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def get_config(self) -> GPTMoAConfig:
        return GPTMoAConfig(**_SIZES, **self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[GPTMoAConfig, dict[str, torch.Tensor]]:
        tokens = torch.randint(3, _SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _failing(test: Callable[[unittest.TestCase], None]) -> Callable[[unittest.TestCase], None]:
    """A test that passes where ``test`` fails, whichever of its subtests does."""

    def run(self: unittest.TestCase) -> None:
        self.subTest = lambda *_, **__: contextlib.nullcontext()
        with pytest.raises((AssertionError, IndexError)):
            test(self)

    return run


_common = _transformers_tests()
register()
# By these names the common tests tell which classes have a loss.
modeling_auto.MODEL_MAPPING_NAMES["gpt_moa"] = "GPTMoAModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt_moa"] = "GPTMoAForCausalLM"


def _test_case(variant: str) -> type[unittest.TestCase]:
    """The common tests of a variant, with its exceptions expected to fail."""

    def set_up(self: Any) -> None:
        self.model_tester = _ModelTester(VARIANTS[variant])

    settings = {
        "all_model_classes": (GPTMoAModel, GPTMoAForCausalLM),
        "setUp": set_up,
        "test_all_params_have_gradient": not VARIANTS[variant].get("num_experts"),  # an expert may get no token
    }
    case = type(variant, (_common.ModelTesterMixin, _common.GenerationTesterMixin, unittest.TestCase), settings)
    for name, (variants, _) in EXCEPTIONS.items():
        if variant in variants:
            setattr(case, name, _failing(getattr(case, name)))
    return case


globals().update({f"Test{variant}": _test_case(variant) for variant in VARIANTS})
