"""pytorch: trained layers are recognised by what they compute, taken over exactly, and replaced in whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from megatron_moa import MixedFeedForward, MixtureConfig, load_replaced, replace_feed_forward
from megatron_moa.errors import UserError
from megatron_moa.mixture import functional
from megatron_moa.mixture.config import ACTIVATION_NAMES, GATES, MIXINGS
from megatron_moa.mixture.reference import DEFINITIONS
from megatron_moa.pytorch.recognition import recognise

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


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend is the eager one: which it is says nothing about what is replaced, and takes its time."""
    resolve = functional.resolve_backend
    monkeypatch.setattr(
        functional,
        "resolve_backend",
        lambda backend, device: resolve("eager" if backend == "auto" else backend, device),
    )


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
    if "pixel_values" in model.forward.__code__.co_varnames or "ViT" in type(model).__name__:
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


def test_a_layer_that_is_partly_frozen_stays_so() -> None:
    layer = mlp()
    layer[2].requires_grad_(False)
    new = MixedFeedForward.from_mlp(layer)
    assert new.fc1.weight.requires_grad
    assert new.fc1.bias.requires_grad
    assert not new.fc2.weight.requires_grad
    assert not new.fc2.bias.requires_grad


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


# Layers alone.


class Gated(nn.Module):
    """A gated layer with names of its own."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu, bias: bool = False, width: int = 24) -> None:
        super().__init__()
        # In an order in which neither is first.
        self.out = nn.Linear(width, 16, bias=bias)
        self.b = nn.Linear(16, width, bias=bias)
        self.a = nn.Linear(16, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.a(x)) * self.b(x))


class Fused(nn.Module):
    """A gated layer whose first matrix holds both branches, the linear one first."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.both = nn.Linear(16, 48)
        self.out = nn.Linear(24, 16)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(first) * second if self.gate_first else first * F.silu(second))


def mlp(activation: nn.Module | None = None, bias: bool = True, width: int = 32) -> nn.Sequential:
    """A plain MLP of three modules."""
    return nn.Sequential(nn.Linear(16, width, bias), activation or nn.GELU(), nn.Linear(width, 16, bias))


