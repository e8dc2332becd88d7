"""Lets checkpoints of Transformer Engine's layers and of Megatron's local ones load into each other.

Both kinds of layers have the same tensors, with two exceptions as of Megatron 0.19.2. The norm before an MoE layer is
saved as ``pre_mlp_layernorm`` by Transformer Engine's spec and as ``mlp.linear_fc1.layer_norm`` by the local one
(``gpt_layer_specs.py``). And each of Transformer Engine's modules saves an object ``_extra_state``, empty but for the
scales of delayed fp8 scaling. Saving keeps Megatron's names, and loading takes either.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

EXTRA_STATE = "_extra_state"
_NORM_NAMES = ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def take_stored_names(sharded: Any, stored: Collection[str]) -> None:
    """Gives a norm that the checkpoint has under its other name that name, in place.

    Args:
        sharded: Megatron's sharded state dict, of parameters and of optimizer state.
        stored: the names of the checkpoint's tensors.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor) and entry.key not in stored:
            entry.key = next((name for name in _other_names(entry.key) if name in stored), entry.key)


def _other_names(key: str) -> list[str]:
    first, second = _NORM_NAMES
    return [key.replace(old, new) for old, new in ((first, second), (second, first)) if old in key]


def drop_absent_extra_state(sharded: Any, stored: Collection[str]) -> int:
    """Removes the ``_extra_state`` objects that a checkpoint lacks, in place; their modules keep what they start with.

    Args:
        sharded: Megatron's sharded state dict.
        stored: the names of everything in the checkpoint, objects with their shard.

    Returns:
        How many there were.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    dropped = 0
    for key, value in list(sharded.items() if isinstance(sharded, dict) else enumerate(sharded)):
        if isinstance(value, dict | list):
            dropped += drop_absent_extra_state(value, stored)
        elif isinstance(value, ShardedObject) and value.key.endswith(EXTRA_STATE) and value.unique_key not in stored:
            assert isinstance(sharded, dict), value.key  # Megatron has none in lists
            del sharded[key]
            dropped += 1
    return dropped
