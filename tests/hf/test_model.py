"""megatron_moa/hf: the transformers model computes what Megatron's does, and does what transformers' models do."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, StaticCache, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.export import code_files
from megatron_moa.hf.mapping import entries, from_hf, to_hf
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM, MixtureCoefficients
from megatron_moa.mixture.start_scale import matching_scale
from tests.support import hf_models, launch
from tests.support.tiny_hf import KINDS, build, tokens_of
from tests.support.training import MOE, ROOT, SWIGLU, TINY

EAGER = ["--moa-backend", "eager"]
LA, STOCK = ["--moa-mixing", "la", *EAGER], ["--moa-mixing", "none"]
MOA = ["--moa-mixing", "moa", *EAGER, "--moa-gate-init-std", "0.3"]
SHARED = "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate".split()
SIGMOID = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 "
    "--moe-router-dtype fp32"
).split()
# Replace flags of the tiny model: the last one counts.
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
WITH_BIASES, TIED = "--disable-bias-linear", "--untie-embeddings-and-output-weights"

CASES: dict[str, list[str]] = {
    "stock": [*SWIGLU, *STOCK],
    "la one-sided": [*SWIGLU, *LA, *"--moa-form one-sided --moa-init 1 .5 .2 .1 .7 .3 .6".split()],
    "la bi-sided": [*SWIGLU, *LA, *"--moa-init 1 .5 .2 .1 .7 .3 .6 1 0 .1 .2 .3 .4 .5".split()],
    "la quadratic": [*SWIGLU, *LA, *"--moa-form quadratic --moa-init 1 .5 .2 .1 .7 .3 .6 1 0 .1".split()],
    "moa bi-sided": [*SWIGLU, *MOA],
    "moa one-sided, softmax, bias": [*SWIGLU, *MOA, *"--moa-form one-sided --moa-gate softmax --moa-gate-bias".split()],
    "moa quadratic, tanh, amplitude": [
        *SWIGLU,
        *MOA,
        *"--moa-form quadratic --moa-gate tanh --moa-amplitude learned".split(),
    ],
    "moa with SwiGLU's scale": [*SWIGLU, *MOA, "--moa-init-scale", "matched"],
    "la type1, GPT-2-like, biases, tied": [*GPT2, *LA],
    "stock, GPT-2-like, biases, tied": [*GPT2, *STOCK],
    "q/k norm, bias of q, k, v, partial rotation": [
        *SWIGLU,
        *MOA,
        *"--qk-layernorm --add-qkv-bias --rotary-percent 0.5".split(),
    ],
    "LLaMA 3's rope": [*SWIGLU, *MOA, *"--use-rope-scaling --rope-scaling-factor 4 --rotary-base 500000".split()],
    "MoE, moa one-sided, shared expert with gate": [*SWIGLU, *MOE, *SHARED, *MOA, "--moe-router-pre-softmax"],
    "MoE, la one-sided, every second layer": [*SWIGLU, *MOE, *LA, "--moe-layer-freq", "2"],
    "MoE, moa quadratic, sigmoid router with bias": [*SWIGLU, *MOE, *SIGMOID, *MOA, "--moa-form", "quadratic"],
    "MoE, stock": [*SWIGLU, *MOE, *SHARED, *STOCK],
}
QUICK = (
    "moa quadratic, tanh, amplitude",
    "la type1, GPT-2-like, biases, tied",
    "MoE, la one-sided, every second layer",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.full) for case in CASES]
)
def test_transformers_model_computes_megatrons_logits(case: str, tmp_path: Path) -> None:
    flags = [flag for flag in TINY if not ("biases, tied" in case and flag in (WITH_BIASES, TIED))]
    # Large initial weights, so that a wrong factor or order shows in the logits.
    flags += [*CASES[case], "--init-method-std", "0.3", "--train-iters", "2", "--save-interval", "2"]
    flags += ["--save", str(tmp_path / "checkpoint")]
    code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, tmp_path)
    assert code == 0, log[-1500:]
    results = tmp_path / "results.json"
    code, log = launch.launch(hf_models.compare, (str(tmp_path / "checkpoint"), str(results)), 1, tmp_path)
    assert code == 0, log[-1500:]
    report = json.loads(results.read_text())
    assert report["spread"] > 0.5
    assert report["difference"] < 1e-5
    assert report["round_trip"]


# What transformers' models do.


EQUAL = {"atol": 2e-5, "rtol": 1e-5}  # float32; logits of these models are of size 10


@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_attention_change_nothing(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    logits = model(tokens).logits
    assert logits.std() > 0.1
    for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
        half = model(tokens[:, :5], past_key_values=cache, use_cache=True)
        rest = model(tokens[:, 5:], past_key_values=half.past_key_values).logits
        torch.testing.assert_close(torch.cat((half.logits, rest), dim=1), logits, **EQUAL)
        # transformers before 5.24 and since: two names of one argument.
        again = model(tokens[:, :5], cache=StaticCache(config=model.config, max_cache_len=16), use_cache=True)
        rest = model(tokens[:, 5:], cache=again.past_key_values).logits
        torch.testing.assert_close(torch.cat((again.logits, rest), dim=1), logits, **EQUAL)
    with pytest.raises(TypeError, match="got cache_params: give a cache as cache or past_key_values"):
        model(tokens, cache_params=half.past_key_values)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, logits, **EQUAL)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:], **EQUAL)
    embedded = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, logits, **EQUAL)
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embedded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_and_packing_change_nothing(kind: str, implementation: str) -> None:
    model = build(kind)
    model.set_attn_implementation(implementation)
    tokens = tokens_of(model, 2, 9)
    logits = model(tokens).logits
    padding = torch.zeros(2, 3, dtype=torch.long)
    left, right = torch.cat((padding, tokens), dim=1), torch.cat((tokens, padding), dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(left, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[:, 3:], logits, **EQUAL)
    padded = model(right, attention_mask=mask.flip(-1)).logits
    torch.testing.assert_close(padded[:, :9], logits, **EQUAL)
    # Two sequences in one row, told apart by positions that start again.
    apart = torch.cat((model(tokens[:1, :5]).logits, model(tokens[:1, 5:]).logits), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(4)))[None]
    packed = model(tokens[:1], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, apart, **EQUAL)
    assert (apart - logits[:1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", [*KINDS, "la"])
def test_generates_the_same_in_every_way(kind: str) -> None:
    la = {"mixing": {"mixing": "la", "form": "bi-sided", "activations": ["silu", "relu2"]}}
    model = build("moa", **la) if kind == "la" else build(kind)
    tokens = tokens_of(model, 2, 7)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **settings)
    assert expected.shape == (2, 13)
    for way in ({"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(tokens, **settings, **way), expected), way
    # A batch of two lengths: generate takes positions from the mask.
    short = model.generate(tokens[:1, 3:], **settings)
    batch = tokens.clone()
    batch[0, :3] = 0
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    both = model.generate(batch, attention_mask=mask, **settings)
    assert torch.equal(both[0, 3:], short[0])
    assert torch.equal(both[1], expected[1])
    # Drafts by another model, here an equal one, or by the prompt; they are for one sequence.
    for way in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(tokens[:1], **settings, **way), expected[:1]), way
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer(), device="cpu")
    prompts = [" ".join(f"t{token}" for token in row) for row in (tokens[1].tolist(), tokens[0, 3:].tolist())]
    texts = generator(prompts, batch_size=2, max_new_tokens=6, do_sample=False, return_full_text=False)
    made = [[int(word[1:]) for word in text["generated_text"].split()] for (text,) in texts]
    assert made == [expected[1, 7:].tolist(), short[0, 4:].tolist()]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Reads and writes token 7 as the word t7."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{n}": n for n in range(101)}, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", padding_side="left")


@pytest.mark.parametrize("name", ["flash_attention_2", "vllm"])
def test_attention_functions_get_what_transformers_promises_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention needs a GPU; a function in its place is given the same arguments, and what it returns is used."""
    model = build("moa")
    tokens = tokens_of(model, 1, 9)
    states = model.model(tokens).last_hidden_state
    calls = []

    def attend(module, query, key, value, attention_mask, *, scaling, dropout=0.0, **kwargs):
        calls.append((module.layer_idx, query.shape, key.shape, value.shape, attention_mask, dropout, kwargs))
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
        output = output.transpose(1, 2)  # [b, s, heads, head size]
        return (output.flatten(0, 1).flatten(-2) if name == "vllm" else output), None  # vLLM: [tokens, width]

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, name, attend)
    model.config._attn_implementation = name
    instances = {0: "of layer 0", 1: "of layer 1"}
    result = model.model(tokens, attention_instances=instances, use_cache=False, return_dict=False)
    torch.testing.assert_close(result[0], states, **EQUAL)
    assert [call[0] for call in calls] == [0, 1]
    for _, query, key, value, mask, dropout, kwargs in calls:
        assert query == (1, 4, 9, 8)
        assert key == value == (1, 2, 9, 8)
        assert mask is None
        assert dropout == 0
        assert kwargs["attention_instances"] is instances
        assert kwargs["position_ids"].tolist() == [list(range(9))]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_layer(kind: str) -> None:
    model = build(kind)
    model.set_attn_implementation("eager")
    tokens = tokens_of(model, 2, 9)
    result = model(tokens, output_hidden_states=True, output_attentions=True)
    assert [states.shape for states in result.hidden_states] == [(2, 9, 32)] * 3
    torch.testing.assert_close(model.lm_head(result.hidden_states[-1]), result.logits)
    for weights in result.attentions:
        assert weights.shape == (2, 4, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_comes_back(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 5)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, notes = GPTMoAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_grows(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 5)
    logits = model(tokens).logits
    model.resize_token_embeddings(110)
    assert model.config.vocab_size == 110
    grown = model(torch.full_like(tokens, 109)).logits
    assert grown.shape == (2, 5, 110)
    torch.testing.assert_close(model(tokens).logits[..., :101], logits, **EQUAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_training_keeps_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("la, experts", **SCALED, router_score="sigmoid", router_bias=True)
    tokens = tokens_of(model, 2, 9)
    for name, buffer in model.named_buffers():
        if name.endswith("router_bias"):
            buffer.copy_(torch.tensor([1e-4, 2e-4, -1e-4, 0]))  # lost if they were added to 1 in half precision
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    half = GPTMoAForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kept = {name: tensor for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} == {"router_bias", "scale"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())
    assert half.lm_head.weight.dtype == dtype
    # Coefficients are computed in float32 from the half-precision parameters.
    coefficients, states = half.model.layers[0].mlp.coefficients, torch.randn(3, 32).to(dtype)
    gates = (states.float() @ coefficients.weight.float().T).sigmoid() * coefficients.scale
    torch.testing.assert_close(coefficients(states, coefficients.mixing), gates)
    with torch.no_grad():
        result = half(tokens).logits
    assert result.dtype == dtype
    assert (result.float() - logits).abs().mean() < 0.1 * logits.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_gates_and_router_alone(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    plain = model(tokens, labels=tokens)
    seen = []
    for module in model.modules():
        if type(module).__name__ in ("MixtureCoefficients", "GPTMoARouter"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(tokens, labels=tokens)
    result.loss.backward()
    assert abs(result.loss - plain.loss) < 0.02 * plain.loss
    floats = [tensor for output in seen for tensor in (output if isinstance(output, tuple) else (output,))]
    assert seen
    assert all(tensor.dtype == torch.float32 for tensor in floats if tensor.is_floating_point())


@pytest.mark.parametrize("kind", KINDS)
def test_trains_with_labels_and_gradient_checkpointing(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    plain = model(tokens, labels=tokens)
    logits = plain.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(plain.loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    # With gradient accumulation Trainer gives the number of tokens of all its steps.
    summed = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(64)).loss
    torch.testing.assert_close(summed, plain.loss * 16 / 64)
    plain.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    unused = {name for name, _ in model.named_parameters()} - set(gradients)
    assert not {name for name in unused if ".experts." not in name}  # an expert may have got no token
    model.zero_grad()
    model.train()
    model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


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


COMPILED = [
    pytest.param(kind, "compile", marks=[pytest.mark.slow, *([] if kind == "moa" else [pytest.mark.full])])
    for kind in KINDS
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


def with_flex_attention() -> None:
    """A target of launch: compared to the default."""
    model = build("moa")
    tokens = tokens_of(model, 2, 9)
    with torch.no_grad():  # it has no backward on a CPU
        logits = model(tokens).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(tokens).logits, logits, **EQUAL)


@pytest.mark.full
def test_flex_attention_computes_the_same(tmp_path: Path) -> None:
    # In a process of its own: what others have compiled before decides whether torch can compile this one.
    code, log = launch.launch(with_flex_attention, (), 1, tmp_path)
    assert code == 0, log[-2000:]


# Every kind of router and expert, and models with and without dense layers.
ROUTERS = {
    "sigmoid, bias, biases": {"router_score": "sigmoid", "router_bias": True, "mlp_bias": True},
    "softmax before, all layers": {
        "router_pre_softmax": True,
        "moe_layers": [True, True],
        "mixing": KINDS["moa"]["mixing"],
    },
}


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_experts_as_one_graph_compute_the_same(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("la, experts", **settings)
    for name, buffer in model.named_buffers():
        if name.endswith("router_bias"):
            buffer.copy_(torch.tensor([3.0, 0, -3, 1]))
    tokens = tokens_of(model, 2, 9)
    results = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_compiling: value)
        result = model(tokens, labels=tokens)
        parameters = dict(model.named_parameters())
        # An expert without tokens has no part in the loss, or one of 0.
        gradients = torch.autograd.grad(result.loss, parameters.values(), allow_unused=True, materialize_grads=True)
        results.append((result.logits, dict(zip(parameters, gradients, strict=True))))
    torch.testing.assert_close(results[1][0], results[0][0], **EQUAL)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_an_expert_that_overflows_for_others_tokens_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("la, experts")
    layer = model.model.layers[1].mlp
    x = torch.randn(1, 1, 32)
    chosen = layer.router(x[0], None)[2][0].tolist()
    expected = layer(x)
    spare = next(number for number in range(4) if number not in chosen)
    torch.nn.init.constant_(layer.experts[str(spare)].down_proj.weight, torch.inf)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(x), expected, **EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moa", "la, experts", pytest.param("GPT-2-like", marks=pytest.mark.full)])
def test_compiles_as_one_graph(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if kind == "la, experts" else "inductor")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits, **EQUAL)


@pytest.mark.parametrize("kind", ["moa", "la, experts", pytest.param("GPT-2-like", marks=pytest.mark.full)])
def test_exports_as_a_graph_for_any_length(kind: str) -> None:
    model = build(kind, **({"router_score": "sigmoid", "router_bias": True} if kind == "la, experts" else {}))
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    arguments = {"input_ids": tokens_of(model, 2, 9), "use_cache": False}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False).module()
    for count in (9, 23):
        tokens = tokens_of(model, 2, count)
        torch.testing.assert_close(program(input_ids=tokens, use_cache=False).logits, model(tokens).logits, **EQUAL)


# Experts.


def test_balance_of_experts() -> None:
    """k times the mean over layers of Megatron's: experts * sum of (share of choices / k) * (mean probability)."""
    model = build("la, experts", router_aux_loss_coef=0.5)
    tokens = tokens_of(model, 2, 9)
    plain = model(tokens, labels=tokens)
    assert plain.router_logits is None
    result = model(tokens, labels=tokens, output_router_logits=True)
    (logits,) = result.router_logits
    assert logits.shape == (18, 4)
    probabilities = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum(1).float()
    expected = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(result.aux_loss, expected)
    torch.testing.assert_close(result.loss, plain.loss + 0.5 * expected)
    # Padding does not count.
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    masked = model(tokens, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(masked, model(tokens[:, :6], output_router_logits=True).aux_loss)
    assert model(tokens, output_router_logits=True).loss is None
    # Sigmoid scores: their shares, as Megatron takes them.
    model = build("la, experts", router_score="sigmoid")
    tokens = tokens_of(model, 2, 9)
    scores = []
    router = model.model.layers[1].mlp.router
    router.register_forward_hook(lambda module, inputs, output: scores.append((inputs[0] @ module.weight.T).sigmoid()))
    result = model(tokens, output_router_logits=True)
    shares = scores[0] / scores[0].sum(-1, keepdim=True)
    torch.testing.assert_close(result.router_logits[0].softmax(-1), shares)


def test_a_biased_experts_output_is_scaled_with_its_bias() -> None:
    model = build("la, experts", mlp_bias=True)
    layer = model.model.layers[1].mlp
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 6, 32)
    _, probabilities, chosen = layer.router(x[0], None)
    expected = layer.shared_expert(x[0]) * (x[0] @ layer.shared_expert_gate.weight.T).sigmoid()
    for token in range(6):
        for probability, number in zip(probabilities[token], chosen[token], strict=True):
            expected[token] += probability * layer.experts[str(number.item())](x[0, token])
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-3, rtol=1e-4)


# The mixture.


@pytest.mark.parametrize("kind", ["la", "moa"])
@pytest.mark.parametrize("form", ["type1", "one-sided", "bi-sided", "quadratic"])
def test_feed_forward_layers_compute_the_papers_equations(form: str, kind: str) -> None:
    """Equations 3 to 10, written out in numpy: W1 is gate_proj (up_proj without a second branch), W2 is up_proj."""
    names = ["gelu", "silu", "tanh", "identity"]
    start = {"gate_init_std": 0.3} if kind == "moa" else {}
    model = build("moa", mixing={"mixing": kind, "form": form, "activations": names, **start}, gated=form != "type1")
    layer = model.model.layers[0].mlp.double()
    coefficients = layer.coefficients
    if kind == "la":
        torch.nn.init.normal_(coefficients.value)
    x = torch.randn(5, 32, dtype=torch.float64)

    def weight(module: torch.nn.Module) -> np.ndarray:
        return module.weight.detach().numpy()

    activations = [
        lambda v: v * scipy.stats.norm.cdf(v),
        lambda v: v / (1 + np.exp(-v)),
        np.tanh,
        lambda v: v,
    ]
    n = {"type1": 4, "one-sided": 4, "bi-sided": 8, "quadratic": 10}[form]
    if kind == "la":
        c = np.broadcast_to(coefficients.value.detach().float().numpy(), (5, n))  # as the model reads them
    else:
        assert coefficients.weight.shape == (n, 32)
        c = 1 / (1 + np.exp(-x.numpy() @ weight(coefficients).T))
    y = x.numpy() @ weight(layer.up_proj if form == "type1" else layer.gate_proj).T
    z = x.numpy() @ weight(layer.up_proj).T
    of_y, of_z = ([activation(branch) for activation in activations] for branch in (y, z))
    if form == "type1":
        mixed = sum(c[:, [k]] * of_y[k] for k in range(4))
    elif form == "one-sided":
        mixed = of_y[1] * sum(c[:, [k]] * of_z[k] for k in range(4))
    elif form == "bi-sided":
        mixed = sum(c[:, [k]] * of_y[k] for k in range(4)) * sum(c[:, [4 + k]] * of_z[k] for k in range(4))
    else:
        pairs = [(first, second) for first in range(4) for second in range(first, 4)]
        mixed = sum(c[:, [i]] * of_y[first] * of_z[second] for i, (first, second) in enumerate(pairs))
    expected = mixed @ weight(layer.down_proj).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


# The start.

SCALED = {"mixing": {**KINDS["moa"]["mixing"], "init_scale": "matched"}}


def test_starts_as_training_does() -> None:
    """Megatron's default initialisation, and the mixture's own settings (megatron_moa.layers.coefficients)."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 128}
    model = build("la, experts", **wide, initializer_range=0.05, num_hidden_layers=8, moe_layers=[False, True] * 4)
    weights = dict(model.named_parameters())
    for name, expected in {
        "model.embed_tokens.weight": 0.05,
        "model.layers.1.self_attn.q_proj.weight": 0.05,
        "model.layers.1.mlp.router.weight": 0.05,
        "model.layers.1.mlp.experts.2.up_proj.weight": 0.05,
        "model.layers.1.self_attn.o_proj.weight": 0.05 / 4,
        "model.layers.1.mlp.experts.2.down_proj.weight": 0.05 / 4,
        "model.layers.1.mlp.shared_expert.down_proj.weight": 0.05 / 4,
        "model.layers.0.mlp.down_proj.weight": 0.05 / 4,
    }.items():
        assert weights[name].std().item() == pytest.approx(expected, rel=0.15), name
    assert weights["model.layers.0.mlp.coefficients.value"].tolist() == [1.0] * 3
    mixing = {"mixing": "la", "form": "one-sided", "activations": ["silu", "relu"], "initial_coefficients": [1.0, 0.25]}
    model = build("moa", mixing=mixing)
    assert model.model.layers[1].mlp.coefficients.value.tolist() == [1.0, 0.25]
    config = GPTMoAConfig.from_dict(json.loads(model.config.to_json_string()))
    assert GPTMoAForCausalLM(config).model.layers[1].mlp.coefficients.value.tolist() == [1.0, 0.25]
    # Scaled to SwiGLU's output: gates of fixed amplitude by a constant, all others in their coefficients.
    for amplitude in ("fixed", "learned"):
        model = build("moa", mixing={**SCALED["mixing"], "amplitude": amplitude})
        coefficients = model.model.layers[0].mlp.coefficients
        scale = matching_scale(coefficients.mixing, 0.3, 32)
        assert 0.1 < scale < 0.99
        assert model.config.mixing_scale == (amplitude == "fixed")
        if amplitude == "fixed":
            assert coefficients.scale.item() == pytest.approx(scale)
            bare = MixtureCoefficients(model.config, coefficients.mixing)  # where initialization is left out
            assert torch.equal(bare.scale, coefficients.scale)
        else:
            torch.testing.assert_close(coefficients.amplitude, torch.full((6,), scale))
    # Gate vectors, whatever the other weights start from.
    for settings, std in (({}, 0.02), ({"gate_init_std": 0.7}, 0.7)):
        model = build("moa", mixing={"mixing": "moa", **settings})  # bi-sided: 14 gates
        assert model.model.layers[0].mlp.coefficients.weight.std().item() == pytest.approx(std, rel=0.15)


def test_experts_that_a_library_replaces_are_noticed() -> None:
    """vLLM puts SwiGLU experts in the place of an nn.ModuleList ``experts``, or of one whose parameters are all 3-D."""
    model = build("la, experts")
    tokens = tokens_of(model, 1, 5)
    layer = model.model.layers[1].mlp
    assert not isinstance(layer.experts, torch.nn.ModuleList)
    assert {parameter.dim() for parameter in layer.experts.parameters()} == {1, 2}
    logits = model(tokens).logits
    layer.experts["2"] = torch.nn.Sequential(layer.experts["2"])  # in a wrapper it is still ours
    with pytest.raises(TypeError, match="takes 2 positional arguments"):  # and is called
        model(tokens.expand(8, 5))
    layer.experts["2"] = layer.experts["2"][0]
    assert torch.equal(model(tokens).logits, logits)
    layer.experts["2"] = torch.nn.Identity()
    with pytest.raises(TypeError, match="experts: Identity has taken their place"):
        model(tokens)
    layer.experts = torch.nn.Linear(32, 32)
    with pytest.raises(TypeError, match="experts: Linear has taken their place"):
        model(tokens)


def test_a_table_that_does_not_fit_is_an_error_by_name() -> None:
    model = build("moa")
    weights = model.state_dict()
    table = list(entries(model.config))
    megatron = from_hf(weights.__getitem__, table, 128)
    state = {entry.megatron: megatron(entry.megatron) for entry in table}
    assert state["output_layer.weight"].shape == (128, 32)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_hf(state, model.config))
    for broken, name, message in (
        ({**state, "decoder.layers.0.mlp.odd": torch.ones(1)}, "decoder.layers.0.mlp.odd", "has not"),
        (
            {key: value for key, value in state.items() if "layers.1.mlp.coefficients" not in key},
            "layers.1.mlp.coeff",
            "not in",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            list(to_hf(broken, model.config))
        assert name in str(caught.value)
    assert torch.equal(state["output_layer.weight"][-1], weights["lm_head.weight"][-1])  # what pads repeats the last


@pytest.mark.parametrize("setting", [{"normalization": "BatchNorm"}, {"router_score": "best"}, {"moe_layers": [True]}])
def test_a_configuration_that_cannot_be_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTMoAConfig(num_hidden_layers=2, **setting)
