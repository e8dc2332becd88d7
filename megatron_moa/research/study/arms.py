"""Lists the arms of a study: each a feed-forward layer, as flags of pretrain_gpt_moa.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_moa.command_line.flags import mixture_defaults
from megatron_moa.command_line.words import flag_groups
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.mixture.start_scale import output_scale
from megatron_moa.research.study.paper import TABLE_1, TABLE_2
from megatron_moa.research.study.values import Count, Natural, NotNegative, Positive

# Over how much wider a layer of one matrix less is, for the same number of parameters: 3 h f = 2 h (3/2 f).
_UNGATED_WIDTH = 1.5
_OTHER_SEEDS = 1000
_HALF = (0.5,)  # where sigmoid gates start near


@dataclass(frozen=True)
class Size:
    """A model of a study.

    Attributes:
        name: in the study's file and in results.
        layers, hidden, ffn, heads: of the model; ``ffn`` is a gated layer's width (of a MoE: a routed expert's).
        sequence, batch: tokens of a sample, samples of an iteration.
        micro_batch: samples at once; 0: all of an iteration's.
        init_std: ``--init-method-std``.
        gate_init_std: ``--moa-gate-init-std``; 0: as ``init_std``, so that logits are as large as pre-activations.
        recipe: the name of a model in examples/models, which the rest is taken from; empty: none.
        flags: further ones, such as those of a MoE.
    """

    name: str
    layers: Count
    hidden: Count
    ffn: Count
    heads: Count
    sequence: Count = 128
    batch: Count = 16
    micro_batch: Natural = 0
    init_std: Positive = 0.06
    gate_init_std: NotNegative = 0.0
    recipe: str = ""
    flags: tuple[str, ...] = ()

    @property
    def ungated_ffn(self) -> int:
        """Returns the width of a layer without a gated unit.

        It is 4 h beside the paper's int(8 h / 3), else what gives as many parameters.
        """
        return 4 * self.hidden if self.ffn == 8 * self.hidden // 3 else round(self.ffn * _UNGATED_WIDTH)

    @property
    def gate_std(self) -> float:
        """Standard deviation of gate vectors at step 0."""
        return self.gate_init_std or self.init_std


@dataclass(frozen=True)
class Arm:
    """A feed-forward layer to compare.

    Attributes:
        name: in the study's file and in results.
        title: for tables and pictures.
        mixture: None for stock Megatron.
        fixed: a stock layer's activation: ``swiglu``, ``relu2`` or ``gelu``.
        drawn_as: the family that it is drawn with, where that is not its layer's own.
        unmatched: of an arm whose output scale is matched, the same arm with the paper's values at the start.
        as_large_as: the arm whose output's mean square at step 0 this fixed layer gets.
        widened: ``parameters`` or ``time``: as wide as it takes to have bi-sided MoA's; ``half``: half as wide.
        other_seeds: whether its seeds are others than those of the same number elsewhere.
    """

    name: str
    title: str
    mixture: MixtureConfig | None = None
    fixed: str = "swiglu"
    drawn_as: str | None = None
    unmatched: str | None = None
    as_large_as: str | None = None
    widened: str | None = None
    other_seeds: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether its layers are Type II."""
        return self.fixed == "swiglu" if self.mixture is None else self.mixture.gated

    @property
    def family(self) -> str:
        """What it is drawn and listed with: its activation, ``la``, ``moa``, or what it names."""
        return self.drawn_as or (self.fixed if self.mixture is None else self.mixture.kind)

    @property
    def baseline(self) -> str:
        """The paper's baseline for it: SwiGLU for Type II, ReLU2 for Type I."""
        return "swiglu" if self.is_gated else "relu2"

    def width(self, size: Size, time_width: int | None = None) -> int:
        """f of this arm's layers.

        Args:
            size: the model's.
            time_width: f at which SwiGLU's step takes as long as bi-sided MoA's, as measured.

        Raises:
            ValueError: it is needed and not there.
        """
        if self.widened == "time":
            if time_width is None:
                raise ValueError(f"{self.name}: the width of equal step time has not been measured")
            return time_width
        if self.widened == "parameters":  # a hidden unit has 3 h of them, a gate h
            return size.ffn + math.ceil(ARMS["moa-bi-sided"].mixture.num_coefficients / 3)
        if self.widened == "half":
            return size.ffn // 2
        return size.ffn if self.is_gated else size.ungated_ffn

    def seed(self, number: int) -> int:
        """``--seed`` of the run that a study calls seed ``number``."""
        return number + _OTHER_SEEDS if self.other_seeds else number

    def shared_flags(self, flags: Sequence[str]) -> list[str]:
        """Leaves a study's flags about mixtures, such as ``--moa-backend``, out of an arm that has none."""
        own = {"--" + name.replace("_", "-") for name in mixture_defaults()} if self.mixture is None else set()
        return [word for words in flag_groups(flags) if words[0] not in own for word in words]

    def flags(self, size: Size) -> list[str]:
        """Of pretrain_gpt_moa.py, without the width."""
        if self.mixture is None:
            return ["--moa-mixing", "none", *{"swiglu": ["--swiglu"], "relu2": ["--squared-relu"]}.get(self.fixed, [])]
        mixture = self.mixture
        if self.as_large_as is not None:
            start = _scale(ARMS[self.as_large_as].mixture, size) / _scale(mixture, size)
            mixture = replace(mixture, initial_coefficients=(float(f"{start:.6g}"),))
        if mixture.kind == "moa":
            mixture = replace(mixture, gate_init_std=size.gate_std)
        return [*(["--swiglu"] if mixture.gated else []), *mixture.to_flags()]


