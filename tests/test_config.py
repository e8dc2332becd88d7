"""MixingConfig: what is legal, what is counted, and the one line for what is not legal."""

from __future__ import annotations

import pytest

from megatron_moa.config import GATED_DICTIONARY, TYPE1_DICTIONARY, MixingConfig, resolve_form
from megatron_moa.errors import UserError


@pytest.mark.parametrize(("form", "expected"), [("type1", 6), ("one-sided", 7), ("bi-sided", 14), ("quadratic", 49)])
def test_number_of_coefficients(form: str, expected: int) -> None:
    mixing = MixingConfig(form=form)
    assert mixing.num_coefficients == expected == len(set(mixing.coefficient_names))
    assert len(list(mixing.start_values())) == expected


def test_default_dictionaries() -> None:
    assert MixingConfig(form="bi-sided").activations == GATED_DICTIONARY
    assert MixingConfig(form="type1").activations == TYPE1_DICTIONARY
    assert "identity" not in TYPE1_DICTIONARY


def test_any_subset_in_any_order() -> None:
    assert MixingConfig(activations=("tanh", "one", "relu3")).activations == ("tanh", "one", "relu3")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"mixing": "mao"}, ["--moa-mixing mao", "la, moa"]),
        ({"form": "two-sided"}, ["--moa-form two-sided", "bi-sided"]),
        ({"gate": "relu"}, ["--moa-gate relu", "softmax"]),
        ({"amplitude": "free"}, ["--moa-amplitude free", "learned"]),
        ({"init_scale": "half"}, ["--moa-init-scale half", "swiglu"]),
        ({"backend": "cuda"}, ["--moa-backend cuda", "compile"]),
        ({"activations": ("silu", "swish")}, ["--moa-activations swish", "unknown", "gelu_tanh"]),
        ({"activations": ("silu", "relu", "silu")}, ["--moa-activations silu", "twice"]),
        ({"activations": ("silu",), "gate": "softmax"}, ["--moa-gate softmax", "silu", "sigmoid"]),
        ({"mixing": "la", "initial_coefficients": (1.0, 2.0)}, ["--moa-la-init 1 2", "14"]),
        ({"mixing": "la", "initial_coefficients": (float("nan"),)}, ["--moa-la-init nan", "finite"]),
        ({"initial_coefficients": (1.0,)}, ["--moa-la-init 1", "--moa-amplitude learned"]),
        ({"mixing": "la", "gate": "tanh"}, ["--moa-gate tanh", "--moa-mixing moa"]),
        ({"mixing": "la", "gate_bias": True}, ["--moa-gate-bias:", "--moa-mixing moa"]),
        ({"mixing": "la", "amplitude": "learned"}, ["--moa-amplitude learned", "--moa-mixing moa"]),
    ],
)
def test_illegal_settings_are_one_line(settings: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        MixingConfig(**settings)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_form_must_fit_the_unit() -> None:
    assert resolve_form("auto", True) == "bi-sided"
    assert resolve_form("auto", False) == "type1"
    assert resolve_form("quadratic", True) == "quadratic"
    with pytest.raises(UserError, match=r"--moa-form type1: .*drop --swiglu"):
        resolve_form("type1", True)
    with pytest.raises(UserError, match=r"--moa-form one-sided: .*add --swiglu"):
        resolve_form("one-sided", False)
    with pytest.raises(UserError, match="--moa-form three-sided: unknown"):
        resolve_form("three-sided", True)
