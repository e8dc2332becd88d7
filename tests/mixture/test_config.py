"""MixtureConfig: what is legal, what is counted, and the one line for what is not legal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_moa.errors import UserError
from megatron_moa.mixture.config import FORMS, MIXINGS, MixtureConfig, auto_form, check_form
from megatron_moa.pytorch.feed_forward import MixedFeedForward


@pytest.mark.parametrize(
    ("form", "count", "softmax_size"),
    [
        ("type1", lambda k: k, lambda k: k),
        ("one-sided", lambda k: k, lambda k: k),
        ("bi-sided", lambda k: 2 * k, lambda k: k),
        ("quadratic", lambda k: k * (k + 1) // 2, lambda k: k * (k + 1) // 2),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_number_of_coefficients(form: str, count: Callable, softmax_size: Callable, k: int) -> None:
    names = ("gelu", "silu", "relu2", "leaky_relu", "tanh", "relu", "identity")[:k]
    mixture = MixtureConfig(form=form, activations=names)
    assert mixture.num_coefficients == count(k) == len(set(mixture.coefficient_names))
    assert mixture.softmax_size == softmax_size(k)
    assert len(list(mixture.start_values())) == count(k)


@pytest.mark.parametrize(
    ("form", "dictionary", "coefficients"),
    [
        ("type1", "gelu silu relu2 leaky_relu relu", 5),
        ("one-sided", "gelu silu relu2 leaky_relu tanh relu identity", 7),
        ("bi-sided", "gelu silu relu2 leaky_relu tanh relu identity", 14),
        ("quadratic", "gelu silu relu2 identity", 10),
    ],
)
def test_default_dictionaries_are_the_papers(form: str, dictionary: str, coefficients: int) -> None:
    mixture = MixtureConfig(form=form)
    assert mixture.activations == tuple(dictionary.split())
    assert mixture.num_coefficients == coefficients


def test_default_initial_values_are_the_papers() -> None:
    mixture = MixtureConfig(kind="la", form="quadratic")
    assert list(mixture.start_values()) == [1.0] * 10
    assert (mixture.gate_init_std, mixture.init_scale) == (0.02, "paper")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("type1", "silu relu2 identity"),
        ("one-sided", "linear.silu linear.relu2 linear.identity"),
        ("bi-sided", "silu relu2 identity linear.silu linear.relu2 linear.identity"),
        ("quadratic", "silu*silu silu*relu2 silu*identity relu2*relu2 relu2*identity identity*identity"),
    ],
)
def test_coefficients_are_named_in_their_order(form: str, names: str) -> None:
    assert MixtureConfig(form=form, activations=("silu", "relu2", "identity")).coefficient_names == tuple(names.split())


def test_lists_and_a_single_number_are_sequences_too() -> None:
    tuples = MixtureConfig("la", activations=("silu", "relu"), initial_coefficients=(0.5,))
    others = MixtureConfig("la", activations=["silu", "relu"], initial_coefficients=0.5)
    assert others == tuples
    assert hash(others) == hash(tuples)


@pytest.mark.parametrize("scale", [1e-30, 1e4])
@pytest.mark.parametrize("kind", MIXINGS)
@pytest.mark.parametrize("form", FORMS)
def test_numbers_at_both_ends_give_finite_parameters(form: str, kind: str, scale: float) -> None:
    settings = {"gate_init_std": scale, "amplitude": "learned"} if kind == "moa" else {}
    mixture = MixtureConfig(kind, form, initial_coefficients=scale, init_scale="matched", **settings)
    layer = MixedFeedForward(64, 8, mixture, dtype=torch.float16 if kind == "moa" else None)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_any_subset_in_any_order() -> None:
    assert MixtureConfig(activations=("tanh", "one", "relu3")).activations == ("tanh", "one", "relu3")


OUT_OF_RANGE = (1e300, 1e39, 1e-46, 10**400, -(10**400), float("inf"), float("nan"))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"kind": "mao"}, ["--moa-mixing mao", "la, moa"]),
        ({"form": "two-sided"}, ["--moa-form two-sided", "bi-sided"]),
        ({"gate": "relu"}, ["--moa-gate relu", "softmax"]),
        ({"amplitude": "free"}, ["--moa-amplitude free", "learned"]),
        ({"init_scale": "swiglu"}, ["--moa-init-scale swiglu", "paper, matched"]),
        ({"backend": "cuda"}, ["--moa-backend cuda", "compile"]),
        ({"activations": ("silu", "swish")}, ["--moa-activations swish", "unknown", "gelu_tanh"]),
        ({"activations": ("silu", "relu", "silu")}, ["--moa-activations silu", "twice"]),
        ({"activations": ("silu",), "gate": "softmax"}, ["--moa-gate softmax", "silu", "sigmoid"]),
        ({"kind": "la", "initial_coefficients": (1.0, 2.0)}, ["--moa-init 1 2", "14"]),
        ({"kind": "la", "initial_coefficients": (float("nan"),)}, ["--moa-init nan", "finite"]),
        ({"initial_coefficients": (0.5,)}, ["--moa-init 0.5", "--moa-amplitude learned"]),
        ({"kind": "la", "gate": "tanh"}, ["--moa-gate tanh", "--moa-mixing moa"]),
        ({"kind": "la", "gate_bias": True}, ["--moa-gate-bias:", "--moa-mixing moa"]),
        ({"kind": "la", "amplitude": "learned"}, ["--moa-amplitude learned", "--moa-mixing moa"]),
        ({"kind": "la", "gate_init_std": 0.1}, ["--moa-gate-init-std 0.1", "--moa-mixing moa"]),
        ({"gate_init_std": -0.1}, ["--moa-gate-init-std -0.1", "positive"]),
        ({"gate_init_std": float("inf")}, ["--moa-gate-init-std inf", "positive"]),
        *(({"gate_init_std": value}, ["--moa-gate-init-std", "from 1e-30 to 10000"]) for value in OUT_OF_RANGE),
        *(
            ({**given, "initial_coefficients": value}, ["--moa-init", "from 1e-30 to 10000"])
            for value in OUT_OF_RANGE
            for given in ({"kind": "la"}, {"amplitude": "learned"})
        ),
        ({"kind": "la", "initial_coefficients": torch.ones(14)}, ["initial_coefficients=tensor([1.", "one number"]),
        ({"form": torch.ones(50)}, ["--moa-form tensor([1.", "bi-sided"]),
        ({"activations": ("si\nlu",)}, ["--moa-activations si\\nlu", "unknown"]),
        ({"gate_init_std": "0.02"}, ["gate_init_std='0.02'", "a number"]),
        ({"gate_init_std": True}, ["gate_init_std=True", "a number"]),
        ({"activations": "silu"}, ["activations='silu'", "several names, such as ('silu', 'tanh')"]),
        ({"activations": None}, ["activations=None", "several names"]),
        ({"activations": ("silu", 1)}, ["activations=('silu', 1)", "several names"]),
        ({"kind": "la", "initial_coefficients": "1"}, ["initial_coefficients='1'", "one number, or several"]),
        (
            {"kind": "la", "initial_coefficients": [1, None]},
            ["initial_coefficients=(1, None)", "one number, or several"],
        ),
        ({"form": None}, ["--moa-form None", "bi-sided"]),
        *(
            ({name: "no"}, [f"{name}='no'", "True or False"])
            for name in ("gate_bias", "freeze", "recompute", "overwrite")
        ),
    ],
)
def test_illegal_settings_are_one_line(settings: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        MixtureConfig(**settings)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"form": "two-sided"}, "--moa-form is form"),
        ({"kind": "la", "gate_init_std": 0.1}, "--moa-mixing is kind, --moa-gate-init-std is gate_init_std"),
        ({"amplitude": "learned", "initial_coefficients": 1e300}, "--moa-init is initial_coefficients"),
        ({"backend": "cuda"}, "--moa-backend is backend"),
    ],
)
def test_a_traceback_says_what_flags_are_in_python(settings: dict, note: str) -> None:
    with pytest.raises(UserError) as error:
        MixtureConfig(**settings)
    assert error.value.__notes__ == [f"In Python, of MixtureConfig: {note}"]


def test_form_must_fit_the_unit() -> None:
    check_form("quadratic", True)
    check_form("type1", False)
    with pytest.raises(UserError, match=r"--moa-form type1: .*drop --swiglu"):
        check_form("type1", True)
    with pytest.raises(UserError, match=r"--moa-form one-sided: .*add --swiglu"):
        check_form("one-sided", False)
    with pytest.raises(UserError, match="--moa-form three-sided: unknown"):
        check_form("three-sided", True)


@pytest.mark.parametrize(
    ("gated", "experts", "form", "reason"),
    [
        (False, False, "type1", "no --swiglu"),
        (False, True, "type1", "no --swiglu"),
        (True, False, "bi-sided", "a dense model"),
        (True, True, "one-sided", "routed experts"),
    ],
)
def test_the_form_for_a_model(gated: bool, experts: bool, form: str, reason: str) -> None:
    assert auto_form(gated, experts) == (form, reason)