def _scale(mixture: MixtureConfig, size: Size) -> float:
    """How large a mixture is at step 0 in a model of that size (see :func:`output_scale`)."""
    if mixture.kind == "moa":
        mixture = replace(mixture, gate_init_std=size.gate_std)
    return output_scale(mixture, size.init_std, size.hidden)


def _mixed(name: str, title: str, mixture: MixtureConfig, drawn_as: str | None = None) -> tuple[Arm, Arm]:
    """Returns a mixture's two arms: one with the paper's values at the start, and NAME-matched.

    The latter starts with the output scale of SwiGLU or GELU.
    """
    arm = Arm(name, title, mixture, drawn_as=drawn_as)
    matched = f"{title}, scale matched to {'SwiGLU' if mixture.gated else 'GELU'}"
    started = replace(mixture, init_scale="matched")
    return arm, replace(arm, name=f"{name}-matched", title=matched, mixture=started, unmatched=name)


def _scaled(fixed: str, title: str, form: str, activation: str, like: str) -> Arm:
    """A fixed layer as an LA of one activation whose coefficient is not trained."""
    mixture = MixtureConfig("la", form, (activation,), freeze=True)
    return Arm(f"{fixed}-scaled", title, mixture, drawn_as=fixed, as_large_as=like)


def _of_every_form() -> Iterator[Arm]:
    """Yields LA and MoA of every form: the paper's own arms, and each with its scale matched.

    They have every kind of gate that the paper's tables have of their form.
    """
    for form in FORMS:
        words = "Type I" if form == "type1" else form
        yield from _mixed(f"la-{form}", f"{words} LA", MixtureConfig("la", form))
        yield from _mixed(f"moa-{form}", f"{words} MoA", MixtureConfig("moa", form))
        for gate in GATES:
            if (name := f"moa-{form}-{gate}") in {**TABLE_1, **TABLE_2}:
                yield from _mixed(name, f"{words} MoA, {gate} gates", MixtureConfig("moa", form, gate=gate))


# Started as arXiv 2411.03884 says: 0 for the constant, 1/3 for the powers.
_POLYRELU = MixtureConfig(
    "la", "type1", ("one", "relu", "relu2", "relu3"), initial_coefficients=(0.0, 1 / 3, 1 / 3, 1 / 3)
)

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        # The paper's baselines, of Type II and Type I.
        Arm("swiglu", "SwiGLU"),
        Arm("relu2", "ReLU2", fixed="relu2"),
        *_of_every_form(),
        # SwiGLU at MoA's cost; the paper's is 5 wider.
        Arm("swiglu-params", "SwiGLU, bi-sided MoA's parameters", widened="parameters"),
        Arm("swiglu-time", "SwiGLU, bi-sided MoA's step time", widened="time"),
        # Ours. The same arm under another name, of which seeds alone differ, and one that must be worse.
        Arm("swiglu-again", "SwiGLU, other seeds", other_seeds=True),
        Arm("swiglu-half", "SwiGLU, half as wide", widened="half"),
        # Ours. How much is the scale at step 0?
        _scaled("swiglu", "SwiGLU, scaled up as bi-sided MoA", "one-sided", "identity", "moa-bi-sided"),
        _scaled("relu2", "ReLU2, scaled up as Type I MoA", "type1", "relu2", "moa-type1"),
        Arm("la-bi-sided-half", "bi-sided LA from 0.5", MixtureConfig("la", "bi-sided", initial_coefficients=_HALF)),
        Arm("la-type1-half", "Type I LA from 0.5", MixtureConfig("la", "type1", initial_coefficients=_HALF)),
        # Ours. How much is the gates' training?
        *_mixed("moa-bi-sided-frozen", "bi-sided MoA, gates frozen", MixtureConfig("moa", "bi-sided", freeze=True)),
        # Another work's mixture, and the fixed layer whose scale a matched Type I has.
        *_mixed("polyrelu", "PolyReLU", _POLYRELU, drawn_as="polyrelu"),
        Arm("gelu", "GELU", fixed="gelu"),
    )
}
# The arm whose output scale is matched, by the same with the paper's values at the start.
MATCHED = {arm.unmatched: name for name, arm in ARMS.items() if arm.unmatched is not None}
# The mixtures that reports speak of first: with the paper's values at the start, then matched.
MAIN_LA, MAIN_MOA = ((name, MATCHED[name]) for name in ("la-bi-sided", "moa-bi-sided"))
# What is drawn where all arms would hide one another.
CHIEF_ARMS = (
    *("swiglu", "relu2", "swiglu-scaled", "swiglu-params", "swiglu-time"),
    *(name for pair in zip(MAIN_LA, MAIN_MOA, strict=True) for name in pair),
    *("moa-type1", "moa-one-sided", "moa-quadratic"),
)


def by_gate(name: str) -> dict[str, str]:
    """Returns the arms that differ from a MoA in nothing but the gate, by that gate."""
    own = ARMS[name].mixture
    moas = {arm.name: arm.mixture for arm in ARMS.values() if arm.mixture is not None and arm.mixture.kind == "moa"}
    return {m.gate: other for other, m in moas.items() if own not in (None, m) and replace(m, gate=own.gate) == own}
