"""Loads optimizer state that another machine, or another split of a MoE model's experts, has saved.

The fused Adams of Transformer Engine and Apex count steps once for each group of parameters, torch's Adam once for each
parameter. The fused ones have further settings, too. As of 0.19.2 loading the state of one kind into the other ends
with a KeyError, on ``step`` or ``bias_correction``. Here the steps are put where they are looked for, and settings that
the checkpoint lacks stay the run's.

Megatron has one optimizer for all parameters where experts share the dense layers' data-parallel group, and one for the
experts beside it where they do not. Tensors are found again by their parameters' names in either case; what is common
to all ranks (steps, hyperparameters) lies in the checkpoint as it was, and as of 0.19.2 loading it ends with "Expected
2 entries in state dict, but got 4". Here it is dealt out to the optimizers the run has.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.checkpoints.settings import differing, loads_optimizer
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.patching import patch
from megatron_moa.megatron_fixes.random_states import splits_experts

_SPLITS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def install() -> None:
    """Lets Megatron's optimizers load the state of another chain, and of another Adam."""
    for change in _PATCHES:
        change.install()


def _of_any_chain(load_state_dict: Callable) -> Callable:
    @functools.wraps(load_state_dict)
    def call(self: Any, state_dict: Any) -> None:
        load_state_dict(self, _rechained(state_dict, self.chained_optimizers))

    return call


def _of_any_adam(load_state_dict: Callable) -> Callable:
    @functools.wraps(load_state_dict)
    def call(self: Any, state_dict: dict[str, Any]) -> None:
        # A float32 optimizer's state is torch's; others hold torch's under "optimizer".
        loaded = state_dict.get("optimizer", state_dict)
        if "state" in loaded:  # the distributed optimizer has none there, and counts the steps itself
            _count_steps_as(self.optimizer, loaded)
        load_state_dict(self, state_dict)
        for group in getattr(self.optimizer, "param_groups", ()):  # a rank without parameters has no optimizer
            for setting, value in getattr(self.optimizer, "defaults", {}).items():
                group.setdefault(setting, value)

    return call


_PATCHES = (
    patch(
        "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict",
        _of_any_chain,
        why="it refuses the state of as many optimizers as another split of the experts has",
        version="0.19.2",
        remove_when="Megatron deals out what all ranks have in common to the optimizers that a run has",
    ),
    *(
        patch(
            f"megatron.core.optimizer.{kind}.load_state_dict",
            _of_any_adam,
            why="torch's Adam keeps a step count for each parameter, the fused ones for each group: KeyError",
            version="0.19.2",
            remove_when="Megatron saves the step count in one form for every Adam",
        )
        for kind in (
            "distrib_optimizer.DistributedOptimizer",
            "optimizer.Float16OptimizerWithFloat16Params",
            "optimizer.FP32Optimizer",
        )
    ),
)


def _count_steps_as(adam: Any, loaded: dict[str, Any]) -> None:
    """Puts the number of steps where this Adam looks for it; Megatron saves torch's as ``common_step``."""
    from megatron.core.optimizer import Adam

    counts_by_parameter = isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
    if counts_by_parameter and "common_step" not in loaded["state"]:
        steps = [group.pop("step") for group in loaded["param_groups"] if "step" in group]
        if steps:
            loaded["state"]["common_step"] = torch.tensor(float(steps[0]))
    elif not counts_by_parameter and isinstance(adam, Adam) and "common_step" in loaded["state"]:
        step = int(loaded["state"].pop("common_step"))
        loaded["param_groups"] = [{**group, "step": step} for group in loaded["param_groups"]]


def _rechained(loaded: Any, optimizers: list[Any]) -> Any:
    """Loaded state with one entry an optimizer; as it came if the checkpoint's chain was the same.

    Megatron loads into the union of the checkpoint's structure and the run's: a chain's entries have numbers for keys,
    a lone optimizer's have names. So both kinds are there exactly if one of the two was a chain, the other not.
    """
    if not isinstance(loaded, dict):
        return loaded
    chain = [loaded[key] for key in sorted(key for key in loaded if isinstance(key, int))]
    lone = {key: value for key, value in loaded.items() if not isinstance(key, int)}
    if not chain or not lone:
        return loaded
    if len(optimizers) == 1:
        return _joined(common=chain, own=lone, optimizer=optimizers[0])
    return {
        index: _joined(common=[lone], own=own, optimizer=optimizer)
        for index, (own, optimizer) in enumerate(zip(chain, optimizers, strict=True))
    }


