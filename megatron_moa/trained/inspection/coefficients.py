"""Reads a checkpoint's coefficients, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.trained.inspection.kinds import kind_of


@dataclass(frozen=True)
class SavedCoefficients:
    """The coefficients of one layer; of routed experts the mean over them.

    Attributes:
        layer: from 0.
        place: ``mlp``, ``shared experts``, ``mean of 8 experts``.
        rows: by name, n numbers each. LA has ``value``. MoA has ``at zero``, the coefficient of a token that the gate's
            vector is orthogonal to (psi of the bias, or of 0, with amplitude and scale); ``amplitude``, where it is
            learned; ``gate norm``, the length of the vector.
    """

    layer: int
    place: str
    rows: dict[str, list[float]]


def coefficients(checkpoint: CheckpointTensors, mixture: MixtureConfig) -> Iterator[SavedCoefficients]:
    """Reads all layers' coefficients, in the layers' order."""
    found = []
    for module in {key.rpartition(".")[0] for key in checkpoint.tensors if kind_of(key) == "mixture"}:
        keys = {key.rpartition(".")[2]: key for key in checkpoint.tensors if key.rpartition(".")[0] == module}
        # Layers that are alike are one tensor; else each has its own, with its number in the name.
        numbered = re.search(r"layers\.(\d+)\.", module)
        try:
            shape = checkpoint.tensors[next(iter(keys.values()))].shape
            for layer in [int(numbered[1])] if numbered else range(shape[0]):
                tensors = {
                    name: checkpoint.read(key) if numbered else read_layer(checkpoint, key, layer)
                    for name, key in keys.items()
                }
                place = "shared experts" if ".shared_experts." in module else "mlp"
                if ".experts." in module:
                    place = f"mean of {shape[0 if numbered else 1]} experts"
                found.append(SavedCoefficients(layer, place, _rows(tensors, mixture)))
        except (KeyError, IndexError, RuntimeError, TypeError):
            raise UserError(
                f"{checkpoint.folder}: {module} is not what its settings mean, {mixture.describe()}"
            ) from None
    return iter(sorted(found, key=lambda entry: (entry.layer, entry.place)))


def read_layer(checkpoint: CheckpointTensors, key: str, layer: int) -> Tensor:
    """Reads one layer of a tensor that holds all layers', without that axis."""
    shape = checkpoint.tensors[key].shape
    return checkpoint.read(key, (layer, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]


def _rows(tensors: dict[str, Tensor], mixture: MixtureConfig) -> dict[str, list[float]]:
    """Makes rows of one layer's tensors, [..., n] or [..., n, h], experts in front."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    if mixture.kind == "la":
        rows = {"value": tensors["value"]}
    else:
        norms = tensors["weight"].norm(dim=-1)  # [..., n]
        logits = tensors.get("bias", torch.zeros_like(norms))
        rows = {"at zero": reference.gate(logits, mixture, tensors.get("amplitude")) * tensors.get("scale", 1.0)}
        if "amplitude" in tensors:
            rows["amplitude"] = tensors["amplitude"]
        rows["gate norm"] = norms
    return {name: row.reshape(-1, mixture.num_coefficients).mean(0).tolist() for name, row in rows.items()}
