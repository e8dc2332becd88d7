"""Tests megatron_moa/hf: the transformers model does what transformers' models do.

The model starts as training does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, StaticCache, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.mapping import entries, from_hf, to_hf
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM, MixtureCoefficients
from megatron_moa.mixture.start_scale import matching_scale
from tests.support.tiny_hf import EQUAL, KINDS, build, tokens_of

SCALED = {"mixing": {**KINDS["moa"]["mixing"], "init_scale": "matched"}}


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
    """Puts a function in the place of flash attention, which needs a GPU.

    The function is given the same arguments, and what it returns is used.
    """
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
    torch.testing.assert_close(coefficients(states, coefficients.mixture), gates)
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


def test_starts_as_training_does() -> None:
    """Compares initial values with Megatron's defaults and the mixture's own settings.

    The latter are those of megatron_moa.layers.coefficients.
    """
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
        scale = matching_scale(coefficients.mixture, 0.3, 32)
        assert 0.1 < scale < 0.99
        assert model.config.mixing_scale == (amplitude == "fixed")
        if amplitude == "fixed":
            assert coefficients.scale.item() == pytest.approx(scale)
            bare = MixtureCoefficients(model.config, coefficients.mixture)  # where initialization is left out
            assert torch.equal(bare.scale, coefficients.scale)
        else:
            torch.testing.assert_close(coefficients.amplitude, torch.full((6,), scale))
    # Gate vectors, whatever the other weights start from.
    for settings, std in (({}, 0.02), ({"gate_init_std": 0.7}, 0.7)):
        model = build("moa", mixing={"mixing": "moa", **settings})  # bi-sided: 14 gates
        assert model.model.layers[0].mlp.coefficients.weight.std().item() == pytest.approx(std, rel=0.15)


def test_a_mixing_without_its_kind_is_moa() -> None:
    names = [[entry.hf for entry in entries(build("moa", mixing=mixing).config)] for mixing in ({}, {"mixing": "moa"})]
    assert names[0] == names[1]


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


@pytest.mark.parametrize(
    "setting",
    [
        {"normalization": "BatchNorm"},
        {"router_score": "best"},
        {"moe_layers": [True]},
        {"moe_layers": [True, False]},  # num_experts is 0
        {"num_experts_per_tok": 5, "num_experts": 4},
        {"num_key_value_heads": 5},  # of 12
        {"hidden_act": "nope"},
    ],
)
def test_a_configuration_that_cannot_be_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTMoAConfig(num_hidden_layers=2, **setting)
