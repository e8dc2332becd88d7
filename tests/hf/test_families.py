"""Tests megatron_moa/hf/families.py: transformers' own models become this project's and back.

They stay the same function.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from megatron_moa.errors import UserError
from megatron_moa.hf import families
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.families import FAMILIES, LLAMA3_ROPE, OWN, Family, family_of, stock_family
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM

SIZES = {"vocab_size": 101, "hidden_size": 40, "intermediate_size": 52, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 37, "initializer_range": 0.3}
GPT2_SIZES = {"vocab_size": 101, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 37, "initializer_range": 0.3}
EXPERTS = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, **LLAMA3_ROPE}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SIZES, "rms_norm_eps": 1e-3}),
    "llama, all biases, tied, llama3 rope": (
        "LlamaForCausalLM",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "mistral, odd heads, linear rope": (
        "MistralForCausalLM",
        {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10, "rope_parameters": LINEAR},
    ),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen2, tied, own head size": ("Qwen2ForCausalLM", {**SIZES, "tie_word_embeddings": True, "head_dim": 12}),
    "qwen3, tied": ("Qwen3ForCausalLM", {**SIZES, "head_dim": 12, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES),
    "gpt2, untied, exact gelu, own width": (
        "GPT2LMHeadModel",
        {**GPT2_SIZES, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 28},
    ),
    "mixtral": ("MixtralForCausalLM", {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12}),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2},
    ),
    "qwen2 moe, normalised, no biases": (
        "Qwen2MoeForCausalLM",
        {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 28, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3 moe": (
        "Qwen3MoeForCausalLM",
        {**SIZES, **EXPERTS, "head_dim": 12, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
}


def build(case: str) -> tuple[Family, Any]:
    """A random model of transformers' own in which no weight has a value that hides a mistake."""
    architecture, settings = CASES[case]
    family = family_of(architecture)
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(family.config_class(**settings)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms start at 1, biases at 0
            parameter.data += torch.randn_like(parameter) * 0.3
        assert parameter.std() > 0.05, name  # a router can start at 0
    return family, model


def converted(weights: dict[str, Tensor], source: Family, target: Family, own: GPTMoAConfig) -> dict[str, Tensor]:
    """One family's weights as another's, by way of Megatron's; every one is used once."""
    weights = dict(weights)
    megatron = {
        entry.megatron: entry.join(tuple(weights.pop(name) for name in entry.hf)) for entry in source.entries(own)
    }
    assert not weights
    return {
        name: tensor.contiguous()
        for entry in target.entries(own)
        for name, tensor in zip(entry.hf, entry.split(megatron.pop(entry.megatron)), strict=True)
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(101, (3, 37), generator=torch.Generator().manual_seed(2))
    return model(tokens).logits


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_models_become_ours_and_back(case: str, tmp_path: Path) -> None:
    family, model = build(case)
    model.save_pretrained(tmp_path / "theirs")
    config = family.config_class.from_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    own = family.to_own(config)
    assert {family.stored_name(name) for name in stored} == {name for entry in family.entries(own) for name in entry.hf}

    ours = GPTMoAForCausalLM(own).eval()
    weights = converted(stored, family, OWN, own)
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if own.tie_word_embeddings else [])
    assert not unexpected
    ours.tie_weights()
    expected = logits(model)
    assert_equal(logits(ours), expected)

    assert family.why_not(own) is None
    back = tmp_path / "back"
    again = converted(weights, OWN, family, own)
    assert again.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.items())
    family.from_own(own).save_pretrained(back)
    save_file(again, back / "model.safetensors", metadata={"format": "pt"})
    loaded, notes = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert type(loaded).__name__ == family.architecture
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(logits(loaded.eval()), expected)


# What decides which family.

