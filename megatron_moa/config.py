"""Settings of a mixture of activations, and every check on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moa.errors import UserError
from megatron_moa.reference import DEFINITIONS

MIXINGS = ("la", "moa")
FORMS = ("type1", "one-sided", "bi-sided", "quadratic")
GATES = ("sigmoid", "softmax", "tanh")
AMPLITUDES = ("fixed", "learned")
INIT_SCALES = ("mixture", "swiglu")
BACKENDS = ("auto", "triton", "compile", "eager")

# The paper's dictionary for gated (Type II) FFNs; Type I leaves out the identity (our decision, docs/mixture.md).
GATED_DICTIONARY = ("identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")
TYPE1_DICTIONARY = GATED_DICTIONARY[1:]

# Where a sigmoid gate starts near, so that LA and MoA begin as the same function.
DEFAULT_INITIAL_COEFFICIENT = 0.5


def _require_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{flag} {value}: unknown; choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class MixingConfig:
    """How the feed-forward layers of a model mix activations (docs/mixture.md has the equations).

    Attributes:
        mixing: ``moa``, coefficients from token-dependent gates, or ``la``, coefficients that are free parameters.
        form: ``type1``, ``one-sided``, ``bi-sided`` or ``quadratic``; the last three need a gated linear unit.
        activations: names from :data:`megatron_moa.reference.DEFINITIONS`, in order; empty means the default
            dictionary of the form.
        gate: the gates' nonlinearity psi (MoA).
        gate_bias: whether gates have a bias b_k (MoA).
        amplitude: ``learned`` gives c_k = a_k psi_hat(u_k x + b_k) with psi_hat(0) = 1 (MoA).
        initial_coefficients: one value, or all n, from which the LA coefficients or the learned amplitudes start.
        init_scale: ``swiglu`` scales the coefficients so that the layer's output has the variance of SwiGLU's
            (GELU's for ``type1``) at step 0.
        freeze: keeps gates, amplitudes and LA coefficients as they start.
        recompute: keeps fc1's output and drops the mixture's, which backward computes again.
        overwrite: backward writes the gradient of fc1's output where that lay.
        backend: ``eager``, ``compile``, ``triton``, or ``auto`` for the fastest that is there.

    Raises:
        UserError: for a setting that cannot be; the text names the flag, the value and the remedy.
    """

    mixing: str = "moa"
    form: str = "bi-sided"
    activations: tuple[str, ...] = ()
    gate: str = "sigmoid"
    gate_bias: bool = False
    amplitude: str = "fixed"
    initial_coefficients: tuple[float, ...] = (DEFAULT_INITIAL_COEFFICIENT,)
    init_scale: str = "mixture"
    freeze: bool = False
    recompute: bool = False
    overwrite: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        _require_choice("--moa-mixing", self.mixing, MIXINGS)
        _require_choice("--moa-form", self.form, FORMS)
        _require_choice("--moa-gate", self.gate, GATES)
        _require_choice("--moa-amplitude", self.amplitude, AMPLITUDES)
        _require_choice("--moa-init-scale", self.init_scale, INIT_SCALES)
        _require_choice("--moa-backend", self.backend, BACKENDS)
        if not self.activations:
            object.__setattr__(self, "activations", GATED_DICTIONARY if self.gated else TYPE1_DICTIONARY)
        self._check_activations()
        self._check_initial_coefficients()
        if self.mixing == "la":
            self._refuse_gate_settings()
        elif self.gate == "softmax" and self.softmax_size == 1:
            raise UserError(
                f"--moa-gate softmax: over the single activation {self.activations[0]} it is the constant 1; "
                "name two or more --moa-activations, or take --moa-gate sigmoid"
            )

    def _check_activations(self) -> None:
        for position, name in enumerate(self.activations):
            if name not in DEFINITIONS:
                raise UserError(f"--moa-activations {name}: unknown; choose from {', '.join(DEFINITIONS)}")
            if name in self.activations[:position]:
                raise UserError(f"--moa-activations {name}: named twice; name each activation once")

    def _check_initial_coefficients(self) -> None:
        values = self.initial_coefficients
        text = " ".join(f"{value:g}" for value in values)
        if len(values) not in (1, self.num_coefficients):
            raise UserError(
                f"--moa-la-init {text}: {len(values)} values; give one, or {self.num_coefficients} "
                f"({self.form} over {self.num_activations} activations)"
            )
        if not all(math.isfinite(value) for value in values):
            raise UserError(f"--moa-la-init {text}: not finite; give ordinary numbers such as 0.5")
        has_no_effect = self.mixing == "moa" and self.amplitude == "fixed"
        if has_no_effect and values != (DEFAULT_INITIAL_COEFFICIENT,):
            raise UserError(
                f"--moa-la-init {text}: has no effect on gates of fixed amplitude; "
                "add --moa-amplitude learned, or take --moa-mixing la"
            )

    def _refuse_gate_settings(self) -> None:
        for flag, value, neutral in (
            ("--moa-gate", self.gate, "sigmoid"),
            ("--moa-gate-bias", self.gate_bias, False),
            ("--moa-amplitude", self.amplitude, "fixed"),
        ):
            if value != neutral:
                shown = flag if value is True else f"{flag} {value}"
                raise UserError(f"{shown}: --moa-mixing la has no gates; drop the flag, or take --moa-mixing moa")

    @property
    def gated(self) -> bool:
        """Whether the form multiplies an activated with a linear branch (Type II), as SwiGLU does."""
        return self.form != "type1"

    @property
    def num_activations(self) -> int:
        """K, the size of the dictionary."""
        return len(self.activations)

    @property
    def num_coefficients(self) -> int:
        """n, the mixing coefficients of a layer (or of an expert)."""
        return {
            "type1": self.num_activations,
            "one-sided": self.num_activations,
            "bi-sided": 2 * self.num_activations,
            "quadratic": self.num_activations**2,
        }[self.form]

    @property
    def softmax_size(self) -> int:
        """Entries that one softmax gate normalises over: a branch's K, or all K² of the quadratic form."""
        return self.num_coefficients if self.form == "quadratic" else self.num_activations

    @property
    def psi_hat(self) -> tuple[float, float]:
        """(slope, offset) of psi_hat = slope psi + offset, the gate of learned amplitudes, for which psi_hat(0) = 1."""
        return {"sigmoid": (2.0, 0.0), "softmax": (float(self.softmax_size), 0.0), "tanh": (1.0, 1.0)}[self.gate]

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        """A name for each of the n coefficients, in their order: ``silu``, ``linear.silu``, ``silu*tanh``."""
        if self.form == "quadratic":
            return tuple(f"{first}*{second}" for first in self.activations for second in self.activations)
        if self.form == "bi-sided":
            return self.activations + tuple(f"linear.{name}" for name in self.activations)
        return self.activations

    def start_values(self) -> Iterator[float]:
        """The n values LA coefficients and learned amplitudes start from."""
        values = self.initial_coefficients
        return iter(values * self.num_coefficients if len(values) == 1 else values)

    def describe(self) -> str:
        """The settings in a few words, as the training script prints them."""
        parts = [self.mixing, self.form, "+".join(self.activations)]
        if self.mixing == "moa":
            gate = f"{self.gate} gates" + (" with bias" if self.gate_bias else "")
            parts.append(gate + (" and learned amplitude" if self.amplitude == "learned" else ""))
        if self.freeze:
            parts.append("frozen")
        if self.init_scale != "mixture":
            parts.append(f"{self.init_scale} output scale at step 0")
        return ", ".join(parts)


def resolve_form(form: str, gated_linear_unit: bool) -> str:
    """``auto`` becomes ``bi-sided`` with a gated linear unit, else ``type1``; other forms must fit the unit.

    Raises:
        UserError: a gated form without ``--swiglu``, or ``type1`` with it.
    """
    if form == "auto":
        return "bi-sided" if gated_linear_unit else "type1"
    _require_choice("--moa-form", form, ("auto", *FORMS))
    if form == "type1" and gated_linear_unit:
        raise UserError("--moa-form type1: has no linear branch; drop --swiglu, or take --moa-form one-sided")
    if form != "type1" and not gated_linear_unit:
        raise UserError(f"--moa-form {form}: needs a gated linear unit; add --swiglu, or take --moa-form type1")
    return form
