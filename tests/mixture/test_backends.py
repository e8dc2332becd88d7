"""Tests the fused backends: errors against float64, bit-equal gradients, what is saved for backward.

Inputs have odd shapes and strides, too.

Without a GPU the Triton kernels run in Triton's interpreter, a row at a time in numpy, so sizes here are small where it
is; tests/test_gpu.py has the same checks on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.mixture import config, lowering, reference
from megatron_moa.mixture.activations import ACTIVATIONS
from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, gated_mixture, mixed_activation, resolve_backend
from megatron_moa.mixture.triton_backend import mixture as mixture_kernels
from megatron_moa.research.benchmarks import kernel_errors
from megatron_moa.research.benchmarks.peak_memory import saved_for_backward
from tests.support.training import SWIGLU, train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "compile")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = ("gelu", "silu", "relu2", "tanh")
FULL = pytest.mark.full
EXPERTS_OFTEN = [("triton", "bi-sided"), ("triton", "quadratic")]
SIZES = (0, 1, 3, 35, *(pytest.param(size, marks=FULL) for size in (1000, 4097)))


def mixtures(
    *compiled: str, forms: tuple[str, ...] = FORMS, kinds: tuple[str, ...] = ("moa", "la")
) -> pytest.MarkDecorator:
    """Parametrizes a test by each backend, form and kind.

    torch.compile takes seconds for each: of its cases, `make test` runs those that ``compiled`` names.
    """
    cases = []
    for backend, form, kind in itertools.product(BACKENDS, FORMS, ("moa", "la")):
        often = form in forms and kind in kinds if backend == "triton" else f"{form} {kind}" in compiled
        cases.append(pytest.param(backend, form, kind, marks=() if often else FULL, id=f"{backend}-{form}-{kind}"))
    return pytest.mark.parametrize(("backend", "form", "mixing_name"), cases)


@mixtures("bi-sided moa", kinds=("moa",))
def test_mixture_is_accurate_in_every_dtype(backend: str, form: str, mixing_name: str) -> None:
    dtypes = DTYPES
    if backend == "compile":  # which takes seconds for each
        dtypes = DTYPES[: 2 if mixing_name == "moa" else 1]
    for dtype in dtypes:
        # Kernels compute in float32 whatever they load, so one dtype is enough for the whole dictionary.
        few = FEW[: 2 if form == "quadratic" or backend == "compile" else 4]
        activations = () if backend == "triton" and dtype == torch.float32 else few
        mixture = MixtureConfig(kind=mixing_name, form=form, activations=activations, backend=backend)
        # The interpreter's bfloat16 is cut off, and a bias' gradient adds up what is cut off; GPUs round.
        bias = dtype != torch.bfloat16
        kernel_errors.require(
            kernel_errors.check_mixture(mixture, dtype, DEVICE, tokens=5, width=43, bias=bias, scale=True)
        )
        if backend == "triton":  # every width is compiled anew
            kernel_errors.require(kernel_errors.check_mixture(mixture, dtype, DEVICE, tokens=4, width=8))


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_gpu.py has it; 14 activations compile long")
@pytest.mark.parametrize(
    ("k", "expected"),
    [
        pytest.param(1, [(0, 1, True, True)], marks=FULL),
        pytest.param(7, [(0, 28, True, True)], marks=FULL),
        (8, [(0, 28, False, False), (28, 8, True, True)]),
        pytest.param(
            14, [(first, min(28, 105 - first), first == 84, first == 84) for first in (0, 28, 56, 84)], marks=FULL
        ),
    ],
)
def test_quadratic_sums_in_several_launches(
    k: int, expected: list[tuple[int, int, bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch up to seven activations; then several, of which the last may write over fc1's output."""
    launches = []
    kernel = mixture_kernels._mixture_backward_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Tensor, **named: Any) -> None:
                launches.append((named["FIRST"], named["SUMS"], named["NEED_Z"], named["NEED_SCALE"]))
                kernel[grid](*arguments, **named)

            return launch

    monkeypatch.setattr(mixture_kernels, "_mixture_backward_kernel", Recorder())
    names = tuple(ACTIVATIONS)
    for overwrite in (False, True):
        launches.clear()
        mixture = MixtureConfig(form="quadratic", activations=names[:k], overwrite=overwrite, backend="triton")
        eager = dataclasses.replace(mixture, overwrite=False, backend="eager")
        layer = make_layer(mixture, 2, 9, 5, torch.float32)
        wanted = [layer[name] for name in ("z", "scale", "weight")]
        # A copy of z, as fc1's output is one: it may be written over.
        results = [
            torch.autograd.grad(activation_step({**layer, "z": layer["z"] * 1}, which).sum(), wanted)
            for which in (mixture, eager)
        ]
        assert launches == expected
        for actual, right in zip(*results, strict=True):
            assert (actual - right).abs().max() < 2e-6 * right.abs().max(), (k, overwrite)


