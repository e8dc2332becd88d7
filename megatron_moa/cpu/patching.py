"""Registers changes to Megatron and torch that are made without a GPU alone.

megatron_moa.megatron_fixes.patching registers changes for all machines.
"""

from collections.abc import Callable, Iterable
from typing import Any

from megatron_moa.megatron_fixes.patching import NO_GPU, Patch, constant, patch


def wrapped(
    path: str,
    wrapper: Callable[[Any], Any],
    why: str,
    also_sets: Callable[[], Iterable[tuple[Any, str, Any]]] = tuple,
) -> Patch:
    """Registers a change whose replacement calls the original; arguments are those of ``patch``."""
    return patch(
        path,
        wrapper,
        why=why,
        version="0.19.2",
        remove_when="Megatron runs without CUDA",
        where=NO_GPU,
        also_sets=also_sets,
    )


def replaced(path: str, value: Any, why: str) -> Patch:
    """Registers a change that puts ``value`` in the original's place."""
    return wrapped(path, constant(value), why)