LIKE_LLAMA = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
LIKE_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LIKE_GPT2 = {"gated": False, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}
LIKE_GPT2 |= {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "num_key_value_heads": 4}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 16, "shared_expert_gate": True}


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}, "LlamaForCausalLM"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}, "MistralForCausalLM"),
        ({"attention_bias": True}, "Qwen2ForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({**LIKE_GPT2, "hidden_act": "gelu"}, "GPT2LMHeadModel"),
        ({**LIKE_GPT2, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}, "GPT2LMHeadModel"),
        (ROUTED, "MixtralForCausalLM"),
        ({**ROUTED, "router_float32": True, "intermediate_size": 7}, "MixtralForCausalLM"),
        ({**ROUTED, **SHARED, "router_pre_softmax": True}, "Qwen2MoeForCausalLM"),
        ({**ROUTED, **SHARED, "attention_bias": True, "moe_layers": [False, True]}, "Qwen2MoeForCausalLM"),
        ({**ROUTED, "qk_norm": True}, "Qwen3MoeForCausalLM"),
    ],
)
def test_stock_models_find_their_family(settings: dict[str, Any], architecture: str) -> None:
    family, reason = stock_family(GPTMoAConfig(**{**LIKE_LLAMA, **settings}))
    assert (family and family.architecture) == architecture, reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mixing": {"mixing": "la", "form": "bi-sided", "activations": ["silu"]}}, "LlamaFor.*: its activations are"),
        ({"attention_bias": True, "qk_norm": True}, "plain Qwen2ForCausalLM would not do: qk_norm is True, there it"),
        ({"normalization": "LayerNorm"}, "plain LlamaForCausalLM would not do: normalization is LayerNorm"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_param"),
        (
            {**LIKE_GPT2, "hidden_act": "gelu", "num_key_value_heads": 2},
            "plain GPT2LMHeadModel would not do: num_key_value_heads is 2",
        ),
        ({**ROUTED, "shared_expert_intermediate_size": 16}, "plain .* would not do: shared_expert_"),
        ({**ROUTED, "router_score": "sigmoid"}, "plain MixtralForCausalLM would not do: router_score is sigmoid"),
    ],
)
def test_what_is_of_no_family_says_why(settings: dict[str, Any], reason: str) -> None:
    family, text = stock_family(GPTMoAConfig(**{**LIKE_LLAMA, **settings}))
    assert family is None
    assert re.search(reason, text), text


# What is refused.


