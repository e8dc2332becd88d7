"""What is due to what: pairs of arms of which one thing is different, in the order in which a report shows them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moa.study.statistics import UNDECIDED, WORSE


@dataclass(frozen=True)
class Step:
    """Two arms of which one thing is different.

    Attributes:
        arm, to: what is compared, with what.
        what: the thing, for tables.
        words: the thing, as the subject of a sentence.
        expected: of a control: the verdict it must have.
    """

    arm: str
    to: str
    what: str
    words: str
    expected: str | None = None


OWN_SCALE = (
    Step("swiglu-scaled", "swiglu", "scale at the start", "making SwiGLU's output as large as MoA's at step 0"),
    Step("la", "swiglu-scaled", "dictionary", "mixing activations with learned constants (LA) at that same scale"),
    Step("moa", "la", "token adaptivity", "letting gates set the coefficients token by token (MoA)"),
    Step("moa", "swiglu", "all three", "MoA started at the paper's scale, in place of SwiGLU,"),
)
SWIGLU_SCALE = (
    Step("la-small", "swiglu", "dictionary", "LA started at SwiGLU's scale, in place of SwiGLU,"),
    Step("moa-small", "la-small", "token adaptivity", "gates in place of learned constants, both at SwiGLU's scale,"),
    Step("moa-small", "swiglu", "both", "MoA started at SwiGLU's scale, in place of SwiGLU,"),
    Step("moa-small", "moa", "MoA's scale brought down", "starting MoA at SwiGLU's scale rather than the paper's"),
)
GATES = (
    Step("moa-frozen", "la", "random gates, never trained", "gates that stay as they were drawn, in place of LA,"),
    Step("moa", "moa-frozen", "training the gates", "training the gates rather than leaving them as drawn"),
    Step("moa-frozen-small", "la-small", "random gates, SwiGLU's scale", "random gates that stay, at SwiGLU's scale,"),
    Step("moa-small", "moa-frozen-small", "training them, SwiGLU's scale", "training the gates, at SwiGLU's scale,"),
)
EQUAL_COST = (
    Step("moa", "swiglu-params", "equal parameters", "MoA in place of a SwiGLU of as many parameters"),
    Step(
        "moa-small", "swiglu-params", "equal parameters, SwiGLU's scale", "MoA at SwiGLU's scale, at equal parameters,"
    ),
    Step("moa", "swiglu-time", "equal step time", "MoA in place of a SwiGLU whose step takes as long"),
    Step("moa-small", "swiglu-time", "equal step time, SwiGLU's scale", "MoA at SwiGLU's scale, at equal step time,"),
)
NOT_GATED = (
    Step("gelu-scaled", "gelu", "scale at the start", "making GELU's output as large as type-1 MoA's at step 0"),
    Step("la-type1", "gelu-scaled", "dictionary", "mixing activations with learned constants at that same scale"),
    Step("moa-type1", "la-type1", "token adaptivity", "letting gates set the coefficients token by token"),
    Step("moa-type1", "gelu", "all three", "type-1 MoA in place of GELU"),
    Step("polyrelu", "gelu", "PolyReLU's dictionary", "PolyReLU in place of GELU"),
    Step("la-type1-small", "gelu", "dictionary, GELU's scale", "LA started at GELU's scale, in place of GELU,"),
    Step(
        "moa-type1-small", "la-type1-small", "adaptivity, GELU's scale", "gates in place of constants, at GELU's scale,"
    ),
    Step("moa-type1-small", "gelu", "both, GELU's scale", "type-1 MoA at GELU's scale, in place of GELU,"),
    Step("polyrelu-small", "gelu", "PolyReLU, GELU's scale", "PolyReLU at GELU's scale, in place of GELU,"),
)
CONTROLS = (
    Step("swiglu-again", "swiglu", "nothing, other seeds", "SwiGLU under another name, with other seeds,", UNDECIDED),
    Step("swiglu-half", "swiglu", "half the width", "halving SwiGLU's width", WORSE),
)
CHAINS = (
    ("From SwiGLU to MoA started at the paper's scale", OWN_SCALE),
    ("The same with both started at SwiGLU's scale", SWIGLU_SCALE),
    ("What the gates do", GATES),
    ("At equal cost", EQUAL_COST),
    ("Without a gated unit: from GELU to type-1 MoA", NOT_GATED),
    ("Controls", CONTROLS),
)
