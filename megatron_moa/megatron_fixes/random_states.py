"""Saves and restores every rank's random number state, where ranks draw numbers of their own.

Megatron 0.19.2 keeps one state for each tensor- and pipeline-parallel rank, that of the first data-parallel one. With
expert parallelism the others' differ (each has a stream of its own for its experts), and all of them are resumed with
the first one's. Here every rank's state is kept wherever experts are split otherwise than dense layers are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.checkpoints.settings import differing
from megatron_moa.command_line.megatron_flags import spellings
from megatron_moa.megatron_fixes.patching import patch

# In the args of checkpoints: that they hold every rank's state, and whose generators' states those are.
_MARK = "random_states_of_every_rank"
_DEVICE = "random_states_device"

_LAYOUT = (
    "world_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def differ_by_rank(args: argparse.Namespace) -> bool:
    """Whether data-parallel ranks have states of their own: some split of the experts runs across them."""
    # With --data-parallel-random-init Megatron keeps the data-parallel ranks' states itself.
    return splits_experts(args) and not getattr(args, "data_parallel_random_init", False)


def splits_experts(args: argparse.Namespace) -> bool:
    """Whether experts are split otherwise than dense layers."""
    layout = _layout(args)
    return bool(getattr(args, "num_experts", None)) and (
        layout.expert_model_parallel_size > 1 or layout.expert_tensor_parallel_size != layout.tensor_model_parallel_size
    )


def keep_every_ranks() -> None:
    """Lets Megatron's torch_dist checkpoints hold, and restore, every rank's state where they differ."""
    _RNG_STATE.install()


def _of_every_rank(get_rng_state: Callable) -> Callable:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.training import get_args

    @functools.wraps(get_rng_state)
    def call(*args: Any, **kwargs: Any) -> Any:
        state = get_rng_state(*args, **kwargs)
        if not isinstance(state, ShardedObject) or not differ_by_rank(get_args()):
            return state
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return dataclasses.replace(
            state,
            global_shape=(*state.global_shape, copies.size()),
            global_offset=(*state.global_offset, copies.rank()),
            replica_id=0,
        )

    return call


_RNG_STATE = patch(
    "megatron.training.checkpointing.get_rng_state",
    _of_every_rank,
    why="it keeps the first data-parallel rank's random states alone, and with expert parallelism others differ",
    version="0.19.2",
    remove_when="Megatron saves the random states of every expert-parallel rank (merged upstream as PR 6858)",
)


def check_saved(
    args: argparse.Namespace, saved: argparse.Namespace | None, checkpoint: Checkpoint | None = None
) -> None:
    """Decides whether the random number states of the checkpoint to load can be restored.

    ``saved`` are the args that checkpoint was saved with. A state belongs to one split and one kind of device. If the
    states cannot be restored, says so and sets ``args.no_load_rng``. Also marks the run's args, for the checkpoints
    that the run will save.
    """
    device = "GPU" if torch.cuda.is_available() else "CPU"
    setattr(args, _DEVICE, device)
    if (args.ckpt_convert_format or args.ckpt_format) == "torch_dist":
        setattr(args, _MARK, True)
    if saved is None or args.no_load_rng or args.finetune or getattr(saved, "no_save_rng", False):
        return
    if checkpoint is not None and (checkpoint.flag != "--load" or checkpoint.iteration is None):
        return  # Megatron starts with the weights alone
    reason = None
    saved_device = getattr(saved, _DEVICE, device)  # None of an older version
    if saved_device != device:
        reason = f"saved on a {saved_device}, loaded on a {device}"
    elif not (differ_by_rank(args) or differ_by_rank(saved)):
        return
    elif not hasattr(saved, _MARK):
        reason = "it holds one state for all expert-parallel ranks, as Megatron saves it"
    else:
        for name, here, there in differing(_LAYOUT, _layout(args), _layout(saved)):
            what = "processes" if name == "world_size" else spellings(name)[0]
            reason = f"saved with {what} {there}, loaded with {here}"
    if reason is not None:
        args.no_load_rng = True
        if args.rank == 0:
            print(f"> the checkpoint's random number states are not restored: {reason}", flush=True)


def _layout(args: argparse.Namespace) -> argparse.Namespace:
    layout = argparse.Namespace(**{name: getattr(args, name, None) or 1 for name in _LAYOUT})
    if getattr(args, "expert_tensor_parallel_size", None) is None:
        layout.expert_tensor_parallel_size = layout.tensor_model_parallel_size
    return layout