def assert_same(layer: nn.Module, new: MixedFeedForward) -> None:
    x = torch.randn(3, 5, 16)
    expected = layer.eval()(x)
    torch.testing.assert_close(new.eval()(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


class Activation(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.forward = DEFINITIONS[name]


@pytest.mark.parametrize("name", [name for name in ACTIVATION_NAMES if name != "one"])
def test_every_activation_is_recognised(name: str) -> None:
    torch.manual_seed(3)
    plain, gated = mlp(Activation(name)), Gated(DEFINITIONS[name])
    assert recognise(plain).activation == name
    found = recognise(gated, names={"gate": "a"})
    assert (found.activation, found.reading.gated) == (name, True)
    names = tuple(dict.fromkeys((name, "identity")))
    assert_same(plain, MixedFeedForward.from_mlp(plain, MixtureConfig(form="type1", activations=(name, "one"))))
    for form in ("bi-sided", "quadratic"):
        mixture = MixtureConfig(form=form, activations=names)
        assert_same(gated, MixedFeedForward.from_swiglu(gated, mixture))


@pytest.mark.parametrize("width", [24, 16, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_roles_are_found_by_what_is_computed(width: int, bias: bool) -> None:
    torch.manual_seed(4)
    for layer in (Gated(bias=bias, width=width), Fused(True), Fused(False)):
        assert_same(layer, MixedFeedForward.from_swiglu(layer))
    for layer in (mlp(bias=bias, width=width), mlp(nn.ReLU(), width=width)):
        assert_same(layer, MixedFeedForward.from_mlp(layer))


def test_names_choose_the_roles() -> None:
    layer = Gated()
    assert_same(layer, MixedFeedForward.from_swiglu(layer, gate="a", up="b", down="out"))
    with pytest.raises(UserError, match=r"computes neither .* the nearest, \w+, is off by"):
        MixedFeedForward.from_swiglu(layer, gate="b")
    with pytest.raises(UserError, match=r'gate="c" is no linear layer of it; linear layers .*: out .*, b .*, a '):
        MixedFeedForward.from_swiglu(layer, gate="c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_gradients_and_mode_are_the_layers(dtype: torch.dtype) -> None:
    layer = Gated().to(dtype).requires_grad_(False).train()
    new = MixedFeedForward.from_swiglu(layer)
    assert all(parameter.dtype == dtype for parameter in new.parameters())
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        "coefficients.weight",
        "coefficients.amplitude",
    }
    assert new.training
    assert torch.equal(new.fc1.weight, torch.cat((layer.a.weight, layer.b.weight)))
    assert torch.equal(new.fc2.weight, layer.out.weight)
    assert new.fc2.weight.data_ptr() != layer.out.weight.data_ptr()


def test_rounded_products_around_it_do_not_matter() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            new = MixedFeedForward.from_swiglu(layer := Gated())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(layer, new)


def test_dropout_of_the_output_is_kept() -> None:
    layer = nn.Sequential(*mlp(), nn.Dropout(0.3))
    new = MixedFeedForward.from_mlp(layer)
    assert new.dropout.p == pytest.approx(0.3)
    assert_same(layer, new)
    replaced = built("GPT-2")  # whose configuration has 0.1
    replace_feed_forward(replaced)
    assert replaced.transformer.h[0].mlp.dropout.p == pytest.approx(0.1)


class Odd(nn.Module):
    """A layer that is nearly a feed-forward layer."""

    def __init__(self, forward: Callable[[Odd, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        for name, child in children.items():
            self.add_module(name, child)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _keeping() -> nn.Module:
    layer = Odd(lambda m, x: m.down(F.gelu(m.up(x))))
    layer.last = layer.up(torch.randn(2, 16))
    return layer


# What is no feed-forward layer of the dictionary, or would lose something, with what is said of it.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quick GELU": (
        lambda: Odd(lambda m, x: m.down(m.up(x) * torch.sigmoid(1.702 * m.up(x)))),
        "computes neither .* the nearest, gelu, is off by",
    ),
    "a factor": (lambda: Odd(lambda m, x: 0.9 * m.down(F.gelu(m.up(x)))), "computes neither"),
    "a residual": (lambda: Odd(lambda m, x: x + m.down(F.gelu(m.up(x)))), "computes neither"),
    "a tuple": (lambda: Odd(lambda m, x: (m.down(F.gelu(m.up(x))), None)), "gives tuple"),
    "dropout inside": (
        lambda: Odd(lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.1, m.training))),
        "in training than in evaluation",
    ),
    "a norm": (lambda: Odd(lambda m, x: m.down(m.norm(m.up(x))), norm=nn.LayerNorm(32)), "no MLP .* other parameters"),
    "no linear layers": (lambda: nn.LayerNorm(16), "no MLP .* none, or other parameters"),
    "one linear layer": (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU()), r"no MLP .* 0 \[16, 16\]"),
    "not back to h": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), "no MLP"),
    "widths that differ": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(24, 16)), "no MLP"),
    "an error": (lambda: Odd(lambda m, x: 1 / 0), "ZeroDivisionError: division by zero"),
    "weights of 0": (lambda: nn.Sequential(*mlp()).apply(_zero), "computes neither"),
    "the meta device": (lambda: mlp().to("meta"), "meta device"),
    "a clipped activation": (lambda: mlp(nn.ReLU6()), r"nearest, \w+, is off by"),
    "an activation clipped far out": (lambda: Odd(lambda m, x: m.down(m.up(x).clamp(-40, 40))), "nearest, identity"),
    "dropout of whole texts": (lambda: Odd(lambda m, x: _drop_texts(m.down(F.gelu(m.up(x))), m)), "in training than"),
    "dropout of whole tokens": (lambda: nn.Sequential(*mlp(), nn.Dropout1d(0.3)), "in training than"),
    "dropout of everything": (lambda: nn.Sequential(*mlp(), nn.Dropout(1.0)), "in training than"),
    "two dtypes": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16).half()), "one dtype"),
    "one weight twice": (lambda: _tied(mlp(width=16)), "share their weight"),
    "hooks": (lambda: _hooked(mlp()), "has hooks"),
    "hooks inside": (
        lambda: nn.Sequential(_hooked(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16)),
        "its 0 has hooks",
    ),
    "parametrizations": (
        lambda: nn.Sequential(weight_norm(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16)),
        "its 0 is parametrized",
    ),
    "a layer that keeps what it computed": (_keeping, "cannot be copied"),
}


def _drop_texts(x: Tensor, module: nn.Module) -> Tensor:
    if not module.training:
        return x
    return x * (torch.rand(x.shape[0], 1, 1) > 0.1) / 0.9


def _tied(layer: nn.Sequential) -> nn.Sequential:
    layer[2].weight = layer[0].weight
    return layer


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def _zero(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_feed_forward_layer_is_refused_and_the_model_stays(case: str) -> None:
    make, said = REFUSED[case]
    layer = make()
    with pytest.raises(UserError, match=said) as refusal:
        MixedFeedForward.from_mlp(layer)
    assert "\n" not in str(refusal.value)
    model = nn.ModuleDict({"good": mlp(), "odd": layer})
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=r"^odd "):
        replace_feed_forward(model, match=lambda name, module: name in ("good", "odd"))
    assert dict(model.named_modules()) == before


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
    with pytest.raises(UserError, match="model_class AutoModelForCausalLM: is no model"):
        load_replaced(tmp_path, transformers.AutoModelForCausalLM)


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
