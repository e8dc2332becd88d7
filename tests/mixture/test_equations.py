"""Compares every form with the paper's equations 3 to 10 (tests/support/equations.py).

Compared are values, gradients, and SwiGLU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.mixture import reference
from megatron_moa.mixture.activations import ACTIVATIONS
from megatron_moa.mixture.config import DICTIONARIES, FORMS, GATES, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, mixed_activation
from megatron_moa.research.benchmarks import kernel_errors
from tests.support import equations
from tests.support.layers import build_feed_forward, make_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "compile", "triton")
SEVEN = ("gelu", "silu", "relu2", "leaky_relu", "tanh", "relu", "identity")
GATED = ("one-sided", "bi-sided", "quadratic")
# LA, and MoA with each gate; a softmax over one entry is a constant, which MixtureConfig refuses.
SOURCES = [(k, gate) for k in (1, 2, 4, 7) for gate in (None, *GATES) if (k, gate) != (1, "softmax")]

T, H, FFN = 3, 6, 5


def config(form: str, k: int, gate: str | None, backend: str = "eager") -> MixtureConfig:
    source = {"kind": "la"} if gate is None else {"gate": gate}
    return MixtureConfig(form=form, activations=SEVEN[:k], backend=backend, **source)


def make_weights(mixture: MixtureConfig, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draws tokens, W1 and W2 as fc1, the down projection, and the mixing's parameters, all from N(0, 1).

    The mixing's parameters are LA's coefficients or MoA's gate vectors.
    """
    generator = torch.Generator().manual_seed(4)
    n, halves = mixture.num_coefficients, 2 if mixture.gated else 1
    shapes = {"x": (T, H), "fc1": (halves * FFN, H), "fc2": (H, FFN)}
    shapes["mixing"] = (n,) if mixture.kind == "la" else (n, H)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def feed_forward(mixture: MixtureConfig, x: Tensor, fc1: Tensor, fc2: Tensor, source: Tensor) -> Tensor:
    """The layer by this package's functions."""
    coefficients = source if mixture.kind == "la" else gate_coefficients(x, source, mixture)
    return mixed_activation(x @ fc1.T, coefficients, mixture) @ fc2.T


def expected(mixture: MixtureConfig, weights: dict[str, Tensor]) -> np.ndarray:
    arrays = [tensor.detach().double().cpu().numpy() for tensor in weights.values()]
    gate = None if mixture.kind == "la" else mixture.gate
    return equations.feed_forward(mixture.form, mixture.activations, gate, *arrays)


def error(actual: Tensor, right: np.ndarray) -> float:
    """Largest difference over the largest entry."""
    assert actual.shape == right.shape
    return float(np.abs(actual.detach().double().cpu().numpy() - right).max() / np.abs(right).max())


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_coefficients_is_the_paper_s(form: str) -> None:
    for k in (1, 2, 4, 7):
        n = {"type1": k, "one-sided": k, "bi-sided": 2 * k, "quadratic": k * (k + 1) // 2}[form]
        mixture = config(form, k, None)
        assert mixture.num_coefficients == len(mixture.coefficient_names) == n
        assert equations.number_of_coefficients(form, k) == n


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_is_the_equation(backend: str, form: str) -> None:
    """Float64 is for checks: by design every backend computes it as the reference does."""
    for k, gate in SOURCES:
        mixture = config(form, k, gate, backend)
        weights = make_weights(mixture)
        assert error(feed_forward(mixture, *weights.values()), expected(mixture, weights)) < 1e-12, (k, gate)


@pytest.mark.parametrize("form", FORMS)
def test_megatron_s_layer_is_the_equation(form: str, megatron: None) -> None:
    for gate in (None, *GATES):
        mixture = dataclasses.replace(config(form, 4, gate), activations=DICTIONARIES[form])
        settings = {"hidden_size": H, "num_attention_heads": 1, "ffn_hidden_size": FFN}
        layer = build_feed_forward(make_config(mixture.gated, **settings), mixture).double()
        weights = make_weights(mixture)
        (source,) = layer.coefficients.parameters()
        with torch.no_grad():
            layer.linear_fc1.weight.copy_(weights["fc1"])
            layer.linear_fc2.weight.copy_(weights["fc2"])
            source.copy_(weights["mixing"])
        out = layer(weights["x"][:, None])[0][:, 0]
        assert error(out, expected(mixture, weights)) < 1e-12, gate


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [pytest.param("compile", marks=pytest.mark.full), "triton"])
def test_the_fused_backends_in_float32_are_the_equation(backend: str, form: str) -> None:
    """Compares the fused backends with the equation, to what kernel_errors.py allows in float32.

    That is twice the error of PyTorch's own functions, and 16 roundings.
    """
    # torch.compile takes seconds for each dictionary and source of coefficients.
    for k, gate in [(3, None), (3, "sigmoid")] if backend == "compile" else SOURCES:
        mixture = config(form, k, gate, backend)
        weights = make_weights(mixture, torch.float32)
        right = expected(mixture, weights)
        eager = error(feed_forward(dataclasses.replace(mixture, backend="eager"), *weights.values()), right)
        limit = kernel_errors.ALLOWED * eager + kernel_errors.FLOORS[torch.float32]
        assert error(feed_forward(mixture, *weights.values()), right) <= limit < 1e-5, (k, gate)


