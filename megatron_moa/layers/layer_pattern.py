"""Says which layers of a model are MoE layers, by Megatron's arguments."""

from __future__ import annotations

import argparse


def moe_layers(args: argparse.Namespace) -> list[bool]:
    """For each decoder layer, whether it is one of experts (``--num-experts``, ``--moe-layer-freq``)."""
    if not args.num_experts:
        return [False] * args.num_layers
    if isinstance(args.moe_layer_freq, int):
        return [layer % args.moe_layer_freq == 0 for layer in range(args.num_layers)]
    return [bool(is_moe) for is_moe in args.moe_layer_freq]