@pytest.mark.parametrize(
    ("backend", "form"),
    [
        pytest.param(backend, form, marks=() if (backend, form) in EXPERTS_OFTEN else FULL)
        for backend in BACKENDS
        for form in FORMS
    ],
)
def test_experts_with_la_of_their_own_are_accurate(backend: str, form: str) -> None:
    mixture = MixtureConfig(kind="la", form=form, activations=("silu", "relu"), backend=backend)
    checks = kernel_errors.check_mixture(mixture, torch.float32, DEVICE, tokens=20, width=12, scale=True, groups=3)
    kernel_errors.require(checks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("backend", "mixing_name"),
    [("triton", "moa"), ("triton", "la"), *(pytest.param("compile", kind, marks=FULL) for kind in ("moa", "la"))],
)
def test_any_number_of_tokens(backend: str, size: int, mixing_name: str) -> None:
    # The interpreter takes some 10 ms a row, and one relu is enough to count rows.
    form, activations = ("bi-sided", ("silu", "tanh")) if size < 200 else ("type1", ("relu",))
    mixture = MixtureConfig(kind=mixing_name, form=form, activations=activations, backend=backend)
    kernel_errors.require(
        kernel_errors.check_mixture(mixture, torch.float32, DEVICE, tokens=size, width=24, scale=True)
    )


@pytest.mark.parametrize(
    ("backend", "size", "form"),
    [
        *itertools.product(["triton"], (1, 3, 127, 1000), ("bi-sided", "quadratic")),
        *(
            pytest.param(*case, marks=FULL)
            for case in [
                *itertools.product(["triton"], (1, 3, 127, 1000), ("type1", "one-sided")),
                *itertools.product(["triton"], [4097], FORMS),
                *itertools.product(["compile"], (1, 127), FORMS),  # each width is compiled anew
            ]
        ),
    ],
)
def test_any_width(backend: str, size: int, form: str) -> None:
    mixture = MixtureConfig(form=form, activations=("silu", "tanh"), backend=backend)
    kernel_errors.require(kernel_errors.check_mixture(mixture, torch.float32, DEVICE, tokens=3, width=size, bias=True))


@pytest.mark.parametrize("form", ["type1", pytest.param("one-sided", marks=FULL), "bi-sided"])
def test_every_activation_as_a_kernel(form: str) -> None:
    mixture = MixtureConfig(form=form, activations=tuple(ACTIVATIONS), backend="triton")
    kernel_errors.require(kernel_errors.check_mixture(mixture, torch.float32, DEVICE, tokens=3, width=300))
    for name in ACTIVATIONS:
        alone = dataclasses.replace(mixture, activations=(name,))
        kernel_errors.require(kernel_errors.check_mixture(alone, torch.float32, DEVICE, tokens=2, width=70))