@pytest.mark.parametrize("form", FORMS)
def test_every_activation_bias_and_scale_are_in_the_equation(form: str) -> None:
    for names in (tuple(ACTIVATIONS), *((name,) for name in ACTIVATIONS)):
        for source in ("la", "moa"):
            mixture = MixtureConfig(kind=source, form=form, activations=names, backend="eager")
            generator = torch.Generator().manual_seed(3)
            width, leading = FFN * (2 if mixture.gated else 1), (T,) if source == "moa" else ()
            shapes = ((T, width), (*leading, mixture.num_coefficients), (width,), (T,))
            z, c, bias, scale = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
            right = equations.mixed(form, names, c.numpy(), (z + bias).numpy()) * scale.numpy()[:, None]
            assert error(mixed_activation(z, c, mixture, bias, scale), right) < 1e-12, (names, source)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [None, *GATES])
def test_gradients_are_those_of_finite_differences(gate: str | None, form: str) -> None:
    mixture = dataclasses.replace(config(form, 4, gate), activations=DICTIONARIES[form])
    weights = make_weights(mixture)
    assert torch.autograd.gradcheck(lambda *tensors: feed_forward(mixture, *tensors), tuple(weights.values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_learned_amplitudes_scale_gates_that_are_one_at_zero(gate: str, form: str) -> None:
    """c_k = a_k psi_hat(l_k), psi_hat = psi / psi(0), for tanh 1 + psi: ours, not the paper's."""
    mixture = MixtureConfig(form=form, gate=gate, activations=SEVEN[:3], amplitude="learned")
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(T, mixture.num_coefficients, generator=generator, dtype=torch.float64)
    a = torch.randn(mixture.num_coefficients, generator=generator, dtype=torch.float64)
    psi = np.array([equations.phi(gate, form, row) for row in logits.tolist()])
    at_zero = np.array(equations.phi(gate, form, [0.0] * mixture.num_coefficients))
    hat = 1 + psi if gate == "tanh" else psi / at_zero
    assert error(reference.gate(logits, mixture, a), a.numpy() * hat) < 1e-12
    zeros = reference.gate(torch.zeros_like(logits), mixture, a)
    torch.testing.assert_close(zeros, a.expand(T, -1), rtol=1e-15, atol=0)


# SwiGLU is a member of each gated form.


def swiglu_coefficients(mixture: MixtureConfig) -> Tensor:
    """One-hot: silu on W1's branch and identity on W2's, each where the default dictionary has it."""
    names, k = mixture.activations, mixture.num_activations
    silu, identity = names.index("silu"), names.index("identity")
    ones = {
        "one-sided": [identity],
        "bi-sided": [silu, k + identity],
        # The pairs of gelu come first, then (silu, silu), (silu, relu2), (silu, identity).
        "quadratic": [k + identity - silu],
    }[mixture.form]
    one_hot = torch.zeros(mixture.num_coefficients, device=DEVICE)
    one_hot[ones] = 1.0
    return one_hot


def preactivation(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fc1's output [W1 x, W2 x] and a gradient of the result."""
    generator = torch.Generator().manual_seed(6)
    z, grad = (3 * torch.randn(T, width, generator=generator, dtype=torch.float64) for width in (42, 21))
    return z.to(DEVICE, dtype).requires_grad_(), grad.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", GATED)
def test_swiglu_is_contained_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    """LA, and gates of learned amplitude with vectors of zero, over the form's default dictionary."""
    z, grad = preactivation(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y, linear = z.to(wide).chunk(2, dim=-1)  # bf16 is rounded once, at the end
    swiglu = (F.silu(y) * linear).to(dtype)
    right = swiglu, *torch.autograd.grad(swiglu, z, grad)
    for gate in (None, *GATES):
        source = {"kind": "la"} if gate is None else {"gate": gate, "amplitude": "learned"}
        mixture = MixtureConfig(form=form, backend="eager", **source)
        coefficients = swiglu_coefficients(mixture).to(wide)
        if gate is not None:
            x = torch.ones(T, 4, dtype=dtype, device=DEVICE)
            vectors = torch.zeros(mixture.num_coefficients, 4, dtype=dtype, device=DEVICE)
            coefficients = gate_coefficients(x, vectors, mixture, amplitude=coefficients)
        out = mixed_activation(z, coefficients, mixture)
        for actual, its in zip((out, *torch.autograd.grad(out, z, grad)), right, strict=True):
            assert torch.equal(actual, its), gate


@pytest.mark.parametrize(
    ("backend", "dtype", "activations"),
    [
        ("triton", torch.float32, ()),
        ("triton", torch.bfloat16, ()),
        pytest.param("compile", torch.float32, ("gelu", "silu", "identity"), marks=pytest.mark.full),
        pytest.param("compile", torch.float32, (), marks=pytest.mark.full),  # compiles for minutes
    ],
)
def test_swiglu_by_a_fused_backend_has_the_same_bits_in_every_form(
    backend: str, dtype: torch.dtype, activations: tuple[str, ...]
) -> None:
    """Compares SwiGLU's bits in every form with the backend's one-sided form over identity alone.

    The latter is SwiGLU. Activations () are the form's dictionary.
    """
    z, grad = preactivation(dtype)

    def result(mixture: MixtureConfig, one_hot: Tensor) -> tuple[Tensor, ...]:
        out = mixed_activation(z, one_hot.expand(T, -1), mixture)
        return out, *torch.autograd.grad(out, z, grad)

    alone = MixtureConfig(form="one-sided", activations=("identity",), backend=backend)
    right = result(alone, torch.ones(1, device=DEVICE))
    y, linear = z.detach().double().chunk(2, dim=-1)
    # 16 roundings of float32; Triton's interpreter cuts bfloat16 off.
    tolerance = {torch.float32: 16 * 2.0**-24, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(right[0].double(), F.silu(y) * linear, rtol=tolerance, atol=tolerance)
    for form in GATED:
        mixture = MixtureConfig(form=form, activations=activations, backend=backend)
        for actual, its in zip(result(mixture, swiglu_coefficients(mixture)), right, strict=True):
            assert torch.equal(actual, its), form