def config_of(architecture: str, **settings: Any) -> PreTrainedConfig:
    family = family_of(architecture)
    sizes = GPT2_SIZES if architecture == "GPT2LMHeadModel" else SIZES
    return family.config_class(**{**sizes, **settings})


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act relu: supported here: silu"),
        ("LlamaForCausalLM", {"hidden_act": "nope"}, "hidden_act 'nope': transformers has no"),
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias True: biases of q, k, v and attention's output"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias True: biases of MLPs alone"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias True: biases of q, k, v and attention's"),
        ("LlamaForCausalLM", {"rope_parameters": DYNAMIC}, "rope_type dynamic: supported: default, linear, llama3"),
        ("LlamaForCausalLM", {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor 2.0: .* at 1"),
        ("LlamaForCausalLM", {"rope_parameters": {**LINEAR, "factor": 2.5}}, "factor 2.5: Megatron takes whole"),
        ("LlamaForCausalLM", {"rope_parameters": {**LINEAR, "rope_theta": 2.5}}, "rope_theta 2.5: Megatron takes"),
        ("LlamaForCausalLM", {"rope_parameters": {**LLAMA3, "factor": "8"}}, "factor 8: a number above 0 is wanted"),
        ("Qwen2ForCausalLM", {"rope_parameters": {**LINEAR, "mrope_section": [2, 2]}}, "mrope_section .*: is not supp"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: .* rotates whole heads"),
        ("LlamaForCausalLM", {"quantization_config": {"bits": 4}}, "quantization_config is there: quantised weights"),
        ("LlamaForCausalLM", {"mixed_feed_forward": [{}]}, "mixed_feed_forward is there: megatron_moa.load_replaced"),
        ("LlamaForCausalLM", {"logit_scale": 2.0}, "logit_scale 2.0: LlamaForCausalLM has no such key; take it out"),
        ("LlamaForCausalLM", {"is_encoder_decoder": True}, "is_encoder_decoder True: only False is supported"),
        ("MistralForCausalLM", {"sliding_window": 16}, "sliding_window 16: .*; max_position_embeddings 16 has no need"),
        ("MixtralForCausalLM", {"sliding_window": 16}, "sliding_window 16: attention over a window"),
        ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": 1}, "sliding_window 16: attention over a window"),
        ("Qwen3MoeForCausalLM", WINDOW, "sliding_window 16: attention over a window"),
        ("Qwen2MoeForCausalLM", {**WINDOW, "max_window_layers": 2}, "sliding_window 16: attention over a window"),
        (
            "Qwen2ForCausalLM",
            {"layer_types": ["full_attention"] * 2 + ["conv"]},
            "layer_types conv: only full_attention",
        ),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "layer_types sliding_attention: only full"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 1}, "num_experts_per_tok 1: Megatron does not normalise"),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok 1: Megatron"),
        ("Qwen2MoeForCausalLM", {"attention_bias": True}, "attention_bias True: Qwen2MoeForCausalLM has no such key"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step 0: at least 1 is wanted"),
        ("GPT2LMHeadModel", {"activation_function": "relu"}, "activation_function relu: supported here: gelu, gelu_py"),
        (
            "GPT2LMHeadModel",
            {"scale_attn_by_inverse_layer_idx": True},
            "inverse_layer_idx True: only False is supported",
        ),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, "scale_attn_weights False: only True is supported"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "add_cross_attention True: only False is supported"),
        ("GPTMoAForCausalLM", {"hidden_act": "gelu"}, "hidden_act gelu: supported here: silu"),
        ("GPTMoAForCausalLM", {"gated": False, "hidden_act": "gelu_pytorch_tanh"}, "hidden_act gelu_py.* with biases"),
        ("GPTMoAForCausalLM", {"attention_output_bias": True}, "biases of attention's output alone"),
    ],
)
def test_what_cannot_be_is_refused_by_key(architecture: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json, .*{message}"):
        family_of(architecture).to_own(config_of(architecture, **settings))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("MistralForCausalLM", {"sliding_window": 37}),  # as long as any text
        ("Qwen2ForCausalLM", {"sliding_window": 16}),  # not in use
        ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": 3}),  # in no layer
        ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500}),  # as it was written
        (
            "LlamaForCausalLM",
            {"torch_dtype": "bfloat16", "_attn_implementation_autoset": True, "attention_dropout": 0.1},
        ),
        ("GPT2LMHeadModel", {"n_ctx": 37, "task_specific_params": {"text-generation": {"max_length": 50}}}),
        ("Qwen3MoeForCausalLM", {"max_window_layers": 2, "head_dim": 12}),
    ],
)
def test_what_changes_nothing_is_accepted(architecture: str, settings: dict[str, Any]) -> None:
    own = family_of(architecture).to_own(config_of(architecture, **settings))
    if "rope_scaling" in settings:
        assert own.rope_parameters == {"rope_type": "linear", "rope_theta": 500, "factor": 2}
    if "head_dim" in settings:
        assert own.head_dim == 12


@pytest.mark.parametrize("family", [*FAMILIES, OWN], ids=lambda family: family.architecture)
def test_no_key_of_a_class_is_overlooked(family: Family) -> None:
    """A key that a later transformers adds has to be thought of."""
    known = {*family.keys, *family.translated, *family.only, *family.neutral, *families._WINDOW}
    aliases = family.config_class.attribute_map
    names = {setting.name for setting in dataclasses.fields(family.config_class)}
    assert {name for name in names if name not in known and aliases.get(name) not in known} == set()


def test_old_names_are_known() -> None:
    gpt2, llama = family_of("GPT2LMHeadModel"), family_of("LlamaForCausalLM")
    assert gpt2.stored_name("h.3.attn.c_attn.weight") == "transformer.h.3.attn.c_attn.weight"
    assert gpt2.stored_name("lm_head.weight") == "lm_head.weight"
    assert gpt2.stored_name("h.0.attn.bias") is gpt2.stored_name("transformer.h.11.attn.masked_bias") is None
    assert llama.stored_name("model.layers.2.self_attn.rotary_emb.inv_freq") is None
    for name in ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.bias", "attn.bias"):
        assert llama.stored_name(name) == name


def test_unknown_architecture() -> None:
    with pytest.raises(
        UserError, match=r"^config.json, architectures T5: is not supported; supported: LlamaForCausalLM, .*GPTMoAFor"
    ):
        family_of("T5")
