"""Keeps Transformer Engine and Apex out of a process that has no CUDA device.

Megatron 0.19.2 takes the optimizer of either and its kernels for several tensors when it is imported, whatever
``--transformer-impl`` says, and these fail on a CPU. A half-installed Transformer Engine ends Megatron's import with an
error that Megatron does not expect. So their import fails here as that of a missing package does, and Megatron goes on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from megatron_moa.megatron_fixes.patching import patch

PACKAGES = ("transformer_engine", "apex")
ALLOW = "MEGATRON_MOA_TE_ON_CPU"  # environment variable: 1 lets them be imported all the same, as tests/te do


class _Refusal(importlib.abc.Loader):
    """Fails in place of the package's own loader."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leaves the module to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        message = f"{module.__name__} needs a CUDA device, and there is none; megatron_moa runs without it"
        raise ModuleNotFoundError(message, name=module.__name__)


class _Guard(importlib.abc.MetaPathFinder):
    """Finds the packages, so that others may ask whether they are installed, and lets nobody load them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in PACKAGES or os.environ.get(ALLOW) == "1":
            return None
        # All of them: a package installed by pip install -e may have one of its own.
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is None:
            return None
        import torch  # only here: the guard is set when megatron_moa is imported, which takes no torch

        if torch.cuda.is_available():
            return None
        refused = importlib.machinery.ModuleSpec(fullname, _Refusal(), origin=found.origin)
        refused.submodule_search_locations = found.submodule_search_locations  # the doctor looks there
        return refused


def _with_guard(finders: list) -> list:
    finders.insert(0, _Guard())
    return finders


_GUARD = patch(
    "sys.meta_path",
    _with_guard,
    why="Megatron's import takes kernels of Transformer Engine and Apex, which fail without a GPU; made when "
    "megatron_moa is imported, since Megatron's import may come next",
    version="0.19.2",
    remove_when="Megatron asks for a CUDA device before it takes these kernels",
)


def install() -> None:
    """Sets the guard, once in a process."""
    _GUARD.install()
