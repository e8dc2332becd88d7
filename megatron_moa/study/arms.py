"""What is compared: the arms of a study, each a feed-forward layer, as flags of pretrain_gpt_moa.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_moa.config import MixingConfig
from megatron_moa.output_scale import output_scale

# Over how much wider a layer of one matrix less is, for the same number of parameters: 3 h f = 2 h (3/2 f).
_UNGATED_WIDTH = 1.5
_OTHER_SEEDS = 1000


@dataclass(frozen=True)
class Size:
    """A model of a study.

    Attributes:
        name: in the study's file and in results.
        layers, hidden, ffn, heads: of the model; ``ffn`` is a gated layer's width.
        sequence, batch: tokens of a sample, samples of an iteration.
        micro_batch: samples at once; 0: all of an iteration's.
        init_std: ``--init-method-std``.
        flags: further ones, such as those of a MoE.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    sequence: int = 128
    batch: int = 16
    micro_batch: int = 0
    init_std: float = 0.06
    flags: tuple[str, ...] = ()

    @property
    def preactivation_std(self) -> float:
        """Standard deviation of fc1's output at step 0, for a normalised input."""
        return self.init_std * self.hidden**0.5


@dataclass(frozen=True)
class Arm:
    """A feed-forward layer to compare.

    Attributes:
        name: in the study's file and in results.
        title: for tables and pictures.
        mixing: None for stock Megatron.
        gated: whether a stock layer is SwiGLU rather than GELU.
        as_large_as: the arm whose output's mean square at step 0 this fixed layer gets.
        widened: ``parameters`` or ``time``: as wide as it takes to have MoA's; ``half``: half as wide.
        other_seeds: whether its seeds are others than those of the same number elsewhere.
    """

    name: str
    title: str
    mixing: MixingConfig | None = None
    gated: bool = True
    as_large_as: str | None = None
    widened: str | None = None
    other_seeds: bool = False

    @property
    def is_gated(self) -> bool:
        return self.gated if self.mixing is None else self.mixing.gated

    def width(self, size: Size, time_width: int | None = None) -> int:
        """f of this arm's layers.

        Args:
            size: the model's.
            time_width: f at which SwiGLU's step takes as long as MoA's, as measured.

        Raises:
            ValueError: it is needed and not there.
        """
        if self.widened == "time":
            if time_width is None:
                raise ValueError(f"{self.name}: the width of equal step time has not been measured")
            return time_width
        if self.widened == "parameters":  # a hidden unit has 3 h of them, a gate h
            return size.ffn + math.ceil(ARMS["moa"].mixing.num_coefficients / 3)
        if self.widened == "half":
            return size.ffn // 2
        return size.ffn if self.is_gated else round(size.ffn * _UNGATED_WIDTH)

    def seed(self, number: int) -> int:
        """``--seed`` of the run that a study calls seed ``number``."""
        return number + _OTHER_SEEDS if self.other_seeds else number

    def flags(self, size: Size) -> list[str]:
        """Of pretrain_gpt_moa.py, without the width."""
        swiglu = ["--swiglu"] if self.is_gated else []
        if self.mixing is None:
            return ["--moa-mixing", "none", *swiglu]
        mixing = self.mixing
        start = list(mixing.initial_coefficients)
        if self.as_large_as is not None:
            start = [output_scale(ARMS[self.as_large_as].mixing, size.preactivation_std)]
        flags = ["--moa-mixing", mixing.mixing, "--moa-form", mixing.form, *swiglu]
        flags += ["--moa-activations", *mixing.activations, "--moa-init-scale", mixing.init_scale]
        if mixing.mixing == "moa":
            flags += ["--moa-gate", mixing.gate, "--moa-amplitude", mixing.amplitude]
            flags += ["--moa-gate-bias"] if mixing.gate_bias else []
        if mixing.mixing == "la" or mixing.amplitude == "learned":
            flags += ["--moa-la-init", *(f"{value:.6g}" for value in start)]
        return flags + (["--moa-freeze-gates"] if mixing.freeze else [])


def _mixed(name: str, title: str, mixing: MixingConfig) -> tuple[Arm, Arm]:
    """A mixture as large at the start as its paper's values make it, and NAME-small: with the fixed layer's scale."""
    fixed = "SwiGLU" if mixing.gated else "GELU"
    return (
        Arm(name, f"{title}, paper's scale", mixing),
        Arm(f"{name}-small", f"{title}, {fixed}'s scale", replace(mixing, init_scale="swiglu")),
    )


def _scaled(name: str, title: str, form: str, activation: str, like: str) -> Arm:
    """A fixed layer as an LA of one activation whose coefficient is not trained."""
    return Arm(name, title, MixingConfig("la", form, (activation,), freeze=True), as_large_as=like)


# Started as arXiv 2411.03884 says: 0 for the constant, 1/3 for the powers.
_POLYRELU = MixingConfig(
    "la", "type1", ("one", "relu", "relu2", "relu3"), initial_coefficients=(0.0, 1 / 3, 1 / 3, 1 / 3)
)

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("swiglu", "SwiGLU"),
        # Controls: the same arm under another name, of which seeds alone differ, and one that must be worse.
        Arm("swiglu-again", "SwiGLU, other seeds", other_seeds=True),
        Arm("swiglu-half", "SwiGLU, half as wide", widened="half"),
        Arm("gelu", "GELU", gated=False),
        _scaled("swiglu-scaled", "SwiGLU, scaled up as MoA", "one-sided", "silu", "moa"),
        _scaled("gelu-scaled", "GELU, scaled up as MoA type1", "type1", "gelu", "moa-type1"),
        Arm("swiglu-params", "SwiGLU, MoA's parameters", widened="parameters"),
        Arm("swiglu-time", "SwiGLU, MoA's step time", widened="time"),
        *_mixed("la", "LA", MixingConfig("la", "bi-sided")),
        *_mixed("la-one-sided", "LA one-sided", MixingConfig("la", "one-sided")),
        *_mixed("la-quadratic", "LA quadratic", MixingConfig("la", "quadratic")),
        *_mixed("la-type1", "LA type1", MixingConfig("la", "type1")),
        *_mixed("polyrelu", "PolyReLU", _POLYRELU),
        *_mixed("moa", "MoA", MixingConfig("moa", "bi-sided")),
        *_mixed("moa-one-sided", "MoA one-sided", MixingConfig("moa", "one-sided")),
        *_mixed("moa-quadratic", "MoA quadratic", MixingConfig("moa", "quadratic")),
        *_mixed("moa-type1", "MoA type1", MixingConfig("moa", "type1")),
        *_mixed("moa-softmax", "MoA, softmax gates", MixingConfig("moa", "bi-sided", gate="softmax")),
        *_mixed("moa-tanh", "MoA, tanh gates", MixingConfig("moa", "bi-sided", gate="tanh")),
        *_mixed("moa-frozen", "MoA, gates frozen at random", MixingConfig("moa", "bi-sided", freeze=True)),
    )
}
