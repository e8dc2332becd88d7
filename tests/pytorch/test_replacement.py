"""Tests how pytorch replaces layers in whole models.

These compute what they did, train, and come back from a folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import dynamic_module_utils

from megatron_moa import MixedFeedForward, MixtureConfig, load_replaced, replace_feed_forward
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import GATES, MIXINGS
from tests.support.plain_layers import mlp

pytestmark = pytest.mark.usefixtures("eager_default")

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 16, "patch_size": 8, "intermediate_size": 64}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)),
    "Gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER, head_dim=8)),
    "Phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER, pad_token_id=0)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "GPT-NeoX": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "Falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES, ffn_hidden_size=64)),
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**{**SIZES, **IMAGES})),
}
GATED = ("Llama", "Qwen2", "Gemma", "Phi3")


def built(name: str) -> nn.Module:
    """A tiny model of random weights, the same every time; biases are drawn, too."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    """A model's output for fixed tokens or images."""
    generator = torch.Generator().manual_seed(2)
    if "ViT" in type(model).__name__:
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
    return model(input_ids=torch.randint(0, 100, (2, 7), generator=generator)).logits


def mixtures_for(name: str) -> list[MixtureConfig | None]:
    """Every form that the model's layers can become, as LA and MoA, with every gate."""
    forms = {"Gemma": ("bi-sided", "quadratic")}.get(name, ("one-sided", "bi-sided", "quadratic"))
    forms = forms if name in GATED else ("type1",)
    kinds = [MixtureConfig(kind, form) for form in forms for kind in MIXINGS]
    return [None, *kinds, *(MixtureConfig(form=forms[0], gate=gate, gate_bias=True) for gate in GATES)]


@pytest.mark.parametrize("name", MODELS)
def test_replaced_models_compute_the_same(name: str) -> None:
    model = built(name)
    expected = logits(model)
    for mixture in mixtures_for(name):
        replaced = copy.deepcopy(model)
        old = replace_feed_forward(replaced, mixture)
        assert len(old) == 2
        for layer_name in old:
            new = replaced.get_submodule(layer_name)
            assert isinstance(new, MixedFeedForward)
            assert not new.training
        torch.testing.assert_close(logits(replaced), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT"])
def test_new_parameters_train_and_come_back(name: str, kind: str, tmp_path: Path) -> None:
    form = "bi-sided" if name in GATED else "type1"
    model = built(name)
    replace_feed_forward(model, MixtureConfig(kind, form))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(2):  # a gate whose amplitude is 0 moves from the second step on
        optimizer.zero_grad()
        logits(model.train()).square().mean().backward()
        optimizer.step()
    new = {key for key in before if ".coefficients." in key}
    assert len(new) == (2 if kind == "la" else 4)
    for key, value in model.state_dict().items():
        if key in new or ".fc1" in key or ".fc2" in key:
            assert not torch.equal(value, before[key]), key
    trained = logits(model.eval())

    again = built(name)
    replace_feed_forward(again, MixtureConfig(kind, form))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), trained)

    # As transformers saves it: config.json says which mixtures the weights are for.
    model.save_pretrained(tmp_path)
    again = load_replaced(tmp_path)
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6 * trained.abs().max().item())
    with pytest.raises(UserError, match="no feed-forward layer that is no mixture already"):
        replace_feed_forward(again)


def test_a_part_of_the_layers() -> None:
    def replaced(**match: Any) -> list[str]:
        return list(replace_feed_forward(built("Llama"), **match))

    both = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert replaced(match="mlp") == both
    assert replaced(match="*.1.mlp") == both[1:]
    assert replaced(match="layers.0.mlp") == both[:1]
    assert replaced(match=lambda name, module: name == both[1]) == both[1:]
    assert replaced(match=type(built("Llama").get_submodule(both[0]))) == both


def test_two_kinds_of_mixtures_in_one_model_come_back(tmp_path: Path) -> None:
    model = built("Llama")
    replace_feed_forward(model, MixtureConfig("la", "quadratic"), match="layers.0.mlp")
    replace_feed_forward(model, MixtureConfig("moa", "one-sided", gate="tanh"), match="layers.1.mlp")
    model.save_pretrained(tmp_path)
    again = load_replaced(tmp_path, dtype=torch.bfloat16)
    assert again.model.layers[0].mlp.coefficients.value.dtype == torch.bfloat16
    for layer in range(2):
        saved, found = (m.get_submodule(f"model.layers.{layer}.mlp").mixture for m in (model, again))
        assert found.to_json() == saved.to_json()
    assert again.state_dict().keys() == model.state_dict().keys()


