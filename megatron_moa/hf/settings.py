"""Turns the arguments that a model was trained with into its transformers configuration."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_moa.command_line.megatron_flags import as_typed, has_tanh_gelu, relevant, same
from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import POSITIONS, ROUTER_SCORES, GPTMoAConfig
from megatron_moa.hf.families import LLAMA3_ROPE, TANH_GELU
from megatron_moa.layers.layer_pattern import moe_layers
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training.parser import parser_defaults

# Settings that the configuration below is made of. Every other one that decides the function must be at the value that
# no flag sets (megatron_moa.command_line.megatron_flags.FUNCTION).
_READ = frozenset(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels group_query_attention num_query_groups
    max_position_embeddings normalization layernorm_epsilon position_embedding_type rotary_base rotary_percent
    use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor add_bias_linear add_qkv_bias qk_layernorm
    swiglu bias_gelu_fusion untie_embeddings_and_output_weights num_experts moe_layer_freq moe_ffn_hidden_size
    moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk moe_router_score_function
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_router_dtype
    use_rotary_position_embeddings fp32_residual_connection
    """.split()
)


def config_from_args(args: argparse.Namespace, mixture: MixtureConfig | None, vocab_size: int) -> GPTMoAConfig:
    """The configuration.

    Args:
        args: Megatron's, as a checkpoint holds them and
            :func:`megatron_moa.trained.from_megatron.load_model` gives them.
        mixture: the mixture, None for a fixed activation.
        vocab_size: the tokenizer's, without padding.

    Raises:
        UserError: a setting that the transformers model does not have.
    """
    defaults = parser_defaults()
    for name in relevant(args):
        value = getattr(args, name, defaults[name])
        if name not in _READ and not same(name, value, defaults[name]):
            raise UserError(
                f"{as_typed(name, value)}: the transformers model has no such thing; this checkpoint cannot be exported"
            )
    if args.position_embedding_type not in POSITIONS:
        raise UserError(
            f"--position-embedding-type {args.position_embedding_type}: the transformers model has "
            f"{', '.join(POSITIONS)}"
        )
    return GPTMoAConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        max_position_embeddings=args.max_position_embeddings,
        normalization=args.normalization,
        norm_eps=args.layernorm_epsilon,
        position_embedding_type=args.position_embedding_type,
        rope_parameters=_rope(args) if args.position_embedding_type == "rope" else None,
        attention_bias=args.add_bias_linear or args.add_qkv_bias,
        attention_output_bias=args.add_bias_linear,
        mlp_bias=args.add_bias_linear,
        qk_norm=args.qk_layernorm,
        gated=args.swiglu,
        hidden_act=_activation(args, mixture),
        mixing=None if mixture is None else mixture.to_json(),
        mixing_scale=mixture is not None and mixture.has_scale,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        initializer_range=args.init_method_std,
        **(_experts(args) if args.num_experts else {}),
    )


def router_aux_loss_coef(args: argparse.Namespace, own: GPTMoAConfig) -> float:
    """What transformers' models have in place of ``--moe-aux-loss-coeff``, of any kind of loss.

    Megatron adds up the layers' losses and divides each by the experts per token. Transformers takes the experts'
    shares over all layers together, which is the same where the layers' shares are the same.

    Args:
        args: as the checkpoint holds them.
        own: the model, some of whose layers are of experts.
    """
    kinds, factors = (
        value if isinstance(value, list) else [value]
        for value in (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff)
    )
    factor = sum(factor for kind, factor in zip(kinds, factors, strict=False) if kind.endswith("aux_loss"))
    return _shortened(factor * sum(own.moe_layers) / own.num_experts_per_tok)


def moe_aux_loss_coeff(own: GPTMoAConfig) -> float:
    """The inverse of :func:`router_aux_loss_coef`."""
    return _shortened(own.router_aux_loss_coef * own.num_experts_per_tok / sum(own.moe_layers))


def _shortened(number: float) -> float:
    """Without the last digits, in which a number there and back differs."""
    return float(f"{number:.12g}")


def _activation(args: argparse.Namespace, mixture: MixtureConfig | None) -> str:
    if args.swiglu:
        return "silu"
    return TANH_GELU if mixture is None and has_tanh_gelu(args) else "gelu"


def _rope(args: argparse.Namespace) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = args.rotary_percent
    if args.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": args.rope_scaling_factor, **LLAMA3_ROPE}
    elif args.rotary_seq_len_interpolation_factor is not None:
        rope |= {"rope_type": "linear", "factor": float(args.rotary_seq_len_interpolation_factor)}
    return rope


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    if args.moe_router_score_function not in ROUTER_SCORES:
        raise UserError(
            f"--moe-router-score-function {args.moe_router_score_function}: the transformers model has "
            f"{' and '.join(ROUTER_SCORES)}"
        )
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_layers": moe_layers(args),
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "shared_expert_gate": args.moe_shared_expert_gate,
        "router_score": args.moe_router_score_function,
        "router_pre_softmax": args.moe_router_pre_softmax,
        "router_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "router_bias": args.moe_router_enable_expert_bias,
        "router_float32": args.moe_router_dtype is not None,
    }
