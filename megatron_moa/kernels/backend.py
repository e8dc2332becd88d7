"""The ``triton`` backend: see :class:`megatron_moa.fused.Backend`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_moa.config import MixingConfig
from megatron_moa.kernels import gate, mixture, quadratic


def _on_device_of_first_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, which need not be that of the tensors.
    @functools.wraps(function)
    def launch(first: Tensor, *arguments: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return launch


@_on_device_of_first_argument
def mixture_forward(
    z: Tensor, coefficients: Tensor, bias: Tensor | None, scale: Tensor | None, mixing: MixingConfig
) -> Tensor:
    """One launch."""
    return mixture.forward(z, coefficients, bias, scale, mixing)


@_on_device_of_first_argument
def mixture_backward(
    grad: Tensor,
    z: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    mixing: MixingConfig,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One launch (LA: and one sum; quadratic: one more)."""
    kernels = quadratic if mixing.form == "quadratic" else mixture
    return kernels.backward(grad, z, coefficients, bias, scale, mixing, needed)


gate_forward = _on_device_of_first_argument(gate.forward)
gate_backward = _on_device_of_first_argument(gate.backward)
