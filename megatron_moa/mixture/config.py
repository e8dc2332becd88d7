"""Holds the settings of a mixture, and checks them.

Defaults are the paper's dictionaries and start values.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from megatron_moa.errors import UserError, printable

# Of what a mixture's checkpoints and exports hold: raised when an older reader would misread a newer one. Version 2
# has the paper's one-sided and quadratic forms.
FORMAT_VERSION = 2
# Forms of version 1 that compute another function than today's of that name, and how.
CHANGED_FORMS = {
    "one-sided": "it mixed W1's branch and left W2's linear, where SiLU now stays on W1's and W2's is mixed",
    "quadratic": "it had K² coefficients, where now K(K+1)/2 are left, those of k <= l",
}

# The activations that a dictionary may name; megatron_moa.mixture.reference defines them.
ACTIVATION_NAMES = (
    "identity",
    "gelu",
    "silu",
    "relu",
    "leaky_relu",
    "relu2",
    "tanh",
    "gelu_tanh",
    "elu",
    "selu",
    "mish",
    "sigmoid",
    "relu3",
    "one",
)
MIXINGS = ("la", "moa")
FORMS = ("type1", "one-sided", "bi-sided", "quadratic")
GATES = ("sigmoid", "softmax", "tanh")
AMPLITUDES = ("fixed", "learned")
INIT_SCALES = ("paper", "matched")
BACKENDS = ("auto", "triton", "compile", "eager")

# The best dictionaries of the paper's table 1. Identity is last (ours): SwiGLU is the pair (silu, identity), and the
# quadratic form has no pair (identity, silu).
DICTIONARIES = {
    "type1": ("gelu", "silu", "relu2", "leaky_relu", "relu"),
    "one-sided": ("gelu", "silu", "relu2", "leaky_relu", "tanh", "relu", "identity"),
    "bi-sided": ("gelu", "silu", "relu2", "leaky_relu", "tanh", "relu", "identity"),
    "quadratic": ("gelu", "silu", "relu2", "identity"),
}

# The paper's initial values (section 5).
DEFAULT_INITIAL_COEFFICIENT = 1.0
DEFAULT_GATE_INIT_STD = 0.02

# What each setting of a MixtureConfig is called in Megatron's args; its flag has dashes instead.
ARGS = {
    "kind": "moa_mixing",
    "form": "moa_form",
    "activations": "moa_activations",
    "gate": "moa_gate",
    "gate_bias": "moa_gate_bias",
    "amplitude": "moa_amplitude",
    "initial_coefficients": "moa_init",
    "gate_init_std": "moa_gate_init_std",
    "init_scale": "moa_init_scale",
    "freeze": "moa_freeze_gates",
}
_FLAGS = {setting: "--" + name.replace("_", "-") for setting, name in ARGS.items()} | {
    "recompute": "--moa-recompute",
    "overwrite": "--moa-overwrite-preactivation",
    "backend": "--moa-backend",
}


class SettingError(UserError):
    """A mistake in a mixture's settings, whose text names flags.

    A note, which a traceback shows and a command's one line does not, has their names in Python.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        named = re.findall("--moa-[a-z-]*[a-z]", text)
        settings = [f"{flag} is {setting}" for setting, flag in _FLAGS.items() if flag in named]
        if settings:
            self.add_note(f"In Python, of MixtureConfig: {', '.join(settings)}")


# Of the numbers that parameters start from, in magnitude: with these and their products float32 stays finite, and
# numbers that are drawn from a normal distribution fit into float16.
SMALLEST, LARGEST = 1e-30, 1e4


def _require_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise SettingError(f"{flag} {printable(str(value))}: unknown; choose one of {', '.join(choices)}")


