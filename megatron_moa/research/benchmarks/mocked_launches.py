"""Runs the host side of the Triton kernels without a GPU, on tensors of the CPU.

Everything happens but the launches: kernels are compiled for an H100 or H200, and their results are whatever memory
held. For timing what Python takes, and for tests of what would be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from megatron_moa.errors import UserError
from megatron_moa.mixture import functional

Launched = Callable[..., None]  # called with what the compiled kernel's launcher would be


def _nothing(*_: Any) -> None:
    pass


def _triton(*_: Any) -> str:
    return "triton"


@contextlib.contextmanager
def mocked_launches(launched: Launched = _nothing) -> Iterator[None]:
    """Inside, mixtures take the Triton backend on any device.

    Args:
        launched: called at each launch with grid, stream, function, metadata, hooks and the kernel's arguments.

    Raises:
        UserError: Triton runs its interpreter, or is not there.
    """
    try:
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
    except ImportError as error:
        raise UserError(f"Triton is not there ({error}); install the version that torch names") from error
    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET=1: in the interpreter nothing is launched; unset it")
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
    )
    fake = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda *_: launched,
        utils=utils,
    )
    before = driver._active
    driver.set_active(fake)
    try:
        with mock.patch.object(functional, "resolve_backend", _triton):
            yield
    finally:
        driver._active = before
