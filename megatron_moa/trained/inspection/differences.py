"""Compares two checkpoints: settings, tensors, and the values of parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.trained.inspection.coefficients import read_layer
from megatron_moa.trained.inspection.contents import optimizer_state
from megatron_moa.trained.inspection.kinds import KINDS, kind_of
from megatron_moa.trained.inspection.settings import MIXTURE, SHAPE, dtype_name, plain, settings_of

_PART = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class Difference:
    """The largest difference among tensors.

    Attributes:
        absolute: of any element; infinite where one has NaN and the other has not.
        relative: of any tensor (one layer's of a tensor of several layers), its largest absolute difference beside its
            largest element in either.
        tensor: where the absolute one is.
        tensors: how many were compared.
        different: how many of those have a difference.
    """

    absolute: float = 0.0
    relative: float = 0.0
    tensor: str = ""
    tensors: int = 0
    different: int = 0

    def __or__(self, other: Difference) -> Difference:
        return Difference(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            other.tensor if other.absolute > self.absolute else self.tensor,
            self.tensors + other.tensors,
            self.different + other.different,
        )


def difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Returns the largest absolute and relative difference of two tensors.

    Equal infinities and NaNs do not differ.
    """
    absolute = largest = 0.0
    # In parts: an embedding in float64, twice, is more memory than the rest of this program.
    for one, two in zip(first.flatten().split(_PART), second.flatten().split(_PART), strict=True):
        if one.numel() == 0:
            continue
        one, two = one.double(), two.double()
        same = (one == two) | (one.isnan() & two.isnan())
        apart = (one - two).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        absolute = max(absolute, apart.max().item())
        largest = max(largest, one.nan_to_num().abs().max().item(), two.nan_to_num().abs().max().item())
    return absolute, absolute / largest if largest else absolute and math.inf


def compare_tensors(first: CheckpointTensors, second: CheckpointTensors, key: str) -> Difference:
    """Compares a tensor that both have in one shape, layer by layer, so that one is in memory at a time."""
    stacked = re.search(r"layers\.(?!\d)", key) is not None
    layers = range(first.tensors[key].shape[0]) if stacked else [None]
    absolute = relative = 0.0
    for layer in layers:
        pair = (each.read(key) if layer is None else read_layer(each, key, layer) for each in (first, second))
        of_layer = difference(*pair)
        absolute, relative = max(absolute, of_layer[0]), max(relative, of_layer[1])
    return Difference(absolute, relative, key if absolute else "", 1, int(absolute > 0))


def compare(first: CheckpointTensors, second: CheckpointTensors) -> dict[str, Any]:
    """Returns in what two checkpoints differ, as JSON has it.

    Compared are settings, tensors, and parameters' values by kind.
    """
    settings = [{name: plain(value) for name, value in vars(settings_of(each)[0]).items()} for each in (first, second)]
    tensors = [{key for key in each.tensors if kind_of(key) != "optimizer"} for each in (first, second)]
    other_shapes, differences = {}, {}
    for key in sorted(tensors[0] & tensors[1]):
        one, two = first.tensors[key], second.tensors[key]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            other_shapes[key] = [f"{dtype_name(info.dtype)} {'×'.join(map(str, info.shape))}" for info in (one, two)]
        if one.shape == two.shape:
            kind = kind_of(key)
            differences[kind] = differences.get(kind, Difference()) | compare_tensors(first, second, key)
    overall = Difference()
    for entry in differences.values():
        overall |= entry
    ordered = [*MIXTURE.split(), *SHAPE.split(), *sorted(settings[0].keys() | settings[1].keys())]
    return {
        "checkpoints": [str(first.folder), str(second.folder)],
        "iterations": [plain(each.common_state.get("iteration")) for each in (first, second)],
        "settings": {
            name: [each.get(name) for each in settings]
            for name in dict.fromkeys(ordered)
            if settings[0].get(name) != settings[1].get(name)
        },
        "only_in_first": sorted(tensors[0] - tensors[1]),
        "only_in_second": sorted(tensors[1] - tensors[0]),
        "other_shapes_or_dtypes": other_shapes,
        "optimizer": [optimizer_state(each, each.args) for each in (first, second)],
        "differences": {kind: vars(differences[kind]) for kind in KINDS if kind in differences}
        | {"all": vars(overall)},
    }


def is_same(compared: dict[str, Any]) -> bool:
    """Returns whether all parameters are the same, but for the sign of zeros and the payload of NaNs."""
    names = ("only_in_first", "only_in_second", "other_shapes_or_dtypes")
    return not any(compared[name] for name in names) and compared["differences"]["all"]["different"] == 0
