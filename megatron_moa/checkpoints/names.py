"""Lets checkpoints of Transformer Engine's layers and of Megatron's local ones load into each other.

Both kinds of layers have the same tensors, with two exceptions as of Megatron 0.19.2. Transformer Engine keeps some
norms inside the linear map behind them, and the two specs (``gpt_layer_specs.py``) do not give all of these one name.
And each of Transformer Engine's modules saves an object ``_extra_state``, empty but for the scales of delayed fp8
scaling. Saving keeps Megatron's names, and loading takes either.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

EXTRA_STATE = "_extra_state"
# A norm of its own, and the same norm inside a linear map of Transformer Engine's. The first pair differs in MoE layers
# and with latent attention, the others with latent attention and --qk-layernorm.
_NORM_NAMES = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)


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
    both_ways = [pair for first, second in _NORM_NAMES for pair in ((first, second), (second, first))]
    return [key.replace(old, new) for old, new in both_ways if old in key]


def keep_absent_extra_state(sharded: Any, stored: Collection[str]) -> None:
    """Leaves modules the ``_extra_state`` that they have where a checkpoint has none for them, in place.

    Left out instead, Megatron's strict load would fail, and a second one follow that is not strict.

    Args:
        sharded: Megatron's sharded state dict.
        stored: the names of everything in the checkpoint, objects with their shard.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    def own_if_absent(entry: Any) -> Any:
        extra = isinstance(entry, ShardedObject) and entry.key.endswith(EXTRA_STATE)
        return LocalNonpersistentObject(entry.data) if extra and entry.unique_key not in stored else entry

    dict_list_map_inplace(own_if_absent, sharded)
