"""Leaves the gates' matrices to Adam where Muon, SOAP and the like take every matrix.

Not part of the training script: the layers call it, so it holds in any script of Megatron's that builds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.nn import Parameter

from megatron_moa.megatron_fixes.patching import patch

_MARK = "moa_gate"  # attribute of a gate's matrix


def train_by_adam(gate: Parameter) -> Parameter:
    """Marks a gate's matrix, so that Muon, SOAP and the like leave the matrix to Adam.

    They take every matrix [.., ..] that is not marked. ``is_embedding_or_output_parameter`` would leave the gate to
    Adam too, but it also asks for --decoupled-lr.

    Megatron 0.19.2 decides by shape in two places that must agree. One is which optimizer a parameter's group gets, by
    the overrides of each optimizer's registry entry. The other is which buffer of the layer-wise distributed optimizer
    it lies in, and which rules of --use-mup it follows, by a predicate. Both are changed when the first gate is made.
    """
    for change in _PATCHES:
        change.install()
    setattr(gate, _MARK, True)
    return gate


def _with_gates_by_adam(registry: dict[str, Any]) -> dict[str, Any]:
    """Changes the entries in place: other modules of Megatron's hold the same registry."""
    from megatron.core.optimizer import ParamKey

    for entry in registry.values():
        entry.default_param_overrides[ParamKey(attr=_MARK)] = {"optimizer": "adam"}
    return registry


def _by_shape_and_mark(by_shape: Callable[[Parameter], bool]) -> Callable[[Parameter], bool]:
    @functools.wraps(by_shape)
    def call(parameter: Parameter) -> bool:
        return by_shape(parameter) and not getattr(parameter, _MARK, False)

    return call


_REASON = (
    "by shape it gives a gate to Muon and the like; made when a layer builds a gate, for any script that has --spec"
)
_UNTIL = "Megatron lets a parameter name its optimizer"
_PATCHES = (
    patch(
        "megatron.core.optimizer.emerging_optimizers._EMERGING_OPTIMIZERS",
        _with_gates_by_adam,
        why=_REASON,
        version="0.19.2",
        remove_when=_UNTIL,
    ),
    *(
        patch(
            f"megatron.core.optimizer.{module}is_managed_by_layer_wise_optimizer",
            _by_shape_and_mark,
            why=_REASON,
            version="0.19.2",
            remove_when=_UNTIL,
        )
        for module in ("layer_wise_optimizer.", "")
    ),
)
