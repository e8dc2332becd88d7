"""Which layers of a model are MoE layers, by Megatron's arguments."""

from __future__ import annotations

import argparse

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError


def check_layer_pattern(args: argparse.Namespace) -> None:
    """Raises UserError unless ``--moe-layer-freq`` names a pattern for every layer.

    Args:
        args: Megatron's, parsed.
    """
    pattern = args.moe_layer_freq
    if not args.num_experts or args.num_layers is None:
        return
    given = as_typed("moe_layer_freq", pattern if isinstance(pattern, int) else str(pattern))
    if isinstance(pattern, int):
        if pattern < 1:
            raise UserError(f"{given}: give 1 for experts in every layer, N for every N-th, or a list of 0 and 1")
    elif not isinstance(pattern, list) or any(is_moe not in (0, 1) for is_moe in pattern):
        raise UserError(f"{given}: not a list of 0 and 1; give one such as '[0]+[1]*{args.num_layers - 1}'")
    elif len(pattern) != args.num_layers:
        raise UserError(f"{given}: has {len(pattern)} layers, --num-layers is {args.num_layers}; give one for each")


def moe_layers(args: argparse.Namespace) -> list[bool]:
    """For each decoder layer, whether it is one of experts (``--num-experts``, ``--moe-layer-freq``)."""
    if not args.num_experts:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [layer % args.moe_layer_freq == 0 for layer in range(args.num_layers)]
    return [bool(is_moe) for is_moe in args.moe_layer_freq]
