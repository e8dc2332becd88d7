"""Compares the settings a checkpoint was saved with to a run's, before anything of it is loaded.

Every checkpoint carries the args of the run that saved it, and in them the version of this project's format. Tensors of
equal shapes would load under another dictionary, order or gate without a word, so it is the settings that are compared.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megatron_moa.checkpoint_files import Checkpoint
from megatron_moa.config import (
    DEFAULT_GATE_INIT_STD,
    DEFAULT_INITIAL_COEFFICIENT,
    FORMAT_VERSION,
    refuse_changed_form,
)
from megatron_moa.errors import UserError

# Decide which coefficients there are and what they mean. --moa-init and --moa-gate-init-std only say where they start,
# --moa-freeze-gates only whether they are trained: these may change.
_MIXTURE = ("moa_form", "moa_activations")
_GATES = ("moa_gate", "moa_gate_bias", "moa_amplitude")

# Megatron's args that decide which parameters a model has, their shapes, or what a layer computes from them.
_ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "kv_channels",
    "multi_latent_attention",
    "swiglu",
    "normalization",
    "layernorm_zero_centered_gamma",
    "position_embedding_type",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "num_experts",
    "mtp_num_layers",
)
# Further ones, where the first setting is on.
_ARCHITECTURE_OF = {
    "group_query_attention": ("num_query_groups",),
    "multi_latent_attention": ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    "num_experts": ("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_shared_expert_intermediate_size"),
}
_STOCK_ACTIVATIONS = ("squared_relu", "quick_geglu")  # what a mixture replaces


def has_tanh_gelu(args: argparse.Namespace) -> bool:
    """Whether a stock model computes the tanh approximation of GELU: Megatron does where it fuses GELU with the
    addition of a bias (``megatron.core.fusions.fused_bias_gelu``), its default; elsewhere its GELU is the exact one.

    Args:
        args: of a model without mixture, validated or as a checkpoint has them.
    """
    return _has_gelu_and_bias(args) and getattr(args, "bias_gelu_fusion", False)


def _has_gelu_and_bias(args: argparse.Namespace) -> bool:
    others = ("swiglu", *_STOCK_ACTIVATIONS)
    return args.add_bias_linear and not any(getattr(args, name, False) for name in others)


def upgrade_saved_settings(saved: argparse.Namespace, checkpoint: Checkpoint | Path) -> None:
    """Brings the args in a checkpoint to this format version, in place; args without a version are of the first one.

    Args:
        checkpoint: where they are from, for the message.

    Raises:
        UserError: a format, or a form of it, that this version cannot read.
    """
    version = getattr(saved, "moa_format_version", 1)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{checkpoint}: was saved in format version {version}, this megatron_moa reads versions up to "
            f"{FORMAT_VERSION}; load it with a megatron_moa that knows version {version}"
        )
    if version == 1:
        _upgrade_version_1(saved, checkpoint)


def _upgrade_version_1(saved: argparse.Namespace, checkpoint: Checkpoint | Path) -> None:
    if getattr(saved, "moa_mixing", "none") == "none":
        for name in ("moa_la_init", "moa_init_scale"):  # None there; without them today's defaults hold
            vars(saved).pop(name, None)
        return
    refuse_changed_form(saved.moa_form, str(checkpoint))
    gates = saved.moa_mixing == "moa"
    fixed = gates and saved.moa_amplitude == "fixed"
    start = vars(saved).pop("moa_la_init", None)
    saved.moa_init = [DEFAULT_INITIAL_COEFFICIENT] if fixed or not start else start  # gates never started there
    saved.moa_gate_init_std = saved.init_method_std if gates else DEFAULT_GATE_INIT_STD
    saved.moa_init_scale = "matched" if getattr(saved, "moa_init_scale", "mixture") == "swiglu" else "paper"


def check_saved_settings(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError unless a run's settings mean the checkpoint's parameters.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    mixing, saved_mixing = args.moa_mixing, getattr(saved, "moa_mixing", "none")
    if saved_mixing == "none" and mixing != "none":
        raise UserError(
            f"{checkpoint}: has stock {_stock_activation(saved)} layers, which have no coefficients for --moa-mixing "
            f"{mixing}; convert it with tools/convert_mixing.py first (docs/upcycling.md), or take --moa-mixing none"
        )
    names = ["moa_mixing"]
    if mixing != "none":
        names += _MIXTURE
    if mixing == "moa":
        names += _GATES
        if args.moa_amplitude == "fixed":
            names.append("moa_init_scale")  # a factor kept beside the gates; elsewhere it is in the parameters
    if not getattr(args, "moe_use_upcycling", False):  # which makes a MoE of a dense checkpoint
        names += _ARCHITECTURE
        names += [name for key, more in _ARCHITECTURE_OF.items() if getattr(args, key) for name in more]
    if args.position_embedding_type == "learned_absolute":
        names.append("max_position_embeddings")
    if mixing == "none":
        names += _STOCK_ACTIVATIONS
        if _has_gelu_and_bias(args):
            names.append("bias_gelu_fusion")  # which GELU it is
    for name in names:
        # An arg that an older Megatron did not have cannot be compared.
        value, saved_value = getattr(args, name), getattr(saved, name, getattr(args, name))
        if (value or None) != (saved_value or None):  # None, 0 and False all mean "not there"
            remedy = "drop the flag" if args.use_checkpoint_args else "give that, or add --use-checkpoint-args"
            there = as_typed(name, saved_value)
            raise UserError(f"{as_typed(name, value)}: the checkpoint to load has {there} ({checkpoint}); {remedy}")


def loads_optimizer(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether the run goes on with the checkpoint's optimizer state, rather than with its weights alone."""
    fresh = args.finetune or args.no_load_optim or checkpoint.flag != "--load" or checkpoint.iteration is None
    return not fresh and not getattr(saved, "no_save_optim", False)


def check_vocabulary(
    args: argparse.Namespace, saved: argparse.Namespace, vocab_size: int, checkpoint: Checkpoint
) -> None:
    """Raises UserError if the checkpoint's embedding is not of a vocabulary of the tokenizer's size: Megatron lets
    padded vocabularies differ, and would cut the larger one off or leave rows of the smaller one as they start.

    Args:
        vocab_size: the run's tokenizer's, without padding.
    """
    padded = getattr(saved, "padded_vocab_size", None)
    if padded is None:
        return
    multiple = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    if padded not in (args.padded_vocab_size, multiple * math.ceil(vocab_size / multiple)):
        raise UserError(
            f"{checkpoint}: has an embedding of {padded} tokens (a vocabulary padded to a multiple of {multiple}), the "
            f"tokenizer has {vocab_size}; give the tokenizer it was trained with"
        )


def as_typed(name: str, value: object) -> str:
    """A setting as one would type it: ``--num-layers 4``, ``--swiglu``, ``no --swiglu``."""
    negative = {"add_bias_linear": "disable_bias_linear", "bias_gelu_fusion": "no_bias_gelu_fusion"}
    if name in negative:
        name, value = negative[name], not value
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    if value is None or value is False:
        return f"no {flag}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _stock_activation(saved: argparse.Namespace) -> str:
    names = {"swiglu": "SwiGLU", "squared_relu": "squared ReLU", "quick_geglu": "quick GEGLU"}
    return next((text for name, text in names.items() if getattr(saved, name, False)), "GELU")
