"""Compares Megatron's layers with the mixture to the reference feed-forward layer.

Values and every gradient are compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_moa.layers.coefficients import GateCoefficients
from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from tests.support.layers import build_feed_forward, make_config, moe_settings, randn64

pytestmark = pytest.mark.usefixtures("megatron")

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def reference_of(layer: MixedMLP, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference layer's output with copies of a layer's parameters, and those copies by name."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    is_gate = isinstance(layer.coefficients, GateCoefficients)
    coefficients = {
        "gate_weight": copies.get("coefficients.weight") if is_gate else None,
        "gate_bias": copies.get("coefficients.bias"),
        "amplitude": copies.get("coefficients.amplitude"),
        "coefficients": copies.get("coefficients.value"),
    }
    fc1, fc2 = copies["linear_fc1.weight"], copies["linear_fc2.weight"]
    return reference.feed_forward(x, fc1, fc2, layer.mixture, **coefficients), copies


def randomize(layer: torch.nn.Module) -> None:
    """Makes biases and amplitudes differ from their neutral start."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "coefficients" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def mixtures() -> list[MixtureConfig]:
    """Every form as LA and MoA, every gate, bias and amplitude."""
    result = [MixtureConfig(kind=m, form=f, backend="eager") for m in ("la", "moa") for f in FORMS]
    for gate in GATES:
        result.append(MixtureConfig(gate=gate, gate_bias=True, amplitude="learned", backend="eager"))
        result.append(MixtureConfig(form="quadratic", gate=gate, activations=("silu", "tanh"), backend="eager"))
        result.append(MixtureConfig(form="one-sided", gate=gate, activations=("silu", "tanh"), backend="eager"))
    return [*result, MixtureConfig(backend="compile")]


@pytest.mark.parametrize("mixture", mixtures(), ids=MixtureConfig.describe)
def test_dense_layer_is_the_reference(mixture: MixtureConfig) -> None:
    layer = build_feed_forward(make_config(mixture.gated), mixture).double()
    randomize(layer)
    x = randn64(5, 2, 16).requires_grad_()  # [s, b, h]
    expected_x = x.detach().clone().requires_grad_()
    grad = randn64(5, 2, 16)
    output, bias = layer(x)
    expected, copies = reference_of(layer, expected_x)
    assert bias is None
    torch.testing.assert_close(output, expected, **EXACT)
    output.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, expected_x.grad, **EXACT)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, copies[name].grad, msg=name, **EXACT)


def test_dense_layer_with_bias_of_fc1_and_fc2() -> None:
    mixture = MixtureConfig(form="type1", backend="eager")
    layer = build_feed_forward(make_config(gated=False, add_bias_linear=True), mixture).double()
    with torch.no_grad():
        layer.linear_fc1.bias.normal_()
    x = randn64(5, 2, 16)
    output, bias = layer(x)
    z = x @ layer.linear_fc1.weight.t() + layer.linear_fc1.bias
    coefficients = reference.gate(x @ layer.coefficients.weight.t(), mixture)
    torch.testing.assert_close(output, reference.mix(z, coefficients, mixture) @ layer.linear_fc2.weight.t(), **EXACT)
    assert bias is layer.linear_fc2.bias


@pytest.mark.parametrize("overlap", [False, True], ids=["", "shared expert overlapped"])
@pytest.mark.parametrize("mixing_name", ["la", "moa"])
def test_experts_are_the_reference_weighted_by_the_router(mixing_name: str, overlap: bool) -> None:
    mixture = MixtureConfig(kind=mixing_name, backend="eager")
    shared = {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_overlap": overlap}
    config = make_config(**moe_settings(**shared))
    moe = build_feed_forward(config, mixture).double()
    randomize(moe)
    x = randn64(6, 2, 16).requires_grad_()
    grad = randn64(6, 2, 16)
    output, _ = moe(x)

    expected_x = x.detach().clone().requires_grad_()
    flat = expected_x.flatten(0, 1)
    probabilities, chosen = moe.router(expected_x)
    expected, copies = reference_of(moe.shared_experts, flat)
    copies = {f"shared_experts.{name}": copy for name, copy in copies.items()}
    for index, expert in enumerate(moe.experts.local_experts):
        value, own = reference_of(expert, flat)
        weight = torch.where(chosen[:, index], probabilities[:, index], 0.0)
        expected = expected + weight.unsqueeze(-1) * value
        copies |= {f"experts.local_experts.{index}.{name}": copy for name, copy in own.items()}
    expected = expected.view_as(output)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)

    for parameter in moe.parameters():
        parameter.grad = None
    output.backward(grad, retain_graph=True)
    actual = {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}
    expected.backward(grad)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-8, atol=1e-9)
    assert {name for name in actual if "router" not in name} == set(copies)
    for name, copy in copies.items():
        torch.testing.assert_close(actual[name], copy.grad, rtol=1e-8, atol=1e-9, msg=name)


