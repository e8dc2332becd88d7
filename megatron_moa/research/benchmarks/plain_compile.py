"""Computes the mixture by plain torch.compile, as the paper timed it.

This is a contender of the benchmarks and no backend. The specification (megatron_moa/mixture/reference.py) is compiled
as it stands and differentiated by torch's autograd, which also decides what is saved for backward. The backend
``compile`` is another thing: it has a backward of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor

from megatron_moa.mixture import reference

_POSITION_OF_GROUPS = {"mixed_activation": 5, "gate_coefficients": 6}


def compiled_reference() -> AbstractContextManager:
    """Puts compiled functions in the place of the eager backend's, as long as the context lasts."""
    return mock.patch.multiple(reference, **_functions())


@functools.cache
def _functions() -> dict[str, Callable[..., Tensor]]:
    return {name: _function(getattr(reference, name), at) for name, at in _POSITION_OF_GROUPS.items()}


def _function(plain: Callable[..., Tensor], at: int) -> Callable[..., Tensor]:
    """Compiles a function by torch.compile for all calls without groups of rows.

    Groups have sizes on the host. With them the function itself is called: ``gate_coefficients`` then puts each group's
    rows through its compiled form by themselves, ``mixed_activation`` runs as it stands.
    """
    compiled = torch.compile(plain, fullgraph=True)  # whole, or an error: it never falls back to eager PyTorch

    def call(*arguments: object) -> Tensor:
        grouped = any(argument is not None for argument in arguments[at:])
        return plain(*arguments) if grouped else compiled(*arguments[:at])

    return call
