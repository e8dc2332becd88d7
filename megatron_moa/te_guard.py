"""Keeps Transformer Engine out of a process that has no CUDA device.

Megatron 0.19.2 takes Transformer Engine's optimizer and its kernels for several tensors when it is imported, whatever
``--transformer-impl`` says, and these fail on a CPU. A half-installed Transformer Engine ends Megatron's import with an
error that Megatron does not expect. So its import fails here as that of a missing package does, which Megatron expects.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGE = "transformer_engine"
ALLOW = "MEGATRON_MOA_TE_ON_CPU"  # environment variable: 1 lets it be imported all the same, as tests/te do


class _Refusal(importlib.abc.Loader):
    """Fails in place of the package's own loader."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leaves the module to the import system."""

    def exec_module(self, module: ModuleType) -> None:
        message = f"{PACKAGE} needs a CUDA device, and there is none; megatron_moa runs without it"
        raise ModuleNotFoundError(message, name=PACKAGE)


class _Guard(importlib.abc.MetaPathFinder):
    """Finds the package, so that others may ask whether it is installed, and lets nobody load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE or os.environ.get(ALLOW) == "1":
            return None
        if importlib.machinery.PathFinder.find_spec(fullname, path) is None:
            return None
        import torch  # only here: the guard is set when megatron_moa is imported, which takes no torch

        return None if torch.cuda.is_available() else importlib.machinery.ModuleSpec(fullname, _Refusal())


def install() -> None:
    """Sets the guard, once in a process."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())
