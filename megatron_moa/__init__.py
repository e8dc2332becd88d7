"""Mixtures of activations (MoA, LA) as Megatron MLP specs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_moa.megatron_fixes import te_guard

if TYPE_CHECKING:
    from megatron_moa.load import from_checkpoint

__version__ = "0.2.0"
__all__ = ["__version__", "from_checkpoint"]


te_guard.install()


def __getattr__(name: str) -> object:
    """:func:`from_checkpoint` imports torch when it is first asked for, not with the package."""
    if name == "from_checkpoint":
        from megatron_moa.load import from_checkpoint

        return from_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