def test_dropout_of_the_output_is_kept() -> None:
    model = built("GPT-2")  # whose configuration has 0.1
    replace_feed_forward(model)
    assert model.transformer.h[0].mlp.dropout.p == pytest.approx(0.1)


def test_layers_can_be_put_back() -> None:
    model = built("GPT-2")
    expected = logits(model)
    for name, layer in replace_feed_forward(model).items():
        model.set_submodule(name, layer)
    assert torch.equal(logits(model), expected)


def test_shared_layers_stay_shared() -> None:
    shared = mlp()
    model = nn.ModuleList([shared, shared, nn.ModuleList([shared])])
    assert list(replace_feed_forward(model, match="2.0")) == ["2.0"]
    assert model[0] is model[1] is model[2][0]
    assert isinstance(model[0], MixedFeedForward)


def test_weights_that_others_share_are_not_torn_apart() -> None:
    model = nn.ModuleList([mlp(), mlp(), nn.Linear(16, 32)])
    model[1][0].weight = model[0][0].weight
    with pytest.raises(UserError, match="1: shares a weight with 0, which would be lost; untie them first"):
        replace_feed_forward(model)
    model[1][0].weight = nn.Parameter(model[0][0].weight.clone())
    model[2].weight = model[1][0].weight
    with pytest.raises(UserError, match="2: shares a weight with 1"):
        replace_feed_forward(model)
    assert list(replace_feed_forward(model, match=lambda name, module: name == "0")) == ["0"]


