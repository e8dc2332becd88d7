"""Describes what is in a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_moa.checkpoints.files import (
    read_manifest,
)
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.megatron_fixes.optimizer_resharding import hangs_on_experts
from megatron_moa.megatron_fixes.random_states import splits_experts
from megatron_moa.trained.inspection.coefficients import coefficients
from megatron_moa.trained.inspection.kinds import KINDS, kind_of
from megatron_moa.trained.inspection.settings import dtype_name, mixture_of, plain, settings_of

_SPLIT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "expert TP": "expert_tensor_parallel_size",
    "DP": "data_parallel_size",
}


def describe(checkpoint: CheckpointTensors) -> dict[str, Any]:
    """Returns all that is said about a checkpoint, as JSON has it."""
    args, unknown = settings_of(checkpoint)
    mixture = None if unknown else mixture_of(args)
    return {
        "checkpoint": str(checkpoint.folder),
        "iteration": plain(checkpoint.common_state.get("iteration")),
        "format_version": plain(getattr(args, "moa_format_version", 1)),
        "mixture": mixture.describe() if mixture else f"not computed here: {unknown}" if unknown else "none",
        "coefficient_names": list(mixture.coefficient_names) if mixture else [],
        "settings": {name: plain(value) for name, value in sorted(vars(args).items())},
        "files": checkpoint.files,
        "has_manifest": read_manifest(checkpoint.folder) is not None,
        "parameters": parameters_by_kind(checkpoint),
        "tensors": {
            key: {
                "kind": kind_of(key),
                "shape": list(info.shape),
                "dtype": dtype_name(info.dtype),
                "shards": len(info.chunks),
                "files": sorted({chunk.file for chunk in info.chunks}),
            }
            for key, info in checkpoint.tensors.items()
        },
        "optimizer": optimizer_state(checkpoint, args),
        "coefficients": [vars(entry) for entry in coefficients(checkpoint, mixture)] if mixture else [],
    }


def parameters_by_kind(checkpoint: CheckpointTensors) -> dict[str, dict[str, Any]]:
    """Counts by kind: how many tensors, parameters, bytes, chunks and files, and which dtypes."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in (*KINDS, "optimizer"):
        infos = [info for key, info in checkpoint.tensors.items() if kind_of(key) == kind]
        if infos:
            kinds[kind] = {
                "tensors": len(infos),
                "parameters": sum(info.numel for info in infos),
                "bytes": sum(info.numel * info.dtype.itemsize for info in infos),
                "dtypes": sorted({dtype_name(info.dtype) for info in infos}),
                "shards": sum(len(info.chunks) for info in infos),
                "files": len({chunk.file for info in infos for chunk in info.chunks}),
            }
    return kinds


def optimizer_state(checkpoint: CheckpointTensors, args: argparse.Namespace) -> str:
    """Says whether the optimizer's state is there, and for which splits (docs/checkpoints.md)."""
    if not any(kind_of(key) == "optimizer" for key in checkpoint.tensors):
        return "not there"
    sharding = checkpoint.content_metadata.get("distrib_optim_sharding_type")
    split = ", ".join(f"{name} {getattr(args, arg, '?')}" for name, arg in _SPLIT.items())
    in_buckets = any("optimizer.distributed." in key for key in checkpoint.tensors)
    if sharding == "fully_reshardable" or not (getattr(args, "use_distributed_optimizer", False) or in_buckets):
        limit = ""
        if hangs_on_experts(args):
            limit = f" that splits experts {'otherwise than' if splits_experts(args) else 'as'} dense layers"
        return f"there, for any split{limit} (saved under {split})"
    return f"there, for {split.rpartition(', ')[0]} and any DP ({sharding or 'distributed'}; saved under {split})"