# A gate function is the same with groups and without; softmax also needs its branches apart.
@pytest.mark.parametrize(
    ("gate", "groups"),
    [
        pytest.param(gate, groups, marks=() if groups == 0 or gate == "softmax" else FULL)
        for gate, groups in itertools.product(GATES, (0, 3))
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_are_accurate(backend: str, gate: str, groups: int) -> None:
    for form in ("bi-sided", "quadratic"):  # a softmax over each branch, and one over all
        mixture = MixtureConfig(form=form, gate=gate, activations=("silu", "relu", "tanh"), backend=backend)
        learned = dataclasses.replace(mixture, gate_bias=True, amplitude="learned")
        for dtype in DTYPES:
            kernel_errors.require(kernel_errors.check_gate(mixture, dtype, DEVICE, 80, 70, groups, scale=True))
            kernel_errors.require(kernel_errors.check_gate(learned, dtype, DEVICE, 67, 9, groups))


@pytest.mark.parametrize("tokens", [0, 1, *(pytest.param(tokens, marks=FULL) for tokens in (3, 64)), 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_of_any_number_of_tokens(backend: str, tokens: int) -> None:
    mixture = MixtureConfig(gate_bias=True, backend=backend)
    for groups in (0, 4):
        kernel_errors.require(kernel_errors.check_gate(mixture, torch.float32, DEVICE, tokens, 600, groups))


def make_layer(mixture: MixtureConfig, tokens: int, f: int, h: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draws the tensors of a feed-forward layer's activation step, with gradients asked for.

    They are x, the gate weight, fc1's output, and the scale.
    """
    generator = torch.Generator().manual_seed(8)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    return {
        "x": normal(tokens, h),
        "weight": normal(mixture.num_coefficients, h),
        "value": normal(mixture.num_coefficients, dtype=torch.float32),
        "z": normal(tokens, 2 * f if mixture.gated else f),
        "scale": normal(tokens, dtype=torch.float32),
    }


def activation_step(layer: dict[str, Tensor], mixture: MixtureConfig) -> Tensor:
    coefficients = layer["value"]
    if mixture.kind == "moa":
        coefficients = gate_coefficients(layer["x"], layer["weight"], mixture)
    return mixed_activation(layer["z"], coefficients, mixture, None, layer["scale"])


@mixtures(forms=("bi-sided", "quadratic"))
def test_two_runs_give_the_same_bits(backend: str, form: str, mixing_name: str) -> None:
    mixture = MixtureConfig(kind=mixing_name, form=form, activations=("silu", "tanh"), backend=backend)
    layer = make_layer(mixture, 9, 33, 20, torch.float32)
    grad = torch.randn(9, 33, generator=torch.Generator().manual_seed(9)).to(DEVICE)

    def gradients() -> tuple[Tensor, ...]:
        names = ("z", "scale", "x", "weight") if mixing_name == "moa" else ("z", "scale", "value")
        asked = [layer[name] for name in names]
        return torch.autograd.grad(activation_step(layer, mixture), asked, grad)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@mixtures("bi-sided moa", forms=("bi-sided", "quadratic"))
def test_saved_for_backward_is_swiglu_s_and_the_coefficients(
    backend: str, form: str, mixing_name: str, dtype: torch.dtype
) -> None:
    """Checks that what is saved for backward is what SwiGLU saves, and the coefficients.

    SwiGLU saves fc1's output and the router's probabilities, as in Megatron; x is fc1's too, so saved anyway.
    """
    mixture = MixtureConfig(kind=mixing_name, form=form, activations=("silu", "tanh"), backend=backend)
    layer = make_layer(mixture, 6, 16, 8, dtype)
    saved = saved_for_backward(lambda: activation_step(layer, mixture), (layer["weight"], layer["value"]))
    swiglu = layer["z"].nbytes + layer["scale"].nbytes + (layer["x"].nbytes if mixing_name == "moa" else 0)
    coefficients = 4 * 6 * mixture.num_coefficients if mixing_name == "moa" else 0  # LA's are parameters
    assert saved.bytes == swiglu + coefficients


def test_the_count_of_saved_bytes_can_fail() -> None:
    eager = MixtureConfig(activations=("silu", "tanh"), backend="eager")
    layer = make_layer(eager, 6, 16, 8, torch.float32)
    saved = saved_for_backward(lambda: activation_step(layer, eager), (layer["weight"],))
    assert saved.bytes > 2 * (layer["z"].nbytes + layer["scale"].nbytes)


def test_rows_that_begin_beyond_two_to_the_31() -> None:
    """Checks that addresses are 64 bits wide, by three rows far apart.

    There are 2^30 elements from one row to the next, in memory never touched.
    """
    mixture = MixtureConfig(activations=("silu", "relu2"), backend="triton")
    f, distance = 24, 2**30
    storage = torch.UntypedStorage(2 * (2 * distance + 2 * f), device=DEVICE)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (3, 2 * f), (distance, 1))
    near = torch.randn(3, 2 * f, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    far.copy_(near)
    coefficients = torch.rand(3, 4, device=DEVICE)
    far.requires_grad_()
    near.requires_grad_()
    results = []
    for z in (far, near):
        out = mixed_activation(z, coefficients, mixture)
        results.append((out, *torch.autograd.grad(out.float().sum(), z)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_in_place_of_the_preactivation(form: str) -> None:
    mixture = MixtureConfig(form=form, activations=("silu", "tanh"), backend="triton")
    layer = make_layer(mixture, 9, 20, 8, torch.float32)
    wanted = ["z", "scale", "weight"]
    expected = torch.autograd.grad(activation_step(layer, mixture).sum(), [layer[name] for name in wanted])
    overwriting = dataclasses.replace(mixture, overwrite=True)
    z = layer["z"].detach().clone().requires_grad_()
    fc1_output = z * 1
    out = activation_step({**layer, "z": fc1_output}, overwriting)
    actual = torch.autograd.grad(out.sum(), [z, layer["scale"], layer["weight"]], retain_graph=True)
    for name, a, e in zip(wanted, actual, expected, strict=True):
        assert torch.equal(a, e), name
    assert torch.equal(fc1_output, expected[0])
    with pytest.raises(RuntimeError, match="--moa-overwrite-preactivation: a second backward"):
        out.sum().backward()


def test_who_else_saved_the_preactivation_is_refused() -> None:
    """It computed its gradient from the mixture's."""
    mixture = MixtureConfig(activations=("silu", "tanh"), overwrite=True, backend="triton")
    leaf = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    z = leaf * 1
    also = (z * z).sum()
    out = mixed_activation(z, torch.rand(3, 4, device=DEVICE), mixture).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out + also).backward()


def test_a_preactivation_without_gradient_is_left_where_its_bias_is_trained() -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), overwrite=True, backend="triton")
    z, bias = torch.randn(3, 8, device=DEVICE), torch.randn(8, device=DEVICE, requires_grad=True)
    before = z.clone()
    out = mixed_activation(z, torch.rand(3, 4, device=DEVICE), mixture, bias).sum()
    out.backward(retain_graph=True)
    out.backward()  # nothing is gone
    assert torch.equal(z, before)
    assert bias.grad.all()


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=FULL)])
def test_rows_that_overlap(backend: str) -> None:
    """Windows over a sequence: each row's gradient was written over the next one's."""
    mixture = MixtureConfig(form="type1", activations=("silu", "tanh"), backend=backend)
    coefficients = torch.rand(6, 2, device=DEVICE)
    results = []
    for backend_here in (backend, "eager"):
        leaf = torch.linspace(-2, 2, 14, device=DEVICE, requires_grad=True)
        out = mixed_activation(leaf.unfold(0, 9, 1), coefficients, dataclasses.replace(mixture, backend=backend_here))
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_nan_of_a_gpu_in_a_gates_gradient_stays() -> None:
    """NVIDIA's arithmetic gives 0x7fffffff, to which rounding to TF32 added until it was -0."""
    mixture = MixtureConfig(activations=("silu", "tanh"), backend="triton")
    x, weight = (torch.randn(size, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for size in (3, 4))
    grad = torch.zeros(3, 4, device=DEVICE)
    grad.view(torch.int32)[1, 2] = 0x7FFFFFFF
    for gradient in torch.autograd.grad(gate_coefficients(x, weight, mixture), (x, weight), grad):
        assert gradient.isnan().any()


def test_backends_that_cannot_write_in_place_say_so() -> None:
    for backend in ("compile", "eager"):
        mixture = MixtureConfig(overwrite=True, backend=backend)
        with pytest.raises(UserError, match=f"--moa-overwrite-preactivation: the {backend} backend"):
            mixed_activation(torch.zeros(2, 4), torch.zeros(14), mixture)


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=FULL)])
def test_strided_inputs(backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), backend=backend)
    eager = dataclasses.replace(mixture, backend="eager")
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    for z in (normal(8, 12).t()[::2], normal(6, 30)[:, 5:13], normal(1, 8).expand(6, 8)):
        inputs = {
            "preactivation": z.detach().requires_grad_(),
            "coefficients": normal(4, 6).t().requires_grad_(),
            "per_token_scale": normal(12)[::2].requires_grad_(),
        }
        for grad in (normal(6, 4), normal(4, 6).t(), normal(1, 1).expand(6, 4)):
            results = []
            for which in (mixture, eager):
                out = mixed_activation(mixture=which, **inputs)
                results.append((out, *torch.autograd.grad(out, list(inputs.values()), grad)))
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=FULL)])
def test_tokens_whose_one_sequence_has_any_stride(backend: str) -> None:
    """[s, 1, h] that was transposed from [1, s, h] counts as contiguous, whatever its middle stride says."""
    mixture = MixtureConfig(activations=("silu", "tanh"), amplitude="learned", gate_bias=True, backend=backend)
    eager = dataclasses.replace(mixture, backend="eager")
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, z, coefficients, grad = (normal(1, 5, width).transpose(0, 1) for width in (6, 8, 4, 4))
    assert grad.is_contiguous()
    assert grad.stride(-2) == 20
    scale = normal(1, 5).t()
    parameters = normal(4, 6), normal(4, 2)[:, 0], normal(4, 3)[:, 1]  # weight, bias, amplitude
    inputs = [tensor.detach().requires_grad_() for tensor in (x, z, coefficients, scale, normal(8, 2)[:, 1])]
    parameters = [tensor.detach().requires_grad_() for tensor in parameters]

    def results(mixture: MixtureConfig) -> Iterator[Tensor]:
        x, z, coefficients, scale, bias = inputs
        out = mixed_activation(z, coefficients, mixture, bias, scale)
        yield from (out, *torch.autograd.grad(out, [z, coefficients, scale, bias], grad))
        gate = gate_coefficients(x, parameters[0], mixture, *parameters[1:])
        yield from (gate, *torch.autograd.grad(gate, [x, *parameters], grad))
        out, gate = gated_mixture(z, GateInputs(x, *parameters), mixture, bias, scale)
        yield from (out, gate, *torch.autograd.grad(out, [*inputs[:2], scale, bias, *parameters], grad))

    for actual, expected in zip(results(mixture), results(eager), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=FULL)])