def in_range(value: float) -> bool:
    """Tells whether a number is one to start from.

    Such a number is 0, or of a magnitude from :data:`SMALLEST` to :data:`LARGEST`.
    """
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def is_number(value: object) -> bool:
    """Whether it is a real number of Python's or NumPy's, and not True or False."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # of a whole number
        return math.inf if value > 0 else -math.inf


def _are(is_right: Callable[[object], bool], values: object) -> bool:
    return isinstance(values, tuple) and all(map(is_right, values))


# Of each setting that is no choice: whether a value is of its type, and what to give instead.
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "activations": (partial(_are, lambda value: isinstance(value, str)), "several names, such as ('silu', 'tanh')"),
    "initial_coefficients": (partial(_are, is_number), "one number, or several"),
    "gate_init_std": (is_number, "a number"),
    **dict.fromkeys(
        ("gate_bias", "freeze", "recompute", "overwrite"), (lambda value: isinstance(value, bool), "True or False")
    ),
}


@dataclass(frozen=True)
class MixtureConfig:
    """How the feed-forward layers of a model mix activations (docs/mixture.md has the equations).

    Attributes:
        kind: ``moa``, coefficients from token-dependent gates, or ``la``, coefficients that are free parameters.
        form: ``type1``, ``one-sided``, ``bi-sided`` or ``quadratic``; the last three need a gated linear unit.
        activations: names from :data:`ACTIVATION_NAMES`, in order; empty means the default
            dictionary of the form.
        gate: the gates' nonlinearity psi (MoA).
        gate_bias: whether gates have a bias b_k (MoA).
        amplitude: ``learned`` gives c_k = a_k psi_hat(u_k x + b_k) with psi_hat(0) = 1 (MoA).
        initial_coefficients: one value, or all n, from which the LA coefficients or the learned amplitudes start.
        gate_init_std: standard deviation of the normal distribution that gate vectors are drawn from (MoA).
        init_scale: ``paper`` leaves the initial values as they are; ``matched`` scales the coefficients so that the
            layer's output has the variance of SwiGLU's (GELU's for ``type1``) at step 0.
        freeze: keeps gates, amplitudes and LA coefficients as they start.
        recompute: keeps fc1's output and drops the mixture's, which backward computes again.
        overwrite: backward writes the gradient of fc1's output where that lay.
        backend: ``eager``, ``compile``, ``triton``, or ``auto`` for the fastest that is there.

    Raises:
        SettingError: a UserError for an invalid setting; the text names the flag, the value and the remedy.
    """

    kind: str = "moa"
    form: str = "bi-sided"
    activations: tuple[str, ...] = ()
    gate: str = "sigmoid"
    gate_bias: bool = False
    amplitude: str = "fixed"
    initial_coefficients: tuple[float, ...] = (DEFAULT_INITIAL_COEFFICIENT,)
    gate_init_std: float = DEFAULT_GATE_INIT_STD
    init_scale: str = "paper"
    freeze: bool = False
    recompute: bool = False
    overwrite: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        self._check_types()
        _require_choice("--moa-mixing", self.kind, MIXINGS)
        _require_choice("--moa-form", self.form, FORMS)
        _require_choice("--moa-gate", self.gate, GATES)
        _require_choice("--moa-amplitude", self.amplitude, AMPLITUDES)
        _require_choice("--moa-init-scale", self.init_scale, INIT_SCALES)
        _require_choice("--moa-backend", self.backend, BACKENDS)
        if not self.activations:
            object.__setattr__(self, "activations", DICTIONARIES[self.form])
        self._check_activations()
        self._check_initial_coefficients()
        if not (in_range(self.gate_init_std) and self.gate_init_std >= 0):
            raise SettingError(
                f"--moa-gate-init-std {self.gate_init_std:g}: give 0, or a positive number from {SMALLEST:g} to "
                f"{LARGEST:g} such as {DEFAULT_GATE_INIT_STD}"
            )
        if self.kind == "la":
            self._refuse_gate_settings()
        elif self.gate == "softmax" and self.softmax_size == 1:
            raise SettingError(
                f"--moa-gate softmax: over the single activation {self.activations[0]} it is the constant 1; "
                "name two or more --moa-activations, or take --moa-gate sigmoid"
            )

    def _check_types(self) -> None:
        if is_number(self.initial_coefficients):
            object.__setattr__(self, "initial_coefficients", (self.initial_coefficients,))
        for name in ("activations", "initial_coefficients"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (is_right, right) in _TYPES.items():
            if not is_right(getattr(self, name)):
                shown = printable(repr(getattr(self, name)))
                raise SettingError(f"MixtureConfig({name}={shown}): give {right}")
        object.__setattr__(self, "initial_coefficients", tuple(map(_float, self.initial_coefficients)))
        object.__setattr__(self, "gate_init_std", _float(self.gate_init_std))

    def _check_activations(self) -> None:
        for position, name in enumerate(self.activations):
            if name not in ACTIVATION_NAMES:
                raise SettingError(
                    f"--moa-activations {printable(name)}: unknown; choose from {', '.join(ACTIVATION_NAMES)}"
                )
            if name in self.activations[:position]:
                raise SettingError(f"--moa-activations {name}: named twice; name each activation once")

    def _check_initial_coefficients(self) -> None:
        values = self.initial_coefficients
        text = " ".join(f"{value:g}" for value in values)
        if len(values) not in (1, self.num_coefficients):
            raise SettingError(
                f"--moa-init {text}: {len(values)} values; give one, or {self.num_coefficients} "
                f"({self.form} over {self.num_activations} activations)"
            )
        if not all(map(in_range, values)):
            raise SettingError(
                f"--moa-init {text}: give finite numbers, each 0 or of a magnitude from {SMALLEST:g} to {LARGEST:g}"
            )
        has_no_effect = self.kind == "moa" and self.amplitude == "fixed"
        if has_no_effect and values != (DEFAULT_INITIAL_COEFFICIENT,):
            raise SettingError(
                f"--moa-init {text}: has no effect on gates of fixed amplitude; "
                "add --moa-amplitude learned, or take --moa-mixing la"
            )

    def _refuse_gate_settings(self) -> None:
        for flag, value, neutral in (
            ("--moa-gate", self.gate, "sigmoid"),
            ("--moa-gate-bias", self.gate_bias, False),
            ("--moa-amplitude", self.amplitude, "fixed"),
            ("--moa-gate-init-std", self.gate_init_std, DEFAULT_GATE_INIT_STD),
        ):
            if value != neutral:
                shown = flag if value is True else f"{flag} {value}"
                raise SettingError(f"{shown}: --moa-mixing la has no gates; drop the flag, or take --moa-mixing moa")

    @classmethod
    def from_args(cls, args: Any, **execution: Any) -> Self | None:
        """The mixture of Megatron's args, a run's or a checkpoint's; None for ``--moa-mixing none``.

        Args:
            args: a namespace with the names of :data:`ARGS`; None stands for the default dictionary and initial value.
            execution: ``recompute``, ``overwrite``, ``backend``, which no checkpoint decides.

        Raises:
            UserError: an invalid setting.
            AttributeError: one is missing.
        """
        if getattr(args, ARGS["kind"], "none") == "none":
            return None
        settings = {setting: getattr(args, name) for setting, name in ARGS.items()}
        for name in ("activations", "initial_coefficients"):
            settings[name] = tuple(settings[name] or getattr(cls, name))
        return cls(**settings, **execution)

    def to_args(self) -> dict[str, Any]:
        """What a checkpoint's args hold of the mixture; :meth:`from_args` takes it back."""
        return {name: _plain(getattr(self, setting)) for setting, name in ARGS.items()}

    def to_flags(self) -> list[str]:
        """The mixture as words of a command line; settings that have no effect are left out."""
        unused = set() if self.kind == "moa" else {"gate", "gate_bias", "amplitude", "gate_init_std"}
        if self.kind == "moa" and self.amplitude == "fixed":
            unused.add("initial_coefficients")
        words: list[str] = []
        for setting in ARGS:
            value = _plain(getattr(self, setting))
            if setting in unused or value is False:
                continue
            words.append(_FLAGS[setting])
            words += [] if value is True else map(_word, value if isinstance(value, list) else [value])
        return words

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **execution: Any) -> Self:
        """The mixture that a config.json holds (:meth:`to_json`); settings that it lacks have their defaults.

        Args:
            settings: by the names of :meth:`to_json`.
            execution: as in :meth:`from_args`.

        Raises:
            UserError: an invalid setting.
            TypeError: an unknown name.
        """
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        if "mixing" in given:
            given["kind"] = given.pop("mixing")
        return cls(**given, **execution)

    def to_json(self) -> dict[str, Any]:
        """What decides the function, as a config.json holds it; where the parameters start is no part of it."""
        names = ("form", "activations", *(("gate", "gate_bias", "amplitude") if self.kind == "moa" else ()))
        return {"mixing": self.kind} | {name: _plain(getattr(self, name)) for name in names}

    @property
    def gated(self) -> bool:
        """Whether fc1's output has two halves, y = W1 x and z = W2 x (Type II), as SwiGLU's has."""
        return self.form != "type1"

    @property
    def num_activations(self) -> int:
        """K, the size of the dictionary."""
        return len(self.activations)

    @property
    def num_coefficients(self) -> int:
        """n, the mixing coefficients of a layer (or of an expert)."""
        if self.form == "quadratic":
            return self.num_activations * (self.num_activations + 1) // 2
        return self.num_activations * (2 if self.form == "bi-sided" else 1)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(k, l), k <= l, row-major: the quadratic form's coefficients, k on W1's side and l on W2's."""
        size = self.num_activations
        # No itertools: torch.compile has to trace this.
        return tuple((first, second) for first in range(size) for second in range(first, size))

    @property
    def softmax_size(self) -> int:
        """Entries that one softmax gate normalises over: a branch's K, or all K(K+1)/2 of the quadratic form."""
        return self.num_coefficients if self.form == "quadratic" else self.num_activations

    @property
    def has_scale(self) -> bool:
        """Whether gates carry a constant factor: they start at another scale, which no amplitude can hold."""
        return self.kind == "moa" and self.init_scale == "matched" and self.amplitude == "fixed"

    @property
    def psi_hat(self) -> tuple[float, float]:
        """Returns (slope, offset) of psi_hat = slope psi + offset, the gate of learned amplitudes.

        With these, psi_hat(0) = 1.
        """
        return {"sigmoid": (2.0, 0.0), "softmax": (float(self.softmax_size), 0.0), "tanh": (1.0, 1.0)}[self.gate]

    @property
    def coefficient_names(self) -> tuple[str, ...]:
        """A name for each of the n coefficients, in their order: ``silu``, ``linear.silu`` (of W2's branch),
        ``silu*identity``.
        """
        names = self.activations
        if self.form == "quadratic":
            return tuple(f"{names[first]}*{names[second]}" for first, second in self.pairs)
        linear = tuple(f"linear.{name}" for name in names)
        return {"type1": names, "one-sided": linear, "bi-sided": names + linear}[self.form]

    def start_values(self) -> Iterator[float]:
        """The n values LA coefficients and learned amplitudes start from."""
        values = self.initial_coefficients
        return iter(values * self.num_coefficients if len(values) == 1 else values)

    def describe(self) -> str:
        """The settings in a few words, as the training script prints them."""
        parts = [self.kind, self.form, "+".join(self.activations)]
        if self.kind == "moa":
            gate = f"{self.gate} gates" + (" with bias" if self.gate_bias else "")
            parts.append(gate + (" and learned amplitude" if self.amplitude == "learned" else ""))
        if self.freeze:
            parts.append("frozen")
        if self.init_scale == "matched":
            parts.append(f"output scale at step 0 matched to {'SwiGLU' if self.gated else 'GELU'}'s")
        return ", ".join(parts)


