"""Gate and mixture as one function of autograd's: to the bit what they are one after the other."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_moa.mixture import autograd
from megatron_moa.mixture.autograd import GateInputs
from megatron_moa.mixture.config import FORMS, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, gated_mixture, mixed_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, F, H = (5, 2), 6, 7
ENDS = [3, 3, 10]  # the second expert has no tokens


def settings(form: str, backend: str, **others: object) -> MixtureConfig:
    return MixtureConfig(form=form, activations=("silu", "tanh"), backend=backend, **others)


def inputs(mixture: MixtureConfig, dtype: torch.dtype, grouped: bool = False) -> dict[str, Tensor]:
    """All that the two take, with gradients; for experts the tokens in one dimension."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, own: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, own).requires_grad_()

    tokens, experts = ((10,), (3,)) if grouped else (TOKENS, ())
    n, width = mixture.num_coefficients, 2 * F if mixture.gated else F
    found = {
        "z": normal(*tokens, width), "x": normal(*tokens, H), "u": normal(*experts, n, H), "s": normal(*tokens),
    }  # fmt: skip
    if mixture.gate_bias:
        found |= {"b": normal(*experts, n), "fc1_bias": normal(width)}
    if mixture.amplitude == "learned":
        found["a"] = normal(*experts, n)
    return found


def step(mixture: MixtureConfig, given: dict[str, Tensor], together: bool, ends: Tensor | None = None) -> list[Tensor]:
    """Mixture, coefficients and all gradients; fc1's output is a result, as it is in a layer."""
    z = given["z"] * 1
    constant = torch.full((1,), 0.5, device=DEVICE)
    gate = GateInputs(given["x"], given["u"], given.get("b"), given.get("a"), constant, ends)
    if together:
        out, coefficients = gated_mixture(z, gate, mixture, given.get("fc1_bias"), given["s"])
    else:
        coefficients = gate_coefficients(*gate[:2], mixture, *gate[2:])
        out = mixed_activation(z, coefficients, mixture, given.get("fc1_bias"), given["s"])
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
    return [out, coefficients, *torch.autograd.grad((out * weights).sum(), wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("form", "backend", "others"),
    [
        *((form, "eager", {}) for form in FORMS),
        ("bi-sided", "eager", {"gate_bias": True, "amplitude": "learned"}),
        ("bi-sided", "triton", {}),
        ("one-sided", "triton", {"gate_bias": True, "amplitude": "learned", "gate": "tanh"}),
        ("bi-sided", "triton", {"overwrite": True}),
        pytest.param("type1", "triton", {"gate": "softmax"}, marks=pytest.mark.full),
        pytest.param("bi-sided", "compile", {"gate_bias": True}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_equals_one_after_the_other(form: str, backend: str, others: dict, dtype: torch.dtype) -> None:
    mixture = settings(form, backend, **others)
    apart, together = (step(mixture, inputs(mixture, dtype), fused) for fused in (False, True))
    assert len(apart) == len(together)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["eager", "triton", pytest.param("compile", marks=pytest.mark.full)])
def test_equals_one_after_the_other_for_experts(backend: str) -> None:
    mixture = settings("one-sided", backend, gate_bias=True, amplitude="learned")
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    apart, together = (step(mixture, inputs(mixture, torch.float32, True), f, ends) for f in (False, True))
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_is_frozen_takes_no_gradient(backend: str) -> None:
    """Gates alone, fc1's output alone, x alone: the others' gradients are what they were."""
    mixture = settings("bi-sided", backend)
    whole = dict(zip("zxus", step(mixture, inputs(mixture, torch.float32), True)[2:], strict=True))
    for trained in ("z", "x", "u", "s"):
        given = inputs(mixture, torch.float32)
        for name, tensor in given.items():
            tensor.requires_grad = name == trained
        *_, grad = step(mixture, given, True)
        assert torch.equal(grad, whole[trained]), trained


def test_coefficients_are_for_looking_at() -> None:
    for backend in ("eager", "triton"):
        mixture = settings("bi-sided", backend)
        given = inputs(mixture, torch.float32)
        out, coefficients = gated_mixture(given["z"], GateInputs(given["x"], given["u"]), mixture)
        assert out.requires_grad
        assert not coefficients.requires_grad
        assert coefficients.shape == (*TOKENS, mixture.num_coefficients)


def test_no_tokens() -> None:
    mixture = settings("bi-sided", "triton")
    given = {
        name: t.detach()[:0].requires_grad_() if name != "u" else t
        for name, t in inputs(mixture, torch.float32).items()
    }  # fmt: skip
    out, coefficients, *grads = step(mixture, given, True)
    assert out.shape == (0, 2, F)
    assert coefficients.shape == (0, 2, mixture.num_coefficients)
    assert not any(grad.any() for grad in grads)


def test_a_second_backward_through_what_was_overwritten() -> None:
    mixture = settings("bi-sided", "triton", overwrite=True)
    given = inputs(mixture, torch.float32)
    out, _ = gated_mixture(given["z"] * 1, GateInputs(given["x"], given["u"]), mixture)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--moa-overwrite-preactivation: a second backward"):
        out.sum().backward()


def test_what_the_mixture_saved_is_let_go_before_the_gates_gradients() -> None:
    """As it is where the two are nodes of their own: no more memory at the peak of a backward."""
    alive = []

    class Still(SimpleNamespace):
        """A backend that computes nothing."""

        def gate_backward(self, gate: GateInputs, *_: object) -> tuple[Tensor | None, ...]:
            alive.append(not storage.expired())
            return torch.zeros_like(gate.x), torch.zeros_like(gate.weight), None, None

    mixture = settings("bi-sided", "eager")
    given = inputs(mixture, torch.float32)
    n = mixture.num_coefficients
    backend = Still(
        gate_forward=lambda gate, _: gate.x.new_zeros(*TOKENS, n),
        mixture_forward=lambda inputs, _: inputs.z.new_zeros(*TOKENS, F),
        mixture_backward=lambda inputs, *_: (torch.zeros_like(inputs.z), torch.zeros_like(inputs.coefficients), None),
    )
    z = given["z"] * 1
    storage = StorageWeakRef(z.untyped_storage())
    out, _ = autograd.gated_mixture(backend, GateInputs(given["x"], given["u"]), z, mixture, None, None)
    del z
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert alive == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given | {"x": given["x"][:3]},
            r"x \(3, 2, 7\): needs the tokens of preactivation, \[5, 2,",
        ),
        (
            lambda given: given | {"u": given["u"][:3]},
            r"weight \(3, 7\): bi-sided over 2 .* needs \[4, 7\] for x \(5, 2, 7\)",
        ),
        (lambda given: given | {"z": given["z"][..., :5]}, r"preactivation \(5, 2, 5\): bi-sided needs two halves"),
        (lambda given: given | {"s": given["s"][:3]}, r"per_token_scale \(3, 2\): needs \[5, 2\]"),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_shapes_that_do_not_fit(backend: str, change: Callable[[dict], dict], message: str) -> None:
    mixture = settings("bi-sided", backend)
    given = change(inputs(mixture, torch.float32))
    with pytest.raises(ValueError, match=message):
        gated_mixture(given["z"], GateInputs(given["x"], given["u"]), mixture, None, given["s"])