def test_one_token_without_a_dimension_of_tokens(backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), gate_bias=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (6,), "weight": (4, 6), "gate bias": (4,), "z": (8,), "bias": (8,), "scale": ()}
    inputs = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    x, weight, gate_bias, z, bias, scale = inputs.values()

    def results(mixture: MixtureConfig) -> list[Tensor]:
        coefficients = gate_coefficients(x, weight, mixture, gate_bias)
        out = mixed_activation(z, coefficients, mixture, bias, scale)
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]

    for actual, expected in zip(results(mixture), results(dataclasses.replace(mixture, backend="eager")), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", pytest.param("compile", marks=FULL)])
def test_gradients_of_half_precision_coefficients_are_summed_in_float32(backend: str) -> None:
    mixture = MixtureConfig(kind="la", activations=("silu", "tanh"), backend=backend)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(64, 24, generator=generator).to(DEVICE)
    coefficients = torch.rand(4, generator=generator).to(DEVICE)
    given, exact = (coefficients.to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float64))
    mixed_activation(z, given, mixture).sum().backward()
    mixed_activation(z.double(), exact, dataclasses.replace(mixture, backend="eager")).sum().backward()
    assert given.grad.dtype == torch.bfloat16
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=2**-7, atol=0)


def test_a_gate_in_double_precision_gives_double_precision_on_any_backend() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64, device=DEVICE)
    for backend in ("triton", "compile", "eager"):
        mixture = MixtureConfig(activations=("silu", "tanh"), backend=backend)
        for tokens in (0, 3):
            assert gate_coefficients(torch.ones(tokens, 6, device=DEVICE), weight, mixture).dtype == torch.float64


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": (4, 3)}, r"weight \(4, 3\): bi-sided over 2 activations needs \[4, 6\] for x \(5, 6\)"),
        ({"weight": (3, 6)}, r"weight \(3, 6\): bi-sided over 2 activations needs \[4, 6\]"),
        ({"weight": (2, 4, 6)}, r"weight \(2, 4, 6\): .* needs \[4, 6\]"),
        ({"bias": (3,)}, r"bias \(3,\): needs \[4\]"),
        ({"amplitude": (4, 1)}, r"amplitude \(4, 1\): needs \[4\]"),
        ({"scale": ()}, r"scale \(\): needs \[1\]"),
        ({"groups": 2}, r"weight \(4, 6\): .* needs \[2, 4, 6\]"),
        ({"groups": 2, "weight": (3, 4, 6)}, r"weight \(3, 4, 6\): .* needs \[2, 4, 6\]"),
        ({"groups": 2, "weight": (2, 4, 6), "bias": (4,)}, r"bias \(4,\): needs \[2, 4\]"),
        ({"groups": 2, "weight": (2, 4, 6), "x": (5, 1, 6)}, r"x \(5, 1, 6\): needs two dimensions with group_ends"),
    ],
)
def test_gates_of_other_shapes_are_refused_by_every_backend(changed: dict, said: str, backend: str) -> None:
    mixture = MixtureConfig(activations=("silu", "tanh"), backend=backend)
    shapes = {"x": (5, 6), "weight": (4, 6), "bias": None, "amplitude": None, "scale": None, **changed}
    groups = shapes.pop("groups", None)
    tensors = [None if shape is None else torch.ones(shape, device=DEVICE) for shape in shapes.values()]
    ends = None if groups is None else torch.arange(1, groups + 1, dtype=torch.int32, device=DEVICE)
    x, weight, bias, amplitude, scale = tensors
    with pytest.raises(ValueError, match=said):
        gate_coefficients(x, weight, mixture, bias, amplitude, scale, ends)
    with pytest.raises(ValueError, match=said):
        gated_mixture(torch.ones(*x.shape[:-1], 8, device=DEVICE), GateInputs(*tensors, ends), mixture)


