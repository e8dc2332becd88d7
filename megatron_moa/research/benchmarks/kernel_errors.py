"""Measures a backend's errors against float64, beside those of the reference in the same dtype.

What the tests, the benchmarks and the GPU suite hold backends to: an error of at most twice what PyTorch's own
functions have in the same dtype, plus a floor of a few roundings, for the result and for every gradient. A bias'
gradient is held to a linear layer's own, which adds up gradients that are rounded already.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.mixture import functional
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.triton_backend.tile_sizes import exact_everywhere

ALLOWED = 2.0  # times the error of PyTorch in the same dtype

# Errors are relative to a tensor's largest entry. The floors are 16 roundings of float32 (activations share terms of a
# few roundings each, sums over a row and over tokens are taken in another order), half a rounding of the others (which
# round once, from float32).
FLOORS = {torch.float32: 16 * 2.0**-24, torch.float16: 0.5 * 2.0**-11, torch.bfloat16: 0.5 * 2.0**-8}
# Of gradients that are float32 although bfloat16 went in (of coefficients and of a token's scale), where the kernels
# approximate: rounding the gradient that came in to bfloat16 has cost as much already (tests/mixture/
# test_approximations.py).
_APPROXIMATED_FLOOR = 2.0**-9
# Triton's interpreter cuts float32 off to bfloat16, where GPUs round: by up to 2^-7 of an entry.
_INTERPRETED_FLOOR = 2.0**-7
# For the result of a gate by Triton's kernel on a GPU: its sum over h, which PyTorch adds in an order that loses less.
# Tensor cores take 8 exact products of half precision at a time and cut the sum off, always towards zero: an error that
# grows with h, at most 0.77 of this for all gates and forms, h 512 to 4096 (tests/research/test_kernel_errors.py). In
# float32 products are added one by one, and each sum is rounded: a random walk; an H200 took 0.45 of this.
_CUT_OFF = 2.0**-28  # times h
_WALK = 2.0**-24  # times the square root of h


class AccuracyError(Exception):
    """A backend is less accurate than it may be; the text says where, and by how much."""


@dataclass(frozen=True)
class Accuracy:
    """One tensor's errors: largest difference to float64 over float64's largest entry.

    Attributes:
        name: what was computed, and which tensor of it.
        error: the backend's.
        same_dtype_error: the reference's, in the dtype of the backend.
        floor: added to what is allowed.
    """

    name: str
    error: float
    same_dtype_error: float
    floor: float

    @property
    def limit(self) -> float:
        """The largest error allowed."""
        return ALLOWED * self.same_dtype_error + self.floor

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.limit


def require(checks: Iterable[Accuracy]) -> None:
    """Raises AccuracyError for the first check that is not ok."""
    for check in checks:
        if not check.ok:
            raise AccuracyError(f"{check.name}: error {check.error:.1e}, allowed {check.limit:.1e}")


def check_mixture(
    mixture: MixtureConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    tokens: int = 257,
    width: int = 512,
    bias: bool = False,
    scale: bool = False,
    groups: int = 0,
    seed: int = 1,
) -> list[Accuracy]:
    """Result and gradients of mixed_activation with a mixture's backend, on random numbers.

    Args:
        tokens: t; 0 is allowed.
        width: f.
        bias: adds a bias before the activations.
        scale: multiplies each token's result.
        groups: with LA, experts with coefficients of their own; the second one has no tokens.
    """
    random = _Random(dtype, device, seed)
    shape = {"moa": (tokens,), "la": (groups,) if groups else ()}[mixture.kind]
    inputs = {
        "preactivation": random.normal(tokens, 2 * width if mixture.gated else width),
        "coefficients": random.normal(*shape, mixture.num_coefficients, dtype=torch.float32),
        "bias": random.normal(2 * width if mixture.gated else width) if bias else None,
        "per_token_scale": random.normal(tokens, dtype=torch.float32) if scale else None,
    }
    group_ends = _group_ends(tokens, groups, device) if groups else None

    def mixed(mixture: MixtureConfig, inputs: dict[str, Tensor | None]) -> Tensor:
        return functional.mixed_activation(mixture=mixture, group_ends=group_ends, **inputs)

    name = f"{mixture.kind} {mixture.form} {_short(dtype)} [{tokens}, {width}] {_backend(mixture, device)}"
    return _compare(name, mixed, mixture, inputs, random.normal(tokens, width).detach())


def check_gate(
    mixture: MixtureConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    tokens: int = 257,
    hidden: int = 256,
    groups: int = 0,
    scale: bool = False,
    seed: int = 1,
) -> list[Accuracy]:
    """Result and gradients of gate_coefficients with a mixture's gate and backend, on random numbers.

    Args:
        tokens: t; 0 is allowed.
        hidden: h.
        groups: experts with gates of their own; the second one has no tokens.
        scale: multiplies all coefficients by a constant.
    """
    random = _Random(dtype, device, seed)
    n = mixture.num_coefficients
    shape = (groups, n) if groups else (n,)
    inputs = {
        "x": random.normal(tokens, hidden),
        "weight": random.normal(*shape, hidden, std=hidden**-0.5),
        "bias": random.normal(*shape) if mixture.gate_bias else None,
        "amplitude": random.normal(*shape) if mixture.amplitude == "learned" else None,
    }
    group_ends = _group_ends(tokens, groups, device) if groups else None
    constant = torch.tensor([0.25], device=device) if scale else None

    def coefficients(mixture: MixtureConfig, inputs: dict[str, Tensor | None]) -> Tensor:
        return functional.gate_coefficients(mixture=mixture, scale=constant, group_ends=group_ends, **inputs)

    settings = f"{mixture.gate}{'+bias' * mixture.gate_bias}{'+amplitude' * (mixture.amplitude == 'learned')}"
    name = f"gate {settings} {mixture.form} {_short(dtype)} [{tokens}, {hidden}] {_backend(mixture, device)}"
    checks = _compare(name, coefficients, mixture, inputs, random.normal(tokens, n, dtype=torch.float32).detach())
    result, *gradients = checks
    return [dataclasses.replace(result, floor=result.floor + _sum_floor(mixture, dtype, device, hidden)), *gradients]


class _Random:
    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)  # the CPU's, for the same numbers everywhere

    def normal(self, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
        numbers = std * torch.randn(shape, generator=self.generator)
        return numbers.to(self.device, dtype or self.dtype).requires_grad_()


def _group_ends(tokens: int, groups: int, device: torch.device | str) -> Tensor:
    ends = [tokens // 3] * (groups - 1) + [tokens]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _compare(
    name: str,
    function: Callable[[MixtureConfig, dict[str, Tensor | None]], Tensor],
    mixture: MixtureConfig,
    inputs: dict[str, Tensor | None],
    grad: Tensor,
) -> list[Accuracy]:
    eager = dataclasses.replace(mixture, backend="eager")
    wide = {
        key: None if tensor is None else tensor.detach().double().requires_grad_() for key, tensor in inputs.items()
    }
    exact = _result_and_gradients(function, eager, wide, grad.double())
    same_dtype = _result_and_gradients(function, eager, inputs, grad)
    if "preactivation" in same_dtype and "bias" in same_dtype:
        rounded = same_dtype["preactivation"]
        total = torch.promote_types(rounded.dtype, torch.float32)
        same_dtype["bias"] = rounded.sum(0, dtype=total).to(rounded.dtype)
    actual = _result_and_gradients(function, mixture, inputs, grad)
    approximated = (
        _backend(mixture, grad.device) == "triton" and grad.dtype == torch.bfloat16 and not exact_everywhere()
    )
    if actual.keys() != exact.keys():
        raise AccuracyError(f"{name}: gradients of {', '.join(actual)}, expected of {', '.join(exact)}")
    return [
        Accuracy(
            f"{name} {key}",
            _relative_error(actual[key], expected),
            _relative_error(same_dtype[key], expected),
            _floor(actual[key], approximated and key in ("coefficients", "per_token_scale")),
        )
        for key, expected in exact.items()
    ]


def _result_and_gradients(
    function: Callable[[MixtureConfig, dict[str, Tensor | None]], Tensor],
    mixture: MixtureConfig,
    inputs: dict[str, Tensor | None],
    grad: Tensor,
) -> dict[str, Tensor]:
    given = {key: tensor for key, tensor in inputs.items() if tensor is not None}
    copies = {key: tensor.detach().clone().requires_grad_() for key, tensor in given.items()}
    result = function(mixture, {**inputs, **copies})
    # The constant activation takes no part in a gradient: zeros.
    gradients = torch.autograd.grad(result, list(copies.values()), grad, materialize_grads=True, allow_unused=True)
    for key, gradient in zip(copies, gradients, strict=True):
        if gradient.dtype != copies[key].dtype or gradient.shape != copies[key].shape:
            raise AccuracyError(f"gradient of {key}: {gradient.dtype} {tuple(gradient.shape)}")
    return {"result": result.detach(), **dict(zip(copies, gradients, strict=True))}


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual.double() - exact).abs().max() / largest).item()


def _floor(tensor: Tensor, approximated: bool) -> float:
    if approximated and tensor.dtype == torch.float32:
        return _APPROXIMATED_FLOOR
    if tensor.dtype == torch.bfloat16 and tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return _INTERPRETED_FLOOR
    return FLOORS[tensor.dtype]


def _sum_floor(mixture: MixtureConfig, dtype: torch.dtype, device: torch.device | str, hidden: int) -> float:
    if torch.device(device).type != "cuda" or _backend(mixture, device) != "triton":
        return 0.0
    return hidden**0.5 * _WALK if dtype == torch.float32 else hidden * _CUT_OFF


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backend(mixture: MixtureConfig, device: torch.device | str) -> str:
    return functional.resolve_backend(mixture.backend, torch.device(device).type)