def _plain(value: Any) -> Any:
    """A setting as argparse and JSON have it."""
    return list(value) if isinstance(value, tuple) else value


def _word(value: object) -> str:
    """A value on a command line, where a float is read back as the same number."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def auto_form(gated_linear_unit: bool, routed_experts: bool) -> tuple[str, str]:
    """What ``--moa-form auto`` stands for, and why: our choice, after the paper's results (section 5).

    Bi-sided is its best form in dense models and gained nothing in MoE models, where one-sided and quadratic did.
    """
    if not gated_linear_unit:
        return "type1", "no --swiglu"
    return ("one-sided", "routed experts") if routed_experts else ("bi-sided", "a dense model")


def check_form(form: str, gated_linear_unit: bool) -> None:
    """Raises UserError for a gated form without ``--swiglu``, or ``type1`` with it."""
    _require_choice("--moa-form", form, ("auto", *FORMS))
    if form == "type1" and gated_linear_unit:
        raise SettingError("--moa-form type1: has no linear branch; drop --swiglu, or take --moa-form one-sided")
    if form != "type1" and not gated_linear_unit:
        raise SettingError(f"--moa-form {form}: needs a gated linear unit; add --swiglu, or take --moa-form type1")


def refuse_changed_form(form: str, where: str) -> None:
    """Raises UserError if a mixture of format version 1 has a form that means another function today.

    Args:
        form: the mixture's.
        where: the checkpoint or export, for the message.
    """
    if form in CHANGED_FORMS:
        raise UserError(
            f"{where}: its {form} form is of format version 1, in which {CHANGED_FORMS[form]}; train it anew, or use "
            "the megatron_moa 0.1 that wrote it"
        )
