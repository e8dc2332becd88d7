"""Checks numbers of the command line that must fit each other.

They are those for which Megatron fails late or names no flag.
"""

from __future__ import annotations

import argparse
import math

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError


def check_shapes(args: argparse.Namespace) -> None:
    """Raises UserError for heads, batches or layers of experts that do not fit.

    Args:
        args: Megatron's, parsed and not validated.
    """
    _check_split(args)
    _check_heads(args)
    _check_batches(args)
    _check_experts(args)
    if args.profile and args.profile_step_end <= args.profile_step_start:
        given = as_typed("profile_step_end", args.profile_step_end)
        raise UserError(f"{given}: not after --profile-step-start {args.profile_step_start}; give a later step")


def _check_split(args: argparse.Namespace) -> None:
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) > 1}
    if args.world_size % math.prod(sizes.values()):
        given = " ".join(as_typed(name, size) for name, size in sizes.items())
        raise UserError(
            f"{given}: needs a multiple of {math.prod(sizes.values())} processes, the world size is {args.world_size}; "
            "start as many with torchrun, or split less"
        )
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16: two precisions; drop one of them")


def _check_heads(args: argparse.Namespace) -> None:
    heads, groups, hidden, channels = (
        args.num_attention_heads,
        args.num_query_groups,
        args.hidden_size,
        args.kv_channels,
    )
    if heads is None or hidden is None or args.multi_latent_attention:
        return
    if args.group_query_attention and groups and heads % groups:
        raise UserError(f"--num-query-groups {groups}: does not divide --num-attention-heads {heads}")
    if channels is None:
        if hidden % heads:
            raise UserError(
                f"--num-attention-heads {heads}: does not divide --hidden-size {hidden}; give another number of "
                "num_attention_heads, or the size of a head with --kv-channels"
            )
        channels = hidden // heads
    rotated = int(channels * args.rotary_percent)
    if args.position_embedding_type in ("rope", "yarn") and (rotated % 2 or not rotated):
        raise UserError(
            f"{as_typed('rotary_percent', args.rotary_percent)}: rotates {rotated} of a head's {channels} channels; "
            "pairs of them are rotated, give an even number of --kv-channels"
        )


def _check_batches(args: argparse.Namespace) -> None:
    whole, part = args.global_batch_size, args.micro_batch_size
    if whole and part and whole % part:
        raise UserError(f"--global-batch-size {whole}: not a multiple of --micro-batch-size {part}; give one")


def _check_experts(args: argparse.Namespace) -> None:
    pattern = args.moe_layer_freq
    if not args.num_experts or args.num_layers is None:
        return
    if args.moe_router_topk > args.num_experts:
        raise UserError(f"--moe-router-topk {args.moe_router_topk}: above --num-experts {args.num_experts}; give less")
    given = as_typed("moe_layer_freq", str(pattern))
    if isinstance(pattern, int):
        if pattern < 1:
            raise UserError(f"{given}: give 1 for experts in every layer, N for every N-th, or a list of 0 and 1")
    elif not isinstance(pattern, list) or any(is_moe not in (0, 1) for is_moe in pattern):
        raise UserError(f"{given}: not a list of 0 and 1; give one such as '[0]+[1]*{args.num_layers - 1}'")
    elif len(pattern) != args.num_layers:
        raise UserError(f"{given}: has {len(pattern)} layers, --num-layers is {args.num_layers}; give one for each")
