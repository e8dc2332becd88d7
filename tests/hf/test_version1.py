"""Tests exports of format version 1, made by megatron_moa 0.1.

What still computes the same is read, the rest refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_moa
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM, mixture_config
from megatron_moa.mixture.config import FORMAT_VERSION
from tests.hf.test_convert_from_hf import tensors
from tests.support import launch
from tests.support.training import ROOT
from tools import convert_from_hf, evaluate_text, generate

DATA = ROOT / "tests" / "support" / "version1"
CHECKPOINT, READ = "bi-sided-moa", "export-bi-sided-moa"  # of the same model
REFUSED = {"export-one-sided-moa": "it mixed W1's branch", "export-quadratic-la": "K² coefficients"}
VERSION_1_DICTIONARY = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")


def test_bi_sided_computes_what_it_did() -> None:
    record = json.loads((DATA / CHECKPOINT / "logits.json").read_text())
    tokens, logits = record["tokens"], torch.tensor(record["logits"])
    model = megatron_moa.from_checkpoint(DATA / READ)
    assert model.mixture.activations == VERSION_1_DICTIONARY
    torch.testing.assert_close(model.logits(tokens), logits, atol=1e-5, rtol=1e-5)


def converted(source: str, out: str) -> None:
    """A target of launch: the tool, which compares logits with transformers'."""
    convert_from_hf.main(["--hf", source, "--out", out])


def test_bi_sided_becomes_a_checkpoint_to_the_last_bit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, log = launch.launch(converted, (str(DATA / READ), str(out)), 1, tmp_path)
    assert code == 0, log[-3000:]
    args = CheckpointTensors(out / "release").args
    found, expected = (tensors(folder, 63) for folder in (out / "release", DATA / CHECKPOINT / "iter_0000003"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert (args.moa_form, args.moa_format_version) == ("bi-sided", FORMAT_VERSION)
    assert tuple(args.moa_activations) == VERSION_1_DICTIONARY
    assert args.moa_gate_init_std == args.init_method_std  # where version 1 started gates from


@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_changed_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(DATA / name), tmp_path / "out"
    for use in (megatron_moa.from_checkpoint, GPTMoAForCausalLM.from_pretrained, GPTMoAConfig.from_pretrained):
        with pytest.raises(UserError, match=f"its .* form is of format version 1, in which .*{REFUSED[name]}"):
            use(folder)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for program, *flags in (
        (convert_from_hf, "--hf", folder, "--out", str(out)),
        (convert_from_hf, "--hf", folder, "--out", str(out), "--mixing", "moa"),
        (generate, "--load", folder, "--prompt", "def "),
        (evaluate_text, "--load", folder, "--text", str(text)),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            program.main(flags)
        assert caught.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        (line,) = (line for line in said if line != f"> loading {folder}")
        assert f"{folder}: config.json, mixing: its " in line
        assert REFUSED[name] in line
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_imports_of_version_1s_code_fail_here() -> None:
    """Checks that the imports of version 1's code fail with the installed megatron_moa.

    Such code takes the mixture from an installed megatron_moa, and from its own folder where this fails.
    """
    imports = [
        "from megatron_moa.mixture.config import MixtureConfig",
        "from megatron_moa.mixture.functional import gate_coefficients, mixed_activation",
        "from megatron_moa.mixture.start_scale import start_scale",
    ]
    with pytest.raises(ImportError, match="start_scale"):
        exec("\n".join(imports), {})


# Settings.


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"mixing": "la", "form": "bi-sided", "activations": ["silu", "tanh"]},
            {"initial_coefficients": [0.5], "init_scale": "paper"},
        ),
        (
            {"form": "type1", "init_scale": "mixture"},
            {"activations": list(VERSION_1_DICTIONARY[1:]), "gate_init_std": 0.3, "init_scale": "paper"},
        ),
        (
            {"mixing": "moa", "activations": ["silu"], "init_scale": "swiglu", "initial_coefficients": [0.5]},
            {"gate_init_std": 0.3, "init_scale": "matched"},
        ),
        (
            {"amplitude": "learned", "initial_coefficients": [2.0], "init_scale": "swiglu"},
            {
                "activations": list(VERSION_1_DICTIONARY),
                "gate_init_std": 0.3,
                "initial_coefficients": [2.0],
                "init_scale": "matched",
            },
        ),
        (None, None),
    ],
)
def test_settings_of_version_1_are_understood(old: dict[str, Any] | None, new: dict[str, Any] | None) -> None:
    file = {"mixing": old, "initializer_range": 0.3, "gated": (old or {}).get("form") != "type1", "mixing_scale": False}
    for version in ({}, {"mixing_format_version": 1}):
        config = GPTMoAConfig.from_dict({**file, **version})
        kept = {name: value for name, value in (old or {}).items() if name != "initial_coefficients"}
        assert config.mixing == (None if old is None else kept | new)
        assert config.mixing_format_version == FORMAT_VERSION
        # The one case whose gates have a constant factor: fixed amplitude, of SwiGLU's scale.
        assert config.mixing_scale == (old is not None and old.get("activations") == ["silu"])
        mixture_config(config)  # they are all valid today
    assert file["mixing"] == old


@pytest.mark.parametrize("form", ["one-sided", "quadratic"])
def test_todays_forms_come_back_from_a_file(form: str, tmp_path: Path) -> None:
    config = GPTMoAConfig(mixing={"mixing": "la", "form": form, "activations": ["silu", "identity"]})
    assert config.mixing_format_version == FORMAT_VERSION
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    assert settings["mixing_format_version"] == FORMAT_VERSION
    for read in (GPTMoAConfig.from_pretrained(tmp_path), GPTMoAConfig.from_json_file(file)):
        assert read.mixing == config.mixing
    del settings["mixing_format_version"]
    file.write_text(json.dumps(settings))
    for read in (GPTMoAConfig.from_pretrained, lambda folder: GPTMoAConfig.from_json_file(folder / "config.json")):
        with pytest.raises(UserError, match=rf"^config.json, mixing: its {form} form is of format version 1"):
            read(tmp_path)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_versions_that_are_not_known_are_refused(version: int) -> None:
    with pytest.raises(ValueError, match=f"mixing_format_version {version}: this code reads versions up to"):
        GPTMoAConfig.from_dict({"mixing_format_version": version})
