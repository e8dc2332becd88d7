"""The ``triton`` backend: see :class:`megatron_moa.fused.Backend`."""

from __future__ import annotations

from torch import Tensor

from megatron_moa.config import MixingConfig
from megatron_moa.kernels import mixture, quadratic
from megatron_moa.kernels.gate import gate_backward, gate_forward

__all__ = ["gate_backward", "gate_forward", "mixture_backward", "mixture_forward"]


def mixture_forward(
    z: Tensor, coefficients: Tensor, bias: Tensor | None, scale: Tensor | None, mixing: MixingConfig
) -> Tensor:
    """One launch."""
    kernels = quadratic if mixing.form == "quadratic" else mixture
    return kernels.forward(z, coefficients, bias, scale, mixing)


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
