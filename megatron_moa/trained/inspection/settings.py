"""Reads a checkpoint's settings and its mixture, under today's names."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from megatron_moa.checkpoints.settings import upgrade_saved_settings
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import ARGS, MixtureConfig

MIXTURE = " ".join(ARGS.values())
SHAPE = """num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels swiglu normalization
    position_embedding_type max_position_embeddings add_bias_linear add_qkv_bias qk_layernorm
    untie_embeddings_and_output_weights padded_vocab_size num_experts moe_ffn_hidden_size moe_layer_freq moe_router_topk
    moe_shared_expert_intermediate_size params_dtype"""


def settings_of(checkpoint: CheckpointTensors) -> tuple[argparse.Namespace, str | None]:
    """Returns a checkpoint's settings under today's names, and why its mixture is not computed.

    The reason is None where this version computes the mixture. Settings that this version does not understand are as
    they were saved.
    """
    saved = checkpoint.args
    args = argparse.Namespace(**vars(saved))
    try:
        upgrade_saved_settings(args, checkpoint.folder)
    except UserError as error:
        return saved, str(error).removeprefix(f"{checkpoint.folder}: ")
    except (AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint's settings of its mixture cannot be read ({error})") from None
    return args, None


def mixture_of(args: argparse.Namespace) -> MixtureConfig | None:
    """Returns the mixture that a checkpoint's settings mean; None for stock layers.

    Raises:
        UserError: they mean none.
    """
    try:
        return MixtureConfig.from_args(args)
    except (AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint's settings of its mixture cannot be read ({error})") from None


def plain(value: Any) -> Any:
    """Returns a setting as JSON has it; what JSON has not becomes its repr."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")
