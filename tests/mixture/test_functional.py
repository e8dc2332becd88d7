"""Tests mixed_activation: finite differences, odd shapes, compilations, mistakes.

Values are in test_equations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.mixture import autograd, functional, reference
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, gated_mixture, mixed_activation, resolve_backend

# relu2 and relu3 have continuous derivatives; finite differences need points off the kinks of the others.
SMOOTH = ("identity", "gelu", "silu", "relu2", "tanh", "mish")


def make_inputs(mixture: MixtureConfig, tokens: tuple[int, ...], f: int, dtype: torch.dtype = torch.float64) -> dict:
    """Draws random inputs, with gradients asked for.

    Coefficients are in float32 for half precision, as layers give them.
    """
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    width = 2 * f if mixture.gated else f
    coefficient_dtype = torch.promote_types(dtype, torch.float32)
    leading = tokens if mixture.kind == "moa" else ()
    return {
        "preactivation": normal(*tokens, width),
        "coefficients": normal(*leading, mixture.num_coefficients, dtype=coefficient_dtype),
        "bias": normal(width),
        "per_token_scale": normal(*tokens, dtype=coefficient_dtype),
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry; NaN and unwritten outputs fail."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("mixing_name", ["moa", "la"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, mixing_name: str) -> None:
    activations = SMOOTH[2:5] if form == "quadratic" else SMOOTH
    mixture = MixtureConfig(kind=mixing_name, form=form, activations=activations, backend="eager")
    inputs = make_inputs(mixture, (4,), 3)
    assert torch.autograd.gradcheck(lambda z, c, b, s: mixed_activation(z, c, mixture, b, s), tuple(inputs.values()))


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck_of_gates(gate: str) -> None:
    mixture = MixtureConfig(gate=gate, amplitude="learned", activations=SMOOTH[:3])
    logits = torch.randn(3, mixture.num_coefficients, dtype=torch.float64, requires_grad=True)
    amplitude = torch.randn(mixture.num_coefficients, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: reference.gate(x, mixture, a), (logits, amplitude))
    fixed = MixtureConfig(gate=gate, activations=SMOOTH[:3])
    assert torch.autograd.gradcheck(lambda x: reference.gate(x, fixed), (logits,))


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.full), "triton"])
def test_odd_empty_and_strided_inputs(backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), backend=backend)
    eager = MixtureConfig(activations=("silu", "tanh"), backend="eager")
    for tokens, f in [((0,), 4), ((1,), 4), ((2, 0), 3), ((1, 1), 1), ((3,), 7)]:
        inputs = make_inputs(mixture, tokens, f, torch.float32)
        out = mixed_activation(mixture=mixture, **inputs)
        out.sum().backward()
        assert out.shape == (*tokens, f)
        assert relative_error(out, mixed_activation(mixture=eager, **inputs)) < 1e-6
        assert all(tensor.grad.isfinite().all() for tensor in inputs.values())
    inputs = make_inputs(mixture, (6,), 4, torch.float32)
    strided = {
        "preactivation": torch.randn(8, 12).t()[::2],  # [6, 8], neither contiguous nor dense
        "coefficients": torch.randn(4, 6).t(),
        "per_token_scale": torch.randn(12)[::2],
    }
    out = mixed_activation(mixture=mixture, **strided)
    contiguous = {name: tensor.contiguous() for name, tensor in strided.items()}
    assert relative_error(out, mixed_activation(mixture=eager, **contiguous)) < 1e-6


@pytest.mark.full
def test_changing_token_counts_and_evaluation_compile_once() -> None:
    from torch._dynamo.utils import counters

    mixture = MixtureConfig(activations=("silu", "relu2"), backend="compile")
    whole = make_inputs(mixture, (400,), 24, torch.float32)

    def run(start: int, tokens: int) -> None:
        """Tokens of one expert among all tokens: the scales are a view with an offset."""
        z, c, scale = (
            whole[name][start : start + tokens] for name in ("preactivation", "coefficients", "per_token_scale")
        )
        mixed_activation(z.contiguous(), c.contiguous(), mixture, whole["bias"], scale).sum().backward()

    run(0, 48)
    before = counters["stats"]["unique_graphs"]
    for start, tokens in ((0, 47), (47, 96), (200, 5), (205, 128), (333, 2)):
        run(start, tokens)
    with torch.no_grad():
        mixed_activation(mixture=mixture, **whole)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.full)])
def test_frozen_inputs_get_no_gradient(backend: str) -> None:
    mixture = MixtureConfig(kind="la", activations=("silu", "relu"), backend=backend)
    inputs = make_inputs(mixture, (4,), 3, torch.float32)
    inputs["coefficients"].requires_grad = False
    inputs["bias"] = inputs["per_token_scale"] = None
    mixed_activation(mixture=mixture, **inputs).sum().backward()
    assert inputs["preactivation"].grad is not None
    assert inputs["coefficients"].grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preactivation": torch.zeros(3, 5)}, r"preactivation \(3, 5\): bi-sided needs two halves"),
        ({"coefficients": torch.zeros(3, 6)}, r"coefficients \(3, 6\).*\[4\] or \[3, 4\]"),
        ({"bias": torch.zeros(7)}, r"bias \(7,\): needs \[8\]"),
        ({"per_token_scale": torch.zeros(4)}, r"per_token_scale \(4,\): needs \[3\]"),
    ],
)
def test_shapes_that_do_not_fit(change: dict, message: str) -> None:
    mixture = MixtureConfig(activations=("silu", "relu"), backend="eager")
    inputs = {"preactivation": torch.zeros(3, 8), "coefficients": torch.zeros(3, 4), **change}
    with pytest.raises(ValueError, match=message):
        mixed_activation(mixture=mixture, **inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_not_of_floating_point_are_refused(dtype: torch.dtype) -> None:
    mixture = MixtureConfig(activations=("silu", "relu"), amplitude="learned", backend="eager")
    shapes = {
        mixed_activation: {"preactivation": (3, 8), "coefficients": (3, 4), "bias": (8,), "per_token_scale": (3,)},
        gate_coefficients: {"x": (3, 6), "weight": (4, 6), "bias": (4,), "amplitude": (4,), "scale": (1,)},
    }
    for function, shape in shapes.items():
        inputs = {name: torch.ones(size) for name, size in shape.items()}
        function(mixture=mixture, **inputs)
        for name, tensor in inputs.items():
            with pytest.raises(TypeError, match=rf"^{name} of {dtype}: give a tensor of floating point, such as"):
                function(mixture=mixture, **{**inputs, name: tensor.to(dtype)})


@pytest.mark.parametrize("backend", ["eager", "triton", pytest.param("compile", marks=pytest.mark.full)])
def test_autocast_has_no_say(backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), gate_bias=True, backend=backend)
    x, weight, bias, z = (torch.randn(shape) for shape in ((5, 6), (4, 6), (4,), (5, 8)))
    gate = autograd.GateInputs(x, weight, bias)

    def computed() -> list[Tensor]:
        coefficients = gate_coefficients(x, weight, mixture, bias)
        return [coefficients, mixed_activation(z, coefficients, mixture), *gated_mixture(z, gate, mixture)]

    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
        assert torch.mm(x, x.t()).dtype == torch.bfloat16  # and goes on afterwards
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=pytest.mark.full)])
def test_autocast_has_no_say_in_a_backward_that_is_called_under_it(backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), amplitude="learned", backend=backend)
    x, weight, amplitude = (torch.randn(shape, requires_grad=True) for shape in ((5, 6), (4, 6), (4,)))

    def gradients() -> tuple[Tensor, ...]:
        coefficients = gate_coefficients(x, weight, mixture, amplitude=amplitude)
        return torch.autograd.grad(coefficients.square().sum(), (x, weight, amplitude))

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compile_is_taken_where_torch_finds_its_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for one name; clang++ beside a missing g++ ended in its error."""
    for name in ("clang++", "other"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for compiler, backend in ((None, "eager"), ("missing", "eager"), ("other", "compile")):
        monkeypatch.delenv("CXX", raising=False)
        if compiler:
            monkeypatch.setenv("CXX", compiler)
        assert resolve_backend.__wrapped__("auto", "cpu") == backend
    assert resolve_backend.__wrapped__("auto", "mps") == "eager"


@pytest.mark.parametrize("function", [gate_coefficients, mixed_activation])
def test_autocast_has_no_say_in_a_graph(function: Callable[..., Tensor]) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"))
    inputs = torch.randn(5, 6), torch.randn((4, 6) if function is gate_coefficients else (4,))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled(*inputs, mixture)
    assert torch.equal(found, function(*inputs, replace(mixture, backend="eager")))


def test_a_second_derivative_is_refused_where_the_gradient_that_comes_in_is_a_constant() -> None:
    mixture = MixtureConfig(form="type1", activations=("silu",), backend="triton")
    z = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixed_activation(z, torch.ones(1), mixture).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; take --moa-backend eager"):
        (z.sum() + gradient.square().sum()).backward()


def test_backends_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    functional.resolve_backend.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"--moa-backend triton: no GPU; .*--moa-backend compile") as error:
        functional.resolve_backend("triton", "cpu")
    assert error.value.__notes__ == ["In Python, of MixtureConfig: --moa-backend is backend"]
    with monkeypatch.context() as patch:
        patch.setattr(functional.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"--moa-backend triton: the package triton is not there"):
            functional.resolve_backend("triton", "cuda")
    monkeypatch.setattr(functional.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--moa-backend compile: .*compiler.*--moa-backend eager"):
        functional.resolve_backend("compile", "cpu")
    assert functional.resolve_backend("auto", "cpu") == "eager"
    functional.resolve_backend.cache_clear()
