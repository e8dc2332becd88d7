"""Says which layers of a model are MoE layers, by Megatron's arguments."""

from __future__ import annotations

import argparse


def moe_layers(args: argparse.Namespace, with_mtp: bool = False) -> list[bool]:
    """For each decoder layer, whether it is one of experts (``--num-experts``, ``--moe-layer-freq``).

    Args:
        args: Megatron's.
        with_mtp: adds the layers of multi-token prediction, which are as the last of the others.
    """
    if not args.num_experts:
        pattern = [False] * args.num_layers
    elif isinstance(args.moe_layer_freq, int):
        pattern = [layer % args.moe_layer_freq == 0 for layer in range(args.num_layers)]
    else:
        pattern = [bool(is_moe) for is_moe in args.moe_layer_freq]
    return pattern + [pattern[-1]] * (args.mtp_num_layers or 0) if with_mtp else pattern
