"""Tests how names and objects of Transformer Engine's layers are matched with those of local ones.

The two differ, and are matched before loading.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from megatron_moa.checkpoints.names import keep_absent_extra_state, take_stored_names


def tensor(key: str) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(2))


def extra_state(key: str) -> ShardedObject:
    return ShardedObject(key, None, (1,), (0,))


@pytest.mark.parametrize(
    ("local", "engine"),
    [
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        (
            "decoder.layers.self_attention.q_layernorm.weight",
            "decoder.layers.self_attention.linear_q_up_proj.layer_norm_weight",
        ),
        (
            "decoder.layers.self_attention.kv_layernorm.bias",
            "decoder.layers.self_attention.linear_kv_up_proj.layer_norm_bias",
        ),
    ],
)
def test_a_norm_is_found_under_either_name(local: str, engine: str) -> None:
    for asked, stored in ((local, engine), (engine, local), (local, local)):
        moment = tensor(f"optimizer.state.exp_avg.{asked}")
        fc2 = tensor("decoder.layers.3.mlp.linear_fc2.weight")
        state = {"model": {"norm": tensor(asked), "fc2": fc2}, "optimizer": [moment]}
        take_stored_names(state, {stored, f"optimizer.state.exp_avg.{stored}"})
        assert state["model"]["norm"].key == stored
        assert fc2.key == "decoder.layers.3.mlp.linear_fc2.weight"
        assert moment.key == f"optimizer.state.exp_avg.{stored}"


def test_what_the_checkpoint_has_under_no_name_keeps_its_own() -> None:
    missing = tensor("decoder.layers.3.pre_mlp_layernorm.weight")
    take_stored_names({"norm": missing}, {"decoder.layers.4.pre_mlp_layernorm.weight"})
    assert missing.key == "decoder.layers.3.pre_mlp_layernorm.weight"


def test_absent_extra_state_stays_the_modules_own() -> None:
    there, absent, other = (
        extra_state("decoder.layers.0.mlp.linear_fc1._extra_state"),
        ShardedObject("decoder.final_layernorm._extra_state", torch.empty(0), (1,), (0,)),
        ShardedObject("rng_state", None, (1,), (0,)),
    )
    state = {"model": {"there": there, "absent": absent, "weight": tensor("w")}, "rng_state": other}
    weight = state["model"]["weight"]
    keep_absent_extra_state(state, {there.unique_key})
    own = state["model"].pop("absent")
    assert isinstance(own, LocalNonpersistentObject)
    assert own.unwrap() is absent.data
    assert state == {"model": {"there": there, "weight": weight}, "rng_state": other}