def test_an_activation_of_a_higher_power_needs_its_definition_and_its_terms_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "ACTIVATION_NAMES", (*config.ACTIVATION_NAMES, "relu5"))
    monkeypatch.setattr(lowering, "POWERS", (*lowering.POWERS, "relu4", "relu5"))
    monkeypatch.setitem(ACTIVATIONS, "relu5", {"relu5": 1.0, "relu4": 0.5, "relu": 2.0})
    monkeypatch.setitem(
        reference.DEFINITIONS, "relu5", lambda x: x.relu().pow(5) + 0.5 * x.relu().pow(4) + 2 * x.relu()
    )
    for form, names in (("type1", ("relu5",)), ("bi-sided", ("relu5", "relu2", "identity"))):
        mixture = MixtureConfig(form=form, activations=names, backend="triton")
        kernel_errors.require(kernel_errors.check_mixture(mixture, torch.float32, DEVICE, tokens=3, width=30))


def test_the_compiler_serves_more_kinds_than_its_limit_of_recompilations() -> None:
    mixture = MixtureConfig(kind="la", form="type1", activations=("relu",), backend="compile")
    for width in range(1, 11):
        z = torch.ones(2, width, device=DEVICE)
        assert mixed_activation(z, torch.ones(1, device=DEVICE), mixture).sum() == 2 * width