def test_random_numbers_stay_where_they_were() -> None:
    model = built("Llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    replace_feed_forward(model)
    assert torch.equal(torch.rand(4), expected)


def test_one_module_that_is_something_else_names_the_remedy() -> None:
    model = nn.ModuleDict(
        {"mlp": mlp(), "bottleneck": nn.Sequential(nn.Linear(16, 4), nn.Hardswish(), nn.Linear(4, 16))}
    )
    with pytest.raises(UserError, match=r"bottleneck .* computes neither .*; match= names the layers that are meant"):
        replace_feed_forward(model)
    assert list(replace_feed_forward(model, match=["mlp"])) == ["mlp"]
    with pytest.raises(UserError, match=r"is a feed-forward layer itself; take MixedFeedForward.from_mlp"):
        replace_feed_forward(mlp())


# Mixtures that have no start with the layer's function, and matches that match nothing.
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "two branches": ("Llama", {"mixture": MixtureConfig(form="type1")}, 'form="type1" has not; take form="bi-sided"'),
    "one branch": ("GPT-2", {"mixture": MixtureConfig()}, 'form="bi-sided" has not; take form="type1"'),
    "GeGLU": ("Gemma", {"mixture": MixtureConfig(form="one-sided")}, "gelu_tanh on its first branch"),
    "a dictionary without identity": (
        "Llama",
        {"mixture": MixtureConfig(activations=("silu", "relu"))},
        "no linear.identity; name silu and identity among the activations",
    ),
    "a pair in the wrong order": (
        "Llama",
        {"mixture": MixtureConfig(form="quadratic", activations=("identity", "silu"))},
        "name silu and identity among the activations, in this order",
    ),
    "attention": ("Llama", {"match": "self_attn"}, "self_attn .*: is no feed-forward layer .* q_proj"),
    "one of two finds nothing": (
        "Llama",
        {"match": ["mlp", "ffn"]},
        'no layer matches match="ffn"; feed-forward layers',
    ),
    "an empty list": ("Llama", {"match": []}, r"match=\[\]: give a name, a class, a function"),
    "a number": ("Llama", {"match": 1}, "match=1: give a name, a class, a function of name and module, or several"),
    "a mixture by its name": ("Llama", {"mixture": "moa"}, "mixture='moa': give a MixtureConfig, or None"),
    "a mixture as a dictionary": ("Llama", {"mixture": {}}, "mixture={}: give a MixtureConfig, or None"),
    "nothing": ("Llama", {"match": "ffn"}, 'no layer matches match="ffn"; feed-forward layers by their shapes: model.'),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_the_model_stays(case: str) -> None:
    name, arguments, said = MISTAKES[case]
    model = built(name)
    before, config = dict(model.named_modules()), model.config.to_dict()
    with pytest.raises(UserError, match=said) as refusal:
        replace_feed_forward(model, **arguments)
    assert "\n" not in str(refusal.value)
    assert dict(model.named_modules()) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: replace_feed_forward("model"), "^model='model': give a torch.nn.Module$"),
        (lambda: MixedFeedForward.from_mlp(None), "^module=None: give a torch.nn.Module$"),
        (
            lambda: MixedFeedForward.from_mlp(nn.Linear(2, 2), up=["fc"]),
            r"^up=\['fc'\]: give the name of a linear layer$",
        ),
        (lambda: load_replaced(None), "^folder=None: give a folder, or a name on the Hugging Face Hub$"),
        (lambda: load_replaced(".", config={}), "^config={}: give a config of transformers, or None$"),
    ],
)
def test_arguments_of_another_type_are_one_line(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call()


def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("config.py", "custom_generate/generate.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('it has run')\n")
    model = built("Llama")
    replace_feed_forward(model)
    model.config.auto_map = {"AutoConfig": "config.Config"}
    model.save_pretrained(tmp_path)
    for settings in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        load_replaced(tmp_path, backend="eager", **settings)  # a class of transformers
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"another"'))
    for settings in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        with pytest.raises(UserError, match="its config is code of its own; give trust_remote_code=True if"):
            load_replaced(tmp_path, **settings)
    with pytest.raises(SystemExit, match="it has run"):
        load_replaced(tmp_path, trust_remote_code=True)


def test_frozen_coefficients_and_parts_of_models_come_back(tmp_path: Path) -> None:
    model = built("Llama")
    replace_feed_forward(model.model, MixtureConfig(freeze=True, recompute=True))  # names of the part, one config
    expected = logits(model)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "part")
    again = load_replaced(tmp_path / "whole", backend="eager")
    assert torch.equal(logits(again.eval()), expected)
    mixture = again.model.layers[0].mlp.mixture
    assert (mixture.freeze, mixture.recompute, mixture.backend) == (True, True, "eager")
    assert not again.model.layers[0].mlp.coefficients.amplitude.requires_grad
    part = load_replaced(tmp_path / "part", backend="eager")
    assert torch.equal(part.layers[1].mlp.fc1.weight, model.model.layers[1].mlp.fc1.weight)


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    model = built("Llama")
    replace_feed_forward(model)
    kept = {key: value for key, value in model.state_dict().items() if not key.endswith("1.mlp.fc2.weight")}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.fc2.weight is not there"):
        load_replaced(tmp_path)
    del model.config.mixed_feed_forward[0]["dropout"]
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not what replace_feed_forward writes: KeyError: 'dropout'"):
        load_replaced(tmp_path)
    for noted in (True, {"layers": []}, ["a"]):
        model.config.mixed_feed_forward = noted
        model.save_pretrained(tmp_path)
        with pytest.raises(UserError, match="is not what replace_feed_forward writes: "):
            load_replaced(tmp_path)
    for model_class in (transformers.AutoModelForCausalLM, "LlamaForCausalLM"):
        with pytest.raises(UserError, match=r"model_class=.*: is no model's class; give one such as"):
            load_replaced(tmp_path, model_class)
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=rf"{folder}: no model that can be read, name a folder") as refusal:
            load_replaced(folder)
        assert "\n" not in str(refusal.value)


def test_a_note_follows_its_layers(tmp_path: Path) -> None:
    model = built("Llama")
    for name, layer in replace_feed_forward(model).items():
        model.set_submodule(name, layer)
    replace_feed_forward(model, MixtureConfig("la"), match="layers.1.mlp")
    noted = {tuple(entry["layers"]): entry["mixture"]["mixing"] for entry in model.config.mixed_feed_forward}
    assert noted == {("model.layers.0.mlp",): "moa", ("model.layers.1.mlp",): "la"}
    model.save_pretrained(tmp_path)  # layer 0 is the old one, whatever the note says
    with pytest.raises(UserError, match=r"model.layers.0.mlp.coefficients.amplitude is not there"):
        load_replaced(tmp_path)


def test_a_folder_without_replaced_layers_is_refused(tmp_path: Path) -> None:
    built("Llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="notes no mixed_feed_forward"):
        load_replaced(tmp_path)


def test_models_without_such_layers_are_refused() -> None:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=4)
    with pytest.raises(UserError, match=r"no feed-forward layer; .* experts in one tensor"):
        replace_feed_forward(transformers.MixtralForCausalLM(config))
    config = transformers.BertConfig(**SIZES, intermediate_size=64)
    with pytest.raises(UserError, match=r"no feed-forward layer; .* spread over several modules"):
        replace_feed_forward(transformers.BertModel(config))
