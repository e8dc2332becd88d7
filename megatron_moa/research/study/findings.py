"""Judges a claim of the paper's by each setting of a study: confirmed, contradicted or undecided.

There is a rule for each of four kinds of claims: a gain, no gain, larger learning rates, a gain that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_moa.research.study.grid import Cell
from megatron_moa.research.study.paper import BI_SIDED, CURVES, RATES_BORNE
from megatron_moa.research.study.pictures import size_title
from megatron_moa.research.study.statistics import (
    AT_MOST,
    BETTER,
    DIVERGED,
    ONE_SEED,
    UNDECIDED,
    UNKNOWN,
    UNTUNED,
    WORSE,
    Interval,
    Results,
    Setting,
)

CONFIRMED, CONTRADICTED = "confirmed", "contradicted"
REASONS = {
    ONE_SEED: "one seed",
    UNDECIDED: "interval spans 0",
    UNTUNED: "best rate at the end of those tried, or the only one",
    DIVERGED: "a run diverged",
}
# Of what the paper reports for MoE models: a difference below this is no gain there.
LEAST_MOE_GAIN = min(
    -gain
    for (model, _), arms in CURVES.items()
    if model.startswith("moe")
    for arm, gain in arms.items()
    if arm != BI_SIDED
)

Pair = tuple[str, str]  # an arm, and what it is compared with


@dataclass(frozen=True)
class SettingVerdict:
    """What one setting says of a claim.

    Attributes:
        known: the difference; None where a run that it needs diverged.
        word: :data:`CONFIRMED`, :data:`CONTRADICTED` or :data:`UNDECIDED`.
        reason: why it is undecided.
        note: what a reader of the difference must know besides.
    """

    pair: Pair
    setting: Setting
    known: Interval | None
    word: str
    reason: str = ""
    note: str = ""

    @property
    def sort_key(self) -> tuple[bool, int, float]:
        """Sorts the most reliable first: at best rates, then of more seeds, then of a narrower interval."""
        if self.known is None:
            return True, 0, math.inf
        return bool(self.known.bound), -self.known.count, self.known.half if self.known.count > 1 else math.inf


def _is_moe(results: Results, setting: Setting) -> bool:
    return "--num-experts" in results.flags(setting)


def _found(pair: Pair, setting: Setting, known: Interval, note: str = "") -> SettingVerdict:
    """A lower loss confirms."""
    word = {BETTER: CONFIRMED, WORSE: CONTRADICTED}.get(known.verdict, UNDECIDED)
    return SettingVerdict(pair, setting, known, word, REASONS.get(known.verdict, ""), note)


def gains(results: Results, pair: Pair, moe: bool = False) -> Iterator[SettingVerdict]:
    """A lower loss at the best rates confirms, in dense models or in MoE."""
    for setting in results.settings:
        known = results.difference(setting, *pair)
        if known is not None and _is_moe(results, setting) == moe:
            yield _found(pair, setting, known)


def no_gain(results: Results, pair: Pair) -> Iterator[SettingVerdict]:
    """An interval of nothing but losses and gains below :data:`LEAST_MOE_GAIN` confirms."""
    for found in gains(results, pair, moe=True):
        known = found.known
        beyond = replace(known, **{end: getattr(known, end) + LEAST_MOE_GAIN for end in ("mean", "low", "high")})
        word = {WORSE: CONFIRMED, BETTER: CONTRADICTED}.get(beyond.verdict, UNDECIDED)
        reason = REASONS.get(beyond.verdict, "")
        if beyond.verdict == UNDECIDED:
            reason = f"the interval holds a gain of {LEAST_MOE_GAIN:g}"
        yield replace(found, word=word, reason=reason)


def larger_rates(results: Results, pair: Pair) -> Iterator[SettingVerdict]:
    """Losing less than the baseline by a larger rate than the baseline's best confirms.

    The larger one is the largest that both tried within :data:`RATES_BORNE` times that best rate.
    """
    least, most = RATES_BORNE
    for setting in results.settings:
        arm, fixed = (results.tuned(setting, name) for name in pair)
        if arm is None or fixed is None or _is_moe(results, setting):
            continue
        high = [rate for rate in fixed.rates if rate in arm.rates and least <= rate / fixed.rate < most * 1.01]
        if not high or fixed.rate not in arm.rates:
            continue
        rates = (max(high), fixed.rate)
        by_seed = (
            [results.losses.get(Cell(*setting, name, rate, seed)) for name in pair for rate in rates]
            for seed in fixed.losses
        )
        values = [one - two - (three - four) for one, two, three, four in (v for v in by_seed if None not in v)]
        note = f"what rate {rates[0]:g} costs over {rates[1]:g}"
        if not all(map(math.isfinite, values)):
            yield SettingVerdict(pair, setting, None, UNDECIDED, REASONS[DIVERGED], note)
            continue
        bound = AT_MOST if results.may_be_lower(setting, pair[0]) else ""
        bound = UNKNOWN if results.may_be_lower(setting, pair[1]) else bound
        known = replace(Interval.of(values), bound=bound, diverged=results.diverged(setting, *pair))
        yield _found(pair, setting, known, note)


def kept(results: Results, pair: Pair, tokens: bool = False) -> Iterator[SettingVerdict]:
    """Yields what each larger setting says of the gain in a smaller one.

    A gain in both confirms. After a gain in the smaller, a loss in the larger contradicts, and so does an undecided
    difference whose interval lies above the smaller's.
    """
    known = {setting: results.difference(setting, *pair) for setting in results.settings}
    known = {setting: difference for setting, difference in known.items() if difference is not None}
    for small, before in known.items():
        for large, after in known.items():
            if not _larger(results, small, large, pair[1], tokens):
                continue
            what = f"{small[2] / 1e6:g}M tokens" if tokens else f"size {size_title(small[1])}"
            found = _found(pair, large, after, f"at {what} {before.mean:+.4f}")
            if before.verdict != BETTER:
                found = replace(found, word=UNDECIDED, reason="no decided gain in the smaller one")
            elif found.reason == REASONS[UNDECIDED] and after.low > before.high:
                found = replace(found, word=CONTRADICTED, reason="")
            yield found


def _larger(results: Results, small: Setting, large: Setting, to: str, tokens: bool) -> bool:
    """Returns whether two settings differ in tokens alone, or in the model's size.

    With ``tokens`` the second has more of them. Else it has a larger model of the kind, whose weights start with the
    same deviation or the same pre-activations, and no fewer tokens.
    """
    if (small[0], *small[3:]) != (large[0], *large[3:]) or _is_moe(results, small) != _is_moe(results, large):
        return False
    if tokens:
        return small[1] == large[1] and small[2] < large[2]
    starts = []
    for setting in (small, large):
        flags = results.flags(setting)
        deviation, hidden = (float(flags.get(flag, "1")) for flag in ("--init-method-std", "--hidden-size"))
        starts.append((deviation, round(deviation * hidden**0.5, 2)))
    alike = any(one == other for one, other in zip(*starts, strict=True))
    sizes = [results.tuned(setting, to).non_embedding for setting in (small, large)]
    return alike and sizes[0] < sizes[1] and small[2] <= large[2]
