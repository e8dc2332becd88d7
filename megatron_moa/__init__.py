"""Mixtures of activations (MoA, LA) as Megatron MLP specs.

    from megatron_moa import MixtureConfig, mixed_activation, gate_coefficients, from_checkpoint

Start with mixture/ for the mathematics, layers/ for the Megatron modules, training/ for what stands around the loop.
A folder imports only from folders above it in README.md's tree; ``make lint`` holds that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_moa.megatron_fixes import te_guard

if TYPE_CHECKING:
    from megatron_moa.load import from_checkpoint
    from megatron_moa.mixture.config import MixtureConfig
    from megatron_moa.mixture.functional import gate_coefficients, mixed_activation

__version__ = "0.2.0"
__all__ = ["MixtureConfig", "__version__", "from_checkpoint", "gate_coefficients", "mixed_activation"]

_HOMES = {
    "MixtureConfig": "mixture.config",
    "from_checkpoint": "load",
    "gate_coefficients": "mixture.functional",
    "mixed_activation": "mixture.functional",
}

te_guard.install()


def __getattr__(name: str) -> object:
    """The public names import torch when one is first asked for, not with the package."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"megatron_moa.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
