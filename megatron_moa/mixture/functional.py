"""Offers ``mixed_activation``, ``gate_coefficients``, and both in one, ``gated_mixture``.

Each checks shapes, then calls the fastest backend.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_moa.mixture import autograd, compile_backend, reference
from megatron_moa.mixture.config import MixtureConfig, SettingError

logger = logging.getLogger(__name__)


def mixed_activation(
    preactivation: Tensor,
    coefficients: Tensor,
    mixture: MixtureConfig,
    bias: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """Mixes the dictionary's activations of fc1's output.

    Equations are in :func:`megatron_moa.mixture.reference.mix`.

    Args:
        preactivation: fc1's output, [..., f] for type1, else [..., 2f] (activated branch first); bf16, fp16, fp32
            or fp64.
        coefficients: [..., n] per token (MoA) or [n] for all tokens (LA); [groups, n] with ``group_ends``.
        mixture: form, dictionary and backend.
        bias: fc1's bias, [f] or [2f], added before the activations.
        per_token_scale: [...], multiplies each token's result (a router's probability).
        group_ends: [groups] int32, where tokens are sorted by expert and each expert has coefficients of its own for
            all its tokens (LA): preactivation's rows up to and with each (megatron_moa.mixture.grouped_products).

    Returns:
        [..., f] in preactivation's dtype; half precision is computed in float32 and rounded once. float64 is for
        checks: every backend computes it as the reference does.

    Raises:
        TypeError: a tensor that is not of floating point.
        ValueError: shapes that do not fit together.
        UserError: a backend that is not there, or that cannot do what is done with it (torch.func, torch.jit.trace).
    """
    if (around := _around(mixture, preactivation)) is not None:
        return around(mixed_activation)(preactivation, coefficients, mixture, bias, per_token_scale, group_ends)
    inputs = autograd.MixtureInputs(preactivation, coefficients, bias, per_token_scale)
    _check_dtypes(_MIXTURE_TENSORS, inputs)
    _check_shapes(inputs, mixture, group_ends)
    backend = _fused_backend(mixture, preactivation)
    if backend is None:
        return reference.mixed_activation(preactivation, coefficients, mixture, bias, per_token_scale, group_ends)
    return autograd.mixed_activation(backend, inputs, mixture, group_ends)


def gate_coefficients(
    x: Tensor,
    weight: Tensor,
    mixture: MixtureConfig,
    bias: Tensor | None = None,
    amplitude: Tensor | None = None,
    scale: Tensor | None = None,
    group_ends: Tensor | None = None,
) -> Tensor:
    """Computes the mixing coefficients of every token (MoA).

    The coefficients are c_k = scale psi(u_k x + b_k), or with learned amplitudes c_k = scale a_k psi_hat(u_k x + b_k).
    Equations are in :func:`megatron_moa.mixture.reference.gate`.

    Args:
        x: fc1's input, [..., h]; [t, h] with ``group_ends``.
        weight: u [n, h]; [groups, n, h] with ``group_ends``.
        mixture: psi and backend.
        bias: b [n] ([groups, n]), or None.
        amplitude: a [n] ([groups, n]), or None for fixed amplitude.
        scale: [1], a constant other than 0, or None for 1.
        group_ends: [groups] int32, where tokens are sorted by expert and each expert has a gate of its own: x's rows
            up to and with each (megatron_moa.mixture.grouped_products).

    Returns:
        [..., n], float32 (float64 for float64 parameters) whatever x's dtype is.

    Raises:
        TypeError: a tensor that is not of floating point.
        ValueError: shapes that do not fit together.
        UserError: a backend that is not there, or that cannot do what is done with it (torch.func, torch.jit.trace).
    """
    if (around := _around(mixture, x)) is not None:
        return around(gate_coefficients)(x, weight, mixture, bias, amplitude, scale, group_ends)
    _check_dtypes(_GATE_TENSORS, (x, weight, bias, amplitude, scale))
    inputs = autograd.GateInputs(x, weight, bias, amplitude, scale, group_ends)
    _check_gate(inputs, mixture)
    backend = _fused_backend(mixture, x, weight)
    if backend is None:
        return reference.gate_coefficients(x, weight, mixture, bias, amplitude, scale, group_ends)
    return autograd.gate_coefficients(backend, inputs, mixture)


def gated_mixture(
    preactivation: Tensor,
    gate: autograd.GateInputs,
    mixture: MixtureConfig,
    bias: Tensor | None = None,
    per_token_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes :func:`mixed_activation` with the :func:`gate_coefficients` of ``gate``.

    The two are one function of autograd's.

    Args:
        preactivation: [..., f] or [..., 2f]; further arguments are those of the two.

    Returns:
        The mixture, and the coefficients [..., n], which are for looking at: no gradient flows back through them.

    Raises:
        ValueError: shapes that do not fit together.
        UserError: a backend that is not there, or that cannot do what is done with it (torch.func, torch.jit.trace).
    """
    if (around := _around(mixture, preactivation)) is not None:
        return around(gated_mixture)(preactivation, gate, mixture, bias, per_token_scale)
    if gate.x.shape[:-1] != preactivation.shape[:-1]:
        raise ValueError(
            f"x {tuple(gate.x.shape)}: needs the tokens of preactivation, {[*preactivation.shape[:-1], 'h']}"
        )
    _check_gate(gate, mixture)
    _check_preactivation(preactivation, mixture, bias, per_token_scale)
    backend = _fused_backend(mixture, preactivation, gate.weight)
    if backend is None:
        coefficients = reference.gate_coefficients(*gate[:2], mixture, *gate[2:])
        out = reference.mixed_activation(preactivation, coefficients, mixture, bias, per_token_scale)
        return out, coefficients.detach()
    return autograd.gated_mixture(backend, gate, preactivation, mixture, bias, per_token_scale)


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _around(mixture: MixtureConfig, tensor: Tensor) -> _Decorator | None:
    """Returns the decorator that a public function must be called under; None in most calls.

    There are two. While torch.compile traces, a backend that is named (triton, compile) ends the graph and runs outside
    of it; with auto and eager the reference is traced, and torch.compile fuses it. Under autocast the call runs with
    autocast off: it would round the gates' logits, and backends round once, at the end.

    Raises:
        SettingError: such a backend in torch.export that is not strict, which cannot leave the graph.
    """
    if torch.compiler.is_compiling() and mixture.backend in ("triton", "compile"):
        if not torch.compiler.is_dynamo_compiling():  # torch.export, not strict, which has no way out of the graph
            raise SettingError(f"--moa-backend {mixture.backend}: cannot be exported as a graph; take auto or eager")
        return _outside
    if torch._C._is_any_autocast_enabled():  # which costs a tenth of asking for a device's
        device = tensor.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has no autocast
            return functools.partial(_without_autocast, device)
    return None