def _joined(common: list[dict], own: dict, optimizer: Any) -> dict:
    """One optimizer's state: its own tensors, with what the checkpoint has in common for all."""
    merged = functools.reduce(_merged, [*common, own])
    # A float32 optimizer's state is torch's; others hold torch's under "optimizer".
    own_groups = own.get("optimizer", own).get("param_groups")
    saved_groups = [group for part in common for group in part.get("optimizer", part)["param_groups"]]
    groups = []
    for index, group in enumerate(optimizer.optimizer.param_groups):
        groups.append({**_saved_group(group, saved_groups), "is_expert_parallel": group["is_expert_parallel"]})
        if own_groups is not None:  # the distributed optimizer has none of its own
            groups[-1]["params"] = own_groups[index]["params"]
    if "optimizer" in merged:
        return {**merged, "optimizer": {**merged["optimizer"], "param_groups": groups}}
    return {**merged, "param_groups": groups}


def _merged(first: dict, second: dict) -> dict:
    return {
        key: _merged(first[key], second[key])
        if isinstance(first.get(key), dict) and isinstance(second.get(key), dict)
        else second.get(key, first.get(key))
        for key in {**first, **second}
    }


def _saved_group(group: dict, saved: list[dict]) -> dict:
    """The saved group with this one's settings, dense or expert: both are stepped and scheduled alike."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    def settings(of: dict) -> dict:
        return {key: of.get(key) for key in param_group_identifier_keys if key != "is_expert_parallel"}

    for candidate in saved:
        if settings(candidate) == settings(group):
            return candidate
    raise UserError(
        f"--load: the checkpoint's optimizer has no parameter group with the settings {settings(group)}; "
        "start a new one with --no-load-optim"
    )


def hangs_on_experts(saved: argparse.Namespace) -> bool:
    """Whether optimizer state loads only where experts are split like dense layers in both or neither."""
    return bool(getattr(saved, "num_experts", None)) and getattr(saved, "optimizer", "adam") not in ("adam", "sgd")


def check_saved_split(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint's optimizer state is in a form for another split.

    A distributed optimizer's is, unless it is fully reshardable, and so is any other than Adam's and SGD's of a MoE
    whose experts have come to be split otherwise than dense layers, or no longer are.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    if not loads_optimizer(args, saved, checkpoint):
        return
    if hangs_on_experts(saved) and splits_experts(saved) != splits_experts(args):
        # As of 0.19.2 experts are parameter groups of their own where they are split: "Cannot merge two lists".
        sizes = "expert_model_parallel_size", "expert_tensor_parallel_size", "tensor_model_parallel_size"
        there, here = (" ".join(as_typed(name, getattr(some, name)) for name in sizes) for some in (saved, args))
        raise UserError(
            f"{checkpoint} has the state of --optimizer {saved.optimizer} for {there}, not {here}; it loads only "
            "where experts are split otherwise than dense layers in both, or in neither; go on under the sizes it was "
            "saved with, or with --no-load-optim"
        )
    if not saved.use_distributed_optimizer:
        return
    if getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return
    remedy = (
        "go on under that, or with --no-load-optim; saved with --dist-ckpt-optim-fully-reshardable, an optimizer's "
        "state loads under any split"
    )
    # Transformer Engine's layers and grouped experts have their parameters in another order, and the buffer is saved as
    # it lies.
    names = (*_SPLITS, "transformer_impl", *(["moe_grouped_gemm"] if args.num_experts else []))
    unset = {**dict.fromkeys(_SPLITS), "moe_grouped_gemm": False}
    for name, here, there in differing(names, args, saved, unset, exactly=True):
        value = as_typed(name, here) if name == "moe_grouped_gemm" else here
        raise UserError(f"{checkpoint} has the optimizer's state for {as_typed(name, there)}, not {value}; {remedy}")
    mixed_experts = args.num_experts and args.moe_grouped_gemm and getattr(args, "moa_mixing", "none") != "none"
    if mixed_experts and not getattr(saved, "moa_experts_share_parameters", False):
        raise UserError(
            f"{checkpoint} has the optimizer's state for one parameter an expert, where grouped experts now share "
            "theirs; go on with --no-load-optim, or under the megatron_moa that saved it"
        )
    if not args.use_distributed_optimizer:
        raise UserError(f"{checkpoint} has the optimizer's state for --use-distributed-optimizer; {remedy}")
