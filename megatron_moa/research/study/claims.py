"""Judges by finished runs what the paper's figures say: a rule gives each verdict, nobody writes one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_moa.mixture.config import FORMS
from megatron_moa.research.study.arms import ARMS, MATCHED, by_gate
from megatron_moa.research.study.findings import (
    CONFIRMED,
    CONTRADICTED,
    Pair,
    SettingVerdict,
    gains,
    kept,
    larger_rates,
    no_gain,
)
from megatron_moa.research.study.paper import BI_SIDED, ONE_SIDED, QUADRATIC, reported
from megatron_moa.research.study.statistics import UNDECIDED, Results

MIXED = "undecided: settings disagree"
DENSE, MOE = "dense-0.12b", "moe-0.25b"  # the models that the paper's differences are of


@dataclass(frozen=True)
class Claim:
    """A statement that we draw from the figures of arXiv 2605.26647, in short a claim of it.

    Attributes:
        parts: groups of pairs of the paper's arms; one pair of every group must be confirmed. :func:`matched` gives
            ours, which have a verdict of their own.
        find: what the settings say of a pair.
        studies: files of examples/studies that run it.
        model: of the paper's, which its differences are of.
        left_out: pairs of the same kind that are not claimed, since the paper's own figures do not bear them out.
    """

    title: str
    parts: tuple[tuple[Pair, ...], ...]
    find: Callable[[Results, Pair], Iterator[SettingVerdict]]
    studies: tuple[str, ...]
    model: str = DENSE
    left_out: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Of a claim.

    Attributes:
        word: :data:`CONFIRMED`, :data:`CONTRADICTED`, :data:`MIXED` or :data:`UNDECIDED`.
        deciding: the most reliable finding, where they disagree one of each side; empty where nothing was run.
        reasons: numbers of undecided findings by reason.
        shown, missing: parts that are confirmed, and those without any run, by their first pair.
        counts: numbers of findings that confirm and that contradict.
    """

    word: str
    deciding: tuple[SettingVerdict, ...]
    reasons: dict[str, int]
    shown: tuple[Pair, ...]
    missing: tuple[Pair, ...]
    counts: tuple[int, int]


def matched(pair: Pair) -> Pair:
    """Ours in place of the paper's arms: started at SwiGLU's or GELU's scale."""
    arm, to = (name if ARMS[name].mixture is None else MATCHED[name] for name in pair)
    return arm, to


def judge(results: Results, claim: Claim, ours: bool = False) -> Verdict:
    """Judges a claim by its decided findings.

    It is contradicted if one contradicts and none confirms, :data:`MIXED` if there are both, confirmed if every part
    has one that confirms and none contradicts, and undecided otherwise.

    Args:
        ours: judges our arms (:func:`matched`) in place of the paper's.
    """
    parts = [
        [found for pair in part for found in claim.find(results, matched(pair) if ours else pair)]
        for part in claim.parts
    ]
    findings = sorted((found for part in parts for found in part), key=lambda found: found.sort_key)
    by_word = {word: [found for found in findings if found.word == word] for word in (CONFIRMED, CONTRADICTED)}
    firsts = [matched(part[0]) if ours else part[0] for part in claim.parts]
    shown = [first for first, part in zip(firsts, parts, strict=True) if any(f.word == CONFIRMED for f in part)]
    sides = [found[0] for found in by_word.values() if found]
    word = UNDECIDED
    if len(sides) == 2:
        word = MIXED
    elif by_word[CONTRADICTED]:
        word = CONTRADICTED
    elif len(shown) == len(parts):
        word = CONFIRMED
    return Verdict(
        word,
        tuple(sides or findings[:1]),
        dict(Counter(found.reason for found in findings if found.word == UNDECIDED)),
        tuple(shown),
        tuple(first for first, part in zip(firsts, parts, strict=True) if not part),
        (len(by_word[CONFIRMED]), len(by_word[CONTRADICTED])),
    )


def paper_figure(pair: Pair, model: str = DENSE) -> tuple[float, str] | None:
    """An arm's difference to what it is compared with, as the paper reports both, and where."""
    values = [(0.0, "") if ARMS[arm].mixture is None else reported(arm, model, 0) for arm in pair]
    if None in values:
        return None
    (arm, where), (to, beside) = values
    return arm - to, where if beside in ("", where) else f"{where} minus {beside.removeprefix(f'{model}, ')}"


def _claimed(pairs: Sequence[Sequence[Pair]]) -> tuple[tuple[Pair, ...], ...]:
    """Those that the paper's own figures bear out."""
    claimed = [tuple(pair for pair in part if paper_figure(pair)[0] < 0) for part in pairs]
    return tuple(part for part in claimed if part)


def _left_out(pairs: Sequence[Sequence[Pair]]) -> tuple[Pair, ...]:
    """Those that the paper's own figures do not bear out."""
    return tuple(pair for part in pairs for pair in part if paper_figure(pair)[0] >= 0)


_AGAINST_LA = [[(f"moa-{form}", f"la-{form}"), (by_gate(f"moa-{form}")["softmax"], f"la-{form}")] for form in FORMS]
_GATED = [[(arm, "swiglu")] for arm in (ONE_SIDED, BI_SIDED, QUADRATIC)]
_DENSE, _MOE = "paper-dense.toml", "paper-moe.toml"
_TABLE_1, _TABLE_2 = "paper-table1.toml", "paper-table2.toml"
CLAIMS = (
    Claim(
        "1a. MoA ends below SwiGLU (dense, Type II)",
        tuple(((arm, to), (by_gate(arm)["softmax"], to)) for ((arm, to),) in _GATED),
        gains,
        (_DENSE, _TABLE_1),
    ),
    Claim(
        "1b. MoA ends below ReLU2 (dense, Type I)",
        ((("moa-type1", "relu2"), ("moa-type1-softmax", "relu2")),),
        gains,
        (_TABLE_2, _TABLE_1),
    ),
    Claim(
        "2. MoA ends below LA of its form",
        _claimed(_AGAINST_LA),
        gains,
        (_TABLE_1, _TABLE_2, _DENSE),
        left_out=_left_out(_AGAINST_LA),
    ),
    Claim(
        "3. Sigmoid gates are better than softmax, tanh",
        tuple(((arm, other),) for arm in ("moa-type1", BI_SIDED) for other in by_gate(arm).values()),
        gains,
        (_TABLE_2,),
    ),
    Claim("4. MoA bears larger peak rates", _claimed(_GATED), larger_rates, (_DENSE,)),
    Claim("5a. MoE: one-sided, quadratic gain", _claimed(_GATED[::2]), partial(gains, moe=True), (_MOE,), MOE),
    Claim("5b. MoE: bi-sided gains nothing", _claimed(_GATED[1:2]), no_gain, (_MOE,), MOE),
    Claim("6a. The gain keeps with model size", _claimed(_GATED), kept, (_DENSE, _MOE)),
    Claim("6b. The gain keeps with tokens", _claimed(_GATED), partial(kept, tokens=True), (_DENSE,)),
)
