"""Writes what arms lose at learning rates above their best."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_moa.research.study.arms import MAIN_LA, MAIN_MOA
from megatron_moa.research.study.paper import RATES_BORNE
from megatron_moa.research.study.pictures import arm_title, setting_title
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import counted, difference_text, lost_text, table
from megatron_moa.research.study.statistics import (
    AT_LEAST,
    AT_MOST,
    BASELINE,
    BETTER,
    ONE_SEED,
    UNKNOWN,
    UNTUNED,
    WORSE,
    Interval,
    Setting,
    Tuned,
)


def larger_rates(study: Material) -> Lines:
    """Writes what arms lose at twice and four times their best rates."""
    yield "## Larger learning rates\n"
    rows = [["arm", "best rate", "lost at twice", "lost at four times", "minus what SwiGLU loses at twice", "is"]]
    for tuned in study.tuned(study.main):
        twice, four = (study.results.lost(study.main, tuned.arm, factor) for factor in (2, 4))
        if not twice and not four:
            continue
        beside, verdict = "", ""
        known = _lost_beside(study, tuned.arm) if tuned.arm != BASELINE else None
        if known is not None:
            beside = difference_text(known)
            verdict = {BETTER: "bears more", WORSE: "bears less"}.get(known.verdict, known.verdict)
        rows.append([arm_title(tuned.arm), f"{tuned.rate:g}", lost_text(twice), lost_text(four), beside, verdict])
    if len(rows) == 1:
        yield "No arm was run at twice or four times its best rate.\n"
        return
    yield f"{setting_title(study.main)}. What an arm loses at a multiple of its own best rate, mean over seeds.\n"
    yield from table(rows)
    for arm in MAIN_MOA:
        yield from _bears_more(study, arm)
    yield from _best_rates(study)


def _lost_beside(study: Material, arm: str) -> Interval | None:
    """Returns what an arm loses at twice its best rate minus what SwiGLU loses at twice its own.

    It is None without a seed in common, and where a run of one of them diverged at twice its best rate.
    """
    mine, theirs = (study.results.lost(study.main, name, 2) for name in (arm, BASELINE))
    pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not pairs or not all(map(math.isfinite, pairs)):
        return None
    # Twice the best rate is twice another one where the best has not been found.
    untuned = any(study.results.may_be_lower(study.main, name) for name in (arm, BASELINE))
    diverged = study.results.diverged(study.main, arm, BASELINE)
    return replace(Interval.of(pairs), bound=UNKNOWN if untuned else "", diverged=diverged)


def _best_rates(study: Material) -> Lines:
    """Writes the best rates of the arms that have one in several settings, side by side."""
    arms = (BASELINE, *MAIN_LA, *MAIN_MOA)
    rows = []
    for setting in study.results.settings:
        baseline, *mixtures = (study.results.tuned(setting, arm) for arm in arms)
        if baseline is not None and any(mixtures):
            rows.append([setting_title(setting), *(_rate(study, setting, tuned) for tuned in (baseline, *mixtures))])
    if len(rows) > 1:
        yield "### Best rates in every setting, and what is lost at twice\n"
        yield from table([["setting", *map(arm_title, arms)], *rows])
        seed = study.results.tuning_seed
        yield f"With seed {seed}; ≤, ≥: at the lower, upper end of what was tried, a better one may lie beyond;"
        yield "(?): the only one tried. In brackets: the loss at twice that rate minus that at it.\n"


def _rate(study: Material, setting: Setting, tuned: Tuned | None) -> str:
    """Returns an arm's best rate, where it lies among the tried ones, and how much is lost at twice."""
    if tuned is None:
        return ""
    if len(tuned.rates) == 1:
        return f"{tuned.rate:g} (?)"
    bound = "" if tuned.inside else AT_MOST if tuned.rate == min(tuned.rates) else AT_LEAST
    twice = study.results.lost(setting, tuned.arm, 2)
    seed = study.results.tuning_seed
    return f"{bound}{tuned.rate:g}" + (f" ({lost_text({seed: twice[seed]})})" if seed in twice else "")


def _bears_more(study: Material, arm: str) -> Lines:
    """Writes in a sentence whether the paper's claim on larger rates is seen."""
    mixed, fixed = study.results.tuned(study.main, arm), study.results.tuned(study.main, BASELINE)
    mine, theirs = (study.results.lost(study.main, name, 2) for name in (arm, BASELINE))
    if mixed is None or fixed is None or not mine.keys() & theirs.keys():
        return
    known, factor, (least, most) = _lost_beside(study, arm), mixed.rate / fixed.rate, RATES_BORNE
    if known is None or known.diverged:
        claim, how = "not decided", "a run diverged"
    elif known.verdict in (UNTUNED, ONE_SEED):
        claim, how = "not decided", "one seed" if known.verdict == ONE_SEED else "a best rate was not found"
    else:
        seen = (factor >= least) + (known.verdict == BETTER)
        claim = ("not seen", "seen in part", "seen")[seen]
        how = f"{counted(known.count, 'seed')}, {difference_text(known)}: {known.verdict}"
    best = "SwiGLU's too" if factor == 1 else f"{factor:g} times SwiGLU's"
    yield (
        f"That MoA bears {least:g} to {most:g} times the baseline's rate is **{claim}** for {arm_title(arm)}: "
        f"its best rate is {best}, and at twice that it loses {lost_text(mine)} where SwiGLU loses {lost_text(theirs)} "
        f"({how}).\n"
    )
