"""Builds one feed-forward layer of Megatron's, stock or mixed, to be timed.

The layer's config, processes and groups are made here, too.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from megatron_moa.mixture.config import MixtureConfig


def layer_config(options: argparse.Namespace, settings: dict[str, Any], dtype: torch.dtype, tp: int) -> Any:
    """Megatron's config of one layer, without Transformer Engine and Apex on any machine."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_moa.training.megatron_checks import megatron_checks

    moe = {}
    if options.experts:
        moe = {
            "num_moe_experts": options.experts,
            "moe_router_topk": options.topk,
            "moe_router_pre_softmax": True,  # as in the recipes; one expert a token needs it
            "moe_ffn_hidden_size": options.ffn,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_router_force_load_balancing": options.router == "balanced",
        }
    common = {
        "num_layers": 1,
        "hidden_size": options.hidden,
        "num_attention_heads": tp,  # there is no attention in what is built
        "ffn_hidden_size": options.ffn,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "transformer_impl": "local",
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1 and (options.sequence_parallel or bool(options.experts)),
    }
    settings = dict(settings)
    recomputed = settings.pop("recompute_modules", None)
    with megatron_checks():
        config = TransformerConfig(**{**common, **moe, **settings})
    if recomputed:
        config.recompute_modules = recomputed  # as model.model_config_from_args: Megatron admits grouped experts only
    return config


def build_layer(config: Any, mixture: MixtureConfig | None, device: torch.device) -> torch.nn.Module:
    """What a transformer layer's mlp slot holds: a dense or a MoE layer."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_moa.layer_specs import layer_spec

    builder = layer_spec(config, mixture).layer_specs[0].submodules.mlp
    groups = ProcessGroupCollection.use_mpu_process_groups()
    further = {"layer_number": 1} if config.num_moe_experts else {"ffn_hidden_size": config.ffn_hidden_size}
    return builder(config=config, pg_collection=groups, is_mtp_layer=False, **further).to(device)


def start(device: torch.device) -> None:
    """The processes of this run, one without torchrun."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def split_over(tp: int) -> None:
    """Megatron's process groups for this tensor-parallel size; further processes are data-parallel."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
