"""Tests how pytorch recognises layers of others by what they compute.

The layers are taken over exactly, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from megatron_moa import MixedFeedForward, MixtureConfig, replace_feed_forward
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import ACTIVATION_NAMES
from megatron_moa.mixture.reference import DEFINITIONS
from megatron_moa.pytorch.recognition import recognise
from tests.support.plain_layers import mlp

pytestmark = pytest.mark.usefixtures("eager_default")


class Gated(nn.Module):
    """A gated layer with names of its own."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu, bias: bool = False, width: int = 24) -> None:
        super().__init__()
        # In an order in which neither is first.
        self.out = nn.Linear(width, 16, bias=bias)
        self.b = nn.Linear(16, width, bias=bias)
        self.a = nn.Linear(16, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.a(x)) * self.b(x))


class Fused(nn.Module):
    """A gated layer whose first matrix holds both branches, the linear one first."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.both = nn.Linear(16, 48)
        self.out = nn.Linear(24, 16)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(first) * second if self.gate_first else first * F.silu(second))


def assert_same(layer: nn.Module, new: MixedFeedForward) -> None:
    x = torch.randn(3, 5, 16)
    expected = layer.eval()(x)
    torch.testing.assert_close(new.eval()(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


class Activation(nn.Module):
    """A function as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.forward = DEFINITIONS[name]


@pytest.mark.parametrize("name", [name for name in ACTIVATION_NAMES if name != "one"])
def test_every_activation_is_recognised(name: str) -> None:
    torch.manual_seed(3)
    plain, gated = mlp(Activation(name)), Gated(DEFINITIONS[name])
    assert recognise(plain).activation == name
    found = recognise(gated, names={"gate": "a"})
    assert (found.activation, found.reading.gated) == (name, True)
    names = tuple(dict.fromkeys((name, "identity")))
    assert_same(plain, MixedFeedForward.from_mlp(plain, MixtureConfig(form="type1", activations=(name, "one"))))
    for form in ("bi-sided", "quadratic"):
        mixture = MixtureConfig(form=form, activations=names)
        assert_same(gated, MixedFeedForward.from_swiglu(gated, mixture))


@pytest.mark.parametrize("width", [24, 16, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_roles_are_found_by_what_is_computed(width: int, bias: bool) -> None:
    torch.manual_seed(4)
    for layer in (Gated(bias=bias, width=width), Fused(True), Fused(False)):
        assert_same(layer, MixedFeedForward.from_swiglu(layer))
    for layer in (mlp(bias=bias, width=width), mlp(nn.ReLU(), width=width)):
        assert_same(layer, MixedFeedForward.from_mlp(layer))


def test_names_choose_the_roles() -> None:
    layer = Gated()
    assert_same(layer, MixedFeedForward.from_swiglu(layer, gate="a", up="b", down="out"))
    with pytest.raises(UserError, match=r"computes neither .* the nearest, \w+, is off by"):
        MixedFeedForward.from_swiglu(layer, gate="b")
    with pytest.raises(UserError, match=r'gate="c" is no linear layer of it; linear layers .*: out .*, b .*, a '):
        MixedFeedForward.from_swiglu(layer, gate="c")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_gradients_and_mode_are_the_layers(dtype: torch.dtype) -> None:
    layer = Gated().to(dtype).requires_grad_(False).train()
    new = MixedFeedForward.from_swiglu(layer)
    assert all(parameter.dtype == dtype for parameter in new.parameters())
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        "coefficients.weight",
        "coefficients.amplitude",
    }
    assert new.training
    assert torch.equal(new.fc1.weight, torch.cat((layer.a.weight, layer.b.weight)))
    assert torch.equal(new.fc2.weight, layer.out.weight)
    assert new.fc2.weight.data_ptr() != layer.out.weight.data_ptr()


def test_rounded_products_around_it_do_not_matter() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            new = MixedFeedForward.from_swiglu(layer := Gated())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same(layer, new)


def test_dropout_of_the_output_is_kept() -> None:
    layer = nn.Sequential(*mlp(), nn.Dropout(0.3))
    new = MixedFeedForward.from_mlp(layer)
    assert new.dropout.p == pytest.approx(0.3)
    assert_same(layer, new)


class Odd(nn.Module):
    """A layer that is nearly a feed-forward layer."""

    def __init__(self, forward: Callable[[Odd, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        for name, child in children.items():
            self.add_module(name, child)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _keeping() -> nn.Module:
    layer = Odd(lambda m, x: m.down(F.gelu(m.up(x))))
    layer.last = layer.up(torch.randn(2, 16))
    return layer


# What is no feed-forward layer of the dictionary, or would lose something, with what is said of it.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quick GELU": (
        lambda: Odd(lambda m, x: m.down(m.up(x) * torch.sigmoid(1.702 * m.up(x)))),
        "computes neither .* the nearest, gelu, is off by",
    ),
    "a factor": (lambda: Odd(lambda m, x: 0.9 * m.down(F.gelu(m.up(x)))), "computes neither"),
    "a residual": (lambda: Odd(lambda m, x: x + m.down(F.gelu(m.up(x)))), "computes neither"),
    "a tuple": (lambda: Odd(lambda m, x: (m.down(F.gelu(m.up(x))), None)), "gives tuple"),
    "dropout inside": (
        lambda: Odd(lambda m, x: m.down(F.dropout(F.gelu(m.up(x)), 0.1, m.training))),
        "in training than in evaluation",
    ),
    "a norm": (lambda: Odd(lambda m, x: m.down(m.norm(m.up(x))), norm=nn.LayerNorm(32)), "no MLP .* other parameters"),
    "no linear layers": (lambda: nn.LayerNorm(16), "no MLP .* none, or other parameters"),
    "one linear layer": (lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU()), r"no MLP .* 0 \[16, 16\]"),
    "not back to h": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), "no MLP"),
    "widths that differ": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(24, 16)), "no MLP"),
    "an error": (lambda: Odd(lambda m, x: 1 / 0), "ZeroDivisionError: division by zero"),
    "weights of 0": (lambda: nn.Sequential(*mlp()).apply(_zero), "computes neither"),
    "the meta device": (lambda: mlp().to("meta"), "meta device"),
    "a clipped activation": (lambda: mlp(nn.ReLU6()), r"nearest, \w+, is off by"),
    "an activation clipped far out": (lambda: Odd(lambda m, x: m.down(m.up(x).clamp(-40, 40))), "nearest, identity"),
    "dropout of whole texts": (lambda: Odd(lambda m, x: _drop_texts(m.down(F.gelu(m.up(x))), m)), "in training than"),
    "dropout of whole tokens": (lambda: nn.Sequential(*mlp(), nn.Dropout1d(0.3)), "in training than"),
    "dropout of everything": (lambda: nn.Sequential(*mlp(), nn.Dropout(1.0)), "in training than"),
    "two dtypes": (lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16).half()), "one dtype"),
    "one weight twice": (lambda: _tied(mlp(width=16)), "share their weight"),
    "hooks": (lambda: _hooked(mlp()), "has hooks"),
    "hooks inside": (
        lambda: nn.Sequential(_hooked(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16)),
        "its 0 has hooks",
    ),
    "parametrizations": (
        lambda: nn.Sequential(weight_norm(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16)),
        "its 0 is parametrized",
    ),
    "a layer that keeps what it computed": (_keeping, "cannot be copied"),
}