def test_the_compiler_serves_more_global_states_than_its_limit_of_recompilations() -> None:
    mixture = MixtureConfig(kind="la", form="type1", activations=("relu",), backend="compile")
    z, coefficients = torch.ones(2, 11, device=DEVICE), torch.ones(1, device=DEVICE)
    threads = torch.get_num_threads()
    with torch._dynamo.config.patch(recompile_limit=1):
        try:
            for number in (1, 2, 1):
                torch.set_num_threads(number)
                assert mixed_activation(z, coefficients, mixture).sum() == 22
        finally:
            torch.set_num_threads(threads)


def test_auto_takes_the_kernels_on_gpus() -> None:
    assert resolve_backend("auto", "cuda") == "triton"
    assert resolve_backend("triton", "cpu" if DEVICE == "cpu" else "cuda") == "triton"


@pytest.mark.full
@pytest.mark.skipif(DEVICE == "cuda", reason="in the interpreter; on a GPU every run is one of the kernels")
def test_training_through_the_kernels(tmp_path: Path) -> None:
    """A run's losses are eager's: gates, mixture, scales and shapes as Megatron calls them."""
    flags = [*SWIGLU, "--train-iters", "3", "--moa-activations", "silu", "relu2"]
    expected = train(*flags, "--moa-backend", "eager").losses
    actual = train(*flags, "--moa-backend", "triton").losses
    assert len(actual) == 3
    assert actual == pytest.approx(expected, rel=1e-6)


def test_unwritten_memory_is_nan() -> None:
    """Checks what these tests rely on (conftest.py): new memory holds NaN.

    So an output that no kernel writes is not what was there before.
    """
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