@functools.cache
def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not at import: it imports the compiler.
    return torch.compiler.disable(function)


def _without_autocast(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return call


def _fused_backend(mixture: MixtureConfig, tensor: Tensor, weight: Tensor | None = None) -> autograd.Backend | None:
    """Returns the module of the backend, or None where the reference computes.

    None is for eager. Whatever backend is named, None is also for what runs inside a graph, for tensors that are shapes
    alone (on the meta device, fake), and for float64, which is for checks and has the reference only.
    """
    if torch.compiler.is_compiling():
        check_overwrite(mixture, "eager")
        return None
    if tensor.is_meta or type(tensor) is FakeTensor:
        return None
    name = resolve_backend(mixture.backend, tensor.device.type)
    check_overwrite(mixture, name)
    if name == "eager" or torch.float64 in (tensor.dtype, tensor.dtype if weight is None else weight.dtype):
        return None
    # The first is what decides whether an autograd function refuses to be called.
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        raise autograd.unserved(mixture)
    if name == "compile":
        return compile_backend
    return _triton_backend()


@functools.cache
def _triton_backend() -> autograd.Backend:
    from megatron_moa.mixture.triton_backend import backend  # here, since it needs Triton

    return backend


# gated_mixture does not check dtypes: layers alone call it, with the outputs of linear layers.
_MIXTURE_TENSORS = ("preactivation", "coefficients", "bias", "per_token_scale")
_GATE_TENSORS = ("x", "weight", "bias", "amplitude", "scale")


def _check_dtypes(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    for position, tensor in enumerate(tensors):  # zip is slower
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(
                f"{names[position]} of {tensor.dtype}: give a tensor of floating point, such as torch.float32"
            )


def _check_gate(gate: autograd.GateInputs, mixture: MixtureConfig) -> None:
    x, weight, bias, amplitude, scale, group_ends = gate
    n = mixture.num_coefficients
    groups = () if group_ends is None else (group_ends.shape[0],)
    if weight.shape != (*groups, n, x.shape[-1]):
        raise ValueError(
            f"weight {tuple(weight.shape)}: {mixture.form} over {mixture.num_activations} activations needs "
            f"{[*groups, n, x.shape[-1]]} for x {tuple(x.shape)}"
        )
    if groups and x.dim() != 2:
        raise ValueError(f"x {tuple(x.shape)}: needs two dimensions with group_ends")
    for name, parameter in (("bias", bias), ("amplitude", amplitude)):
        if parameter is not None and parameter.shape != (*groups, n):
            raise ValueError(f"{name} {tuple(parameter.shape)}: needs {[*groups, n]}")
    if scale is not None and scale.shape != (1,):
        raise ValueError(f"scale {tuple(scale.shape)}: needs [1]")


def _check_shapes(inputs: autograd.MixtureInputs, mixture: MixtureConfig, group_ends: Tensor | None) -> None:
    preactivation, coefficients, bias, per_token_scale = inputs
    tokens = preactivation.shape[:-1]
    n = mixture.num_coefficients
    if group_ends is not None:
        groups = group_ends.shape[0]
        if coefficients.shape != (groups, n) or len(tokens) != 1:
            raise ValueError(
                f"coefficients {tuple(coefficients.shape)}: {groups} groups need [{groups}, {n}], and preactivation "
                f"{tuple(preactivation.shape)} two dimensions"
            )
    elif coefficients.shape not in ((n,), (*tokens, n)):
        raise ValueError(
            f"coefficients {tuple(coefficients.shape)}: {mixture.form} over {mixture.num_activations} activations "
            f"needs [{n}] or {[*tokens, n]} for preactivation {tuple(preactivation.shape)}"
        )
    _check_preactivation(preactivation, mixture, bias, per_token_scale)


def _check_preactivation(
    preactivation: Tensor, mixture: MixtureConfig, bias: Tensor | None, per_token_scale: Tensor | None
) -> None:
    tokens, width = preactivation.shape[:-1], preactivation.shape[-1]
    if mixture.gated and width % 2:
        raise ValueError(f"preactivation {tuple(preactivation.shape)}: {mixture.form} needs two halves, [..., 2f]")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias {tuple(bias.shape)}: needs [{width}], preactivation's last size")
    if per_token_scale is not None and per_token_scale.shape != tokens:
        raise ValueError(f"per_token_scale {tuple(per_token_scale.shape)}: needs {list(tokens)}, one per token")


def check_overwrite(mixture: MixtureConfig, backend: str) -> None:
    """Raises UserError if the gradient shall be written in place and the backend cannot."""
    if mixture.overwrite and backend != "triton":
        raise SettingError(
            f"--moa-overwrite-preactivation: the {backend} backend does not write in place, only the Triton kernels "
            "do; drop the flag"
        )


@functools.cache
def resolve_backend(backend: str, device_type: str) -> str:
    """Returns the name of the backend that runs.

    ``auto`` takes ``triton`` on GPUs, ``compile`` on CPUs, ``eager`` on other devices; without a compiler ``eager``,
    and logs that.

    Raises:
        UserError: for a backend asked for by name that is not there.
    """
    if backend == "eager" or (backend == "auto" and device_type not in ("cuda", "cpu")):
        return "eager"
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "triton" or (backend == "auto" and device_type == "cuda" and has_triton):
        if not has_triton:
            raise SettingError("--moa-backend triton: the package triton is not there; install it, or take auto")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise SettingError(
                "--moa-backend triton: no GPU; take --moa-backend compile, or set TRITON_INTERPRET=1 to run the "
                "kernels in Triton's interpreter, for tests"
            )
        return "triton"
    missing = _missing_compiler(device_type)
    if missing is None:
        return "compile"
    if backend == "compile":
        raise SettingError(f"--moa-backend compile: {missing}; install it, or take --moa-backend eager")
    logger.warning("mixture of activations: %s, so it runs in eager PyTorch (slower, more memory)", missing)
    return "eager"


def _missing_compiler(device_type: str) -> str | None:
    """What torch.compile lacks on this kind of device, or None."""
    if device_type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs the package triton on GPUs"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # what torch.compile takes
    if not shutil.which(compiler):
        return f"torch.compile needs a C++ compiler, {compiler or 'which CXX names'}, on PATH"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        return "torch.compile needs Python's headers (python3-dev)"
    return None
