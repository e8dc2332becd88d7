"""Pairs the arms that differ in one choice, in the order in which a report shows the effect of each."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moa.research.study.statistics import UNDECIDED, WORSE


@dataclass(frozen=True)
class Choice:
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
    Choice("swiglu-scaled", "swiglu", "scale at the start", "making SwiGLU's output as large as MoA's at step 0"),
    Choice("la-bi-sided-half", "swiglu-scaled", "dictionary", "learned constants (LA from 0.5), as large,"),
    Choice("moa-bi-sided", "la-bi-sided-half", "token adaptivity", "letting gates set the coefficients token by token"),
    Choice("moa-bi-sided", "swiglu", "all three", "bi-sided MoA with the paper's coefficients, in place of SwiGLU,"),
    Choice("la-bi-sided", "swiglu", "the paper's LA", "bi-sided LA with the paper's coefficients, in place of SwiGLU,"),
    Choice("la-bi-sided", "la-bi-sided-half", "LA's start", "starting LA at 1, as the paper does, rather than at 0.5"),
)
MATCHED = (
    Choice("la-bi-sided-matched", "swiglu", "dictionary", "LA started at SwiGLU's scale, in place of SwiGLU,"),
    Choice(
        "moa-bi-sided-matched",
        "la-bi-sided-matched",
        "token adaptivity",
        "gates in place of learned constants, both at SwiGLU's scale,",
    ),
    Choice("moa-bi-sided-matched", "swiglu", "both", "MoA started at SwiGLU's scale, in place of SwiGLU,"),
    Choice(
        "moa-bi-sided-matched",
        "moa-bi-sided",
        "MoA's scale brought down",
        "starting MoA at SwiGLU's scale rather than as the paper does",
    ),
)
OTHER_FORMS = (
    Choice("la-one-sided", "swiglu", "one-sided LA", "one-sided LA in place of SwiGLU"),
    Choice("moa-one-sided", "swiglu", "one-sided MoA", "one-sided MoA in place of SwiGLU"),
    Choice("la-quadratic", "swiglu", "quadratic LA", "quadratic LA in place of SwiGLU"),
    Choice("moa-quadratic", "swiglu", "quadratic MoA", "quadratic MoA in place of SwiGLU"),
)
GATES = (
    Choice("moa-bi-sided-frozen", "la-bi-sided-half", "random gates, never trained", "gates left as drawn, for LA,"),
    Choice("moa-bi-sided", "moa-bi-sided-frozen", "training the gates", "training the gates rather than leaving them"),
    Choice(
        "moa-bi-sided-frozen-matched",
        "la-bi-sided-matched",
        "random gates, SwiGLU's scale",
        "random gates that stay, at SwiGLU's scale,",
    ),
    Choice(
        "moa-bi-sided-matched",
        "moa-bi-sided-frozen-matched",
        "training them, SwiGLU's scale",
        "training the gates, at SwiGLU's scale,",
    ),
    Choice("moa-bi-sided-softmax", "moa-bi-sided", "softmax gates", "softmax gates in place of sigmoid ones"),
    Choice("moa-bi-sided-tanh", "moa-bi-sided", "tanh gates", "tanh gates in place of sigmoid ones"),
)
EQUAL_COST = (
    Choice("swiglu-params", "swiglu", "width + 5", "widening SwiGLU to MoA's parameters"),
    Choice("moa-bi-sided", "swiglu-params", "equal parameters", "MoA in place of a SwiGLU of as many parameters"),
    Choice(
        "moa-bi-sided-matched",
        "swiglu-params",
        "equal parameters, SwiGLU's scale",
        "MoA at SwiGLU's scale, at equal parameters,",
    ),
    Choice("moa-bi-sided", "swiglu-time", "equal step time", "MoA in place of a SwiGLU whose step takes as long"),
    Choice(
        "moa-bi-sided-matched",
        "swiglu-time",
        "equal step time, SwiGLU's scale",
        "MoA at SwiGLU's scale, at equal step time,",
    ),
)
NOT_GATED = (
    Choice("relu2-scaled", "relu2", "scale at the start", "making ReLU2's output as large as Type I MoA's at step 0"),
    Choice("la-type1-half", "relu2-scaled", "dictionary", "learned constants (LA from 0.5), as large,"),
    Choice("moa-type1", "la-type1-half", "token adaptivity", "letting gates set the coefficients token by token"),
    Choice("moa-type1", "relu2", "all three", "Type I MoA in place of ReLU2"),
    Choice("la-type1", "relu2", "the paper's LA", "Type I LA with the paper's coefficients, in place of ReLU2,"),
    Choice("relu2", "swiglu", "ReLU2 for SwiGLU", "ReLU2 in place of SwiGLU"),
    Choice("gelu", "relu2", "GELU for ReLU2", "GELU in place of ReLU2"),
    Choice("polyrelu", "relu2", "PolyReLU", "PolyReLU in place of ReLU2"),
    Choice("polyrelu-matched", "gelu", "PolyReLU, GELU's scale", "PolyReLU at GELU's scale, in place of GELU,"),
)
CONTROLS = (
    Choice("swiglu-again", "swiglu", "nothing, other seeds", "SwiGLU under another name, with other seeds,", UNDECIDED),
    Choice("swiglu-half", "swiglu", "half the width", "halving SwiGLU's width", WORSE),
)
CHAINS = (
    ("From SwiGLU to bi-sided MoA with the paper's coefficients", OWN_SCALE),
    ("The same with all started at SwiGLU's scale", MATCHED),
    ("The other forms", OTHER_FORMS),
    ("What the gates do", GATES),
    ("At equal cost", EQUAL_COST),
    ("Type I: from ReLU2 to MoA", NOT_GATED),
    ("Controls", CONTROLS),
)