def _drop_texts(x: Tensor, module: nn.Module) -> Tensor:
    if not module.training:
        return x
    return x * (torch.rand(x.shape[0], 1, 1) > 0.1) / 0.9


def _tied(layer: nn.Sequential) -> nn.Sequential:
    layer[2].weight = layer[0].weight
    return layer


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def _zero(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_feed_forward_layer_is_refused_and_the_model_stays(case: str) -> None:
    make, said = REFUSED[case]
    layer = make()
    with pytest.raises(UserError, match=said) as refusal:
        MixedFeedForward.from_mlp(layer)
    assert "\n" not in str(refusal.value)
    model = nn.ModuleDict({"good": mlp(), "odd": layer})
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=r"^odd "):
        replace_feed_forward(model, match=lambda name, module: name in ("good", "odd"))
    assert dict(model.named_modules()) == before


def test_a_layer_that_is_partly_frozen_stays_so() -> None:
    layer = mlp()
    layer[2].requires_grad_(False)
    new = MixedFeedForward.from_mlp(layer)
    assert new.fc1.weight.requires_grad
    assert new.fc1.bias.requires_grad
    assert not new.fc2.weight.requires_grad
    assert not new.fc2.bias.requires_grad
    layer[0].weight.requires_grad_(False)
    layer[2].bias.requires_grad_(True)
    trains = {
        name for name, parameter in MixedFeedForward.from_mlp(layer).named_parameters() if parameter.requires_grad
    }
    assert {name for name in trains if name.startswith("fc")} == {"fc1.bias", "fc2.bias"}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gate_frozen_beside_an_up_that_trains_is_refused(name: str) -> None:
    layer = Gated(bias=True)
    layer.a = nn.Linear(16, 24)
    getattr(layer.a, name).requires_grad_(False)
    with pytest.raises(UserError, match=rf"the {name} of a is frozen, that of b is not.*; freeze both or neither$"):
        MixedFeedForward.from_swiglu(layer)
    layer.b.requires_grad_(False)
    layer.a.requires_grad_(False)
    assert not MixedFeedForward.from_swiglu(layer).fc1.bias.requires_grad


def test_a_bias_of_one_branch_keeps_its_freeze() -> None:
    layer = Gated(bias=True)
    layer.b.bias.requires_grad_(False)
    new = MixedFeedForward.from_swiglu(layer)
    assert new.fc1.weight.requires_grad
    assert not new.fc1.bias.requires_grad