def test_each_expert_has_gates_of_its_own() -> None:
    moe = build_feed_forward(make_config(**moe_settings()), MixtureConfig(backend="eager"))
    weights = [expert.coefficients.weight for expert in moe.experts.local_experts]
    assert len({id(weight) for weight in weights}) == 4
    assert not torch.equal(weights[0], weights[1])


def one_hot(n: int, *hot: int) -> tuple[float, ...]:
    return tuple(float(index in hot) for index in range(n))


# The default dictionaries' places of what is SwiGLU: identity on W2's side, silu on W1's, or the pair of the two.
SWIGLU_PLACES = {"one-sided": (7, 6), "bi-sided": (14, 1, 7 + 6), "quadratic": (10, 4 + 2)}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", SWIGLU_PLACES)
def test_one_hot_amplitudes_are_stock_swiglu_exactly(form: str, gate: str) -> None:
    config = make_config()
    stock = build_feed_forward(config, None)
    mixture = MixtureConfig(
        form=form,
        gate=gate,
        amplitude="learned",
        gate_bias=True,
        initial_coefficients=one_hot(*SWIGLU_PLACES[form]),
        backend="eager",
    )
    layer = build_feed_forward(config, mixture)
    layer.load_state_dict(stock.state_dict(), strict=False)
    torch.nn.init.zeros_(layer.coefficients.weight)
    x = torch.randn(5, 2, 16, requires_grad=True)
    stock_x = x.detach().clone().requires_grad_()
    output, stock_output = layer(x)[0], stock(stock_x)[0]
    assert torch.equal(output, stock_output)
    grad = torch.randn(5, 2, 16)
    output.backward(grad)
    stock_output.backward(grad)
    assert torch.equal(x.grad, stock_x.grad)
    assert torch.equal(layer.linear_fc1.weight.grad, stock.linear_fc1.weight.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_zero_gates_of_learned_amplitude_are_la_exactly(gate: str, form: str) -> None:
    la = MixtureConfig(kind="la", form=form, activations=("silu", "tanh"), backend="eager")
    values = tuple(0.25 * (index + 1) for index in range(la.num_coefficients))
    la = MixtureConfig(kind="la", form=form, activations=("silu", "tanh"), initial_coefficients=values, backend="eager")
    moa = MixtureConfig(
        form=form,
        gate=gate,
        activations=("silu", "tanh"),
        amplitude="learned",
        initial_coefficients=values,
        backend="eager",
    )
    config = make_config(la.gated)
    la_layer, moa_layer = build_feed_forward(config, la), build_feed_forward(config, moa)
    moa_layer.load_state_dict(la_layer.state_dict(), strict=False)
    torch.nn.init.zeros_(moa_layer.coefficients.weight)
    x = torch.randn(5, 2, 16, requires_grad=True)
    la_x = x.detach().clone().requires_grad_()
    output, la_output = moa_layer(x)[0], la_layer(la_x)[0]
    assert torch.equal(output, la_output)
    output.sum().backward()
    la_output.sum().backward()
    assert torch.equal(x.grad, la_x.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_arithmetic_is_float32_in_half_precision(dtype: torch.dtype) -> None:
    mixture = MixtureConfig(gate_bias=True, amplitude="learned", backend="eager")
    layer = build_feed_forward(make_config(params_dtype=dtype), mixture)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(3, 2, 16).to(dtype).requires_grad_()
    coefficients = layer.coefficients(x)
    assert coefficients.dtype == torch.float32
    gates = layer.coefficients.double()
    logits = x.double() @ gates.weight.t() + gates.bias
    expected = reference.gate(logits, mixture, gates.amplitude)
    torch.testing.assert_close(coefficients.double(), expected, rtol=1e-5, atol=1e-6)
    layer.to(dtype)
    output, _ = layer(x)
    output.float().sum().backward()
    assert output.dtype == x.grad.dtype == layer.coefficients.weight.grad.dtype == dtype


def test_frozen_coefficients_take_no_gradient() -> None:
    mixture = MixtureConfig(gate_bias=True, amplitude="learned", freeze=True, backend="eager")
    layer = build_feed_forward(make_config(), mixture)
    layer(torch.randn(3, 2, 16))[0].sum().backward()
    assert all(parameter.grad is None for parameter in layer.coefficients.parameters())
    assert layer.linear_fc1.weight.grad is not None
