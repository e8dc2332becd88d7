"""Builds Megatron layers and models in this process, for tests that look inside them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_moa.layer_specs import layer_spec, mtp_spec
from megatron_moa.mixture.config import MixtureConfig


def make_config(gated: bool = True, **settings: Any) -> TransformerConfig:
    """Builds a tiny config without Transformer Engine.

    Initial weights are larger, so that gates differ from token to token.
    """
    defaults = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "gated_linear_unit": gated,
        "activation_func": F.silu if gated else F.gelu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "init_method_std": 0.2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**defaults, **settings})


def moe_settings(**settings: Any) -> dict[str, Any]:
    """Further settings for make_config: four experts, two a token."""
    return {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 20,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        **settings,
    }


def build_feed_forward(config: TransformerConfig, mixture: MixtureConfig | None, layer: int = 0) -> torch.nn.Module:
    """What a layer's mlp slot builds: a dense layer or a MoE layer."""
    builder = layer_spec(config, mixture).layer_specs[layer].submodules.mlp
    groups = ProcessGroupCollection.use_mpu_process_groups()
    kwargs = {"config": config, "pg_collection": groups, "is_mtp_layer": False}
    if hasattr(builder.func, "__func__"):  # as_mlp_submodule, for a dense layer
        return builder(**kwargs, ffn_hidden_size=config.ffn_hidden_size)
    return builder(**kwargs, layer_number=layer + 1)


def build_model(config: TransformerConfig, mixture: MixtureConfig | None, **kwargs: Any) -> GPTModel:
    """A whole GPT model with a vocabulary of 32."""
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, mixture),
        mtp_block_spec=mtp_spec(config, mixture),
        vocab_size=32,
        max_sequence_length=16,
        position_embedding_type="rope",
        **kwargs,
    )


def logits_of(model: GPTModel) -> torch.Tensor:
    """[2, 8, vocabulary] for fixed tokens."""
    tokens = torch.arange(16).view(2, 8)
    return model(tokens, torch.arange(8).expand(2, 8), None)


randn64 = functools.partial(torch.randn, dtype=torch.float64)
