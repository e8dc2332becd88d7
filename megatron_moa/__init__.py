"""Mixtures of activations (MoA, LA) as Megatron MLP specs.

    from megatron_moa import MixtureConfig, mixed_activation, gate_coefficients     # in any PyTorch code
    from megatron_moa import MixedFeedForward, replace_feed_forward
    from megatron_moa import from_checkpoint                                         # a trained model

Start with mixture/ for the mathematics, pytorch/ for a layer without Megatron, layers/ for the Megatron modules,
training/ for what stands around the loop.
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
    from megatron_moa.pytorch.feed_forward import MixedFeedForward
    from megatron_moa.pytorch.replacement import load_replaced, replace_feed_forward

__version__ = "0.2.0"
__all__ = [
    "MixedFeedForward",
    "MixtureConfig",
    "__version__",
    "from_checkpoint",
    "gate_coefficients",
    "load_replaced",
    "mixed_activation",
    "replace_feed_forward",
]

_HOMES = {
    "MixedFeedForward": "pytorch.feed_forward",
    "MixtureConfig": "mixture.config",
    "from_checkpoint": "load",
    "gate_coefficients": "mixture.functional",
    "load_replaced": "pytorch.replacement",
    "mixed_activation": "mixture.functional",
    "replace_feed_forward": "pytorch.replacement",
}

te_guard.install()


def __getattr__(name: str) -> object:
    """The public names import torch when one is first asked for, not with the package."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"megatron_moa.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
