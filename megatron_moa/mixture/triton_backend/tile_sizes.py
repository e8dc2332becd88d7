"""Fixes tile sizes and warps of the kernels by GPU architecture.

So nothing is tuned in a training. Tuning at run time would break CUDA-graph capture and differ between ranks.
``tools/tune_kernels.py`` measures candidates on the GPU at hand and writes a file; the environment variable
MEGATRON_MOA_KERNELS names it for later runs. Its value may also be ``exact``, or begin with ``exact,``: then bfloat16
is computed to float32's accuracy, too. It is read once, before the first launch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moa.errors import UserError

VARIABLE = "MEGATRON_MOA_KERNELS"


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched.

    Attributes:
        block: columns a program works on at a time; a power of two.
        warps: of 32 threads, per program.
        rows: rows a program of the backward kernels sums LA's gradients over.

    Raises:
        ValueError: for what Triton cannot launch.
    """

    block: int
    warps: int
    rows: int = 8

    def __post_init__(self) -> None:
        for name, least, most in (("block", 32, 65536), ("warps", 1, 32), ("rows", 1, 65536)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} {value!r} is not a power of two from {least} to {most}")


_BLOCKS = (1024, 512, 256)
_WASTE = 0.15  # of a row's last tile that may lie outside the row


def configuration(kernel: str, form: str, f: int, device: torch.device) -> Configuration:
    """The launch configuration of a kernel for rows of f columns.

    Args:
        kernel: ``forward`` or ``backward``.
        form: of the mixture.

    Raises:
        UserError: the file that MEGATRON_MOA_KERNELS names cannot be read.
    """
    key = kernel, form, f
    return _in_use.get(key) or _tuned(setting()[1], architecture(device)).get(key) or default_configuration(kernel, f)


def exact_everywhere() -> bool:
    """Whether kernels compute bfloat16 to float32's accuracy, too."""
    return setting()[0]


@functools.cache
def setting() -> tuple[bool, str]:
    """What MEGATRON_MOA_KERNELS says: whether everything is exact, and the file's path, or nothing."""
    value = os.environ.get(VARIABLE, "")
    first, _, rest = value.partition(",")
    return (True, rest) if first == "exact" else (False, value)


_in_use: dict[tuple[str, str, int], Configuration] = {}


@contextlib.contextmanager
def using(kernel: str, form: str, f: int, chosen: Configuration) -> Iterator[None]:
    """Inside, this configuration is the one: for trying candidates."""
    key = kernel, form, f
    before = _in_use.get(key)
    _in_use[key] = chosen
    try:
        yield
    finally:
        del _in_use[key]
        if before is not None:
            _in_use[key] = before


@functools.cache
def default_configuration(kernel: str, f: int) -> Configuration:
    """Returns the configuration of what has not been tuned.

    A thread has eight columns, few of which lie outside a row of f.
    """
    if kernel == "backward":
        # One warp a row: sums need no barrier and no shared memory, and are taken once for many columns of a thread.
        return Configuration(_BLOCKS[-1], warps=1)
    # Wider tiles leave fewer programs to a multiprocessor, narrower ones waste less of a row.
    for block in _BLOCKS:
        if -f % block <= _WASTE * f:
            return Configuration(block, warps=block // 256)
    return Configuration(_BLOCKS[-1], warps=1)


@functools.cache
def architecture(device: torch.device) -> str:
    """``sm90`` for an H100 or H200; ``cpu`` for Triton's interpreter."""
    if device.type != "cuda":
        return device.type
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _tuned(path: str, architecture: str) -> dict[tuple[str, str, int], Configuration]:
    if not path:
        return {}
    try:
        records: list[dict[str, Any]] = json.loads(Path(path).read_text())[architecture]
        return {(r["kernel"], r["form"], r["f"]): Configuration(r["block"], r["warps"], r["rows"]) for r in records}
    except KeyError as error:
        if error.args[0] == architecture:
            return {}
        raise UserError(
            f"{VARIABLE}={path}: an entry lacks {error}; write the file anew with tools/tune_kernels.py"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{VARIABLE}={path}: {error}; write the file anew with tools/tune_kernels.py") from error
