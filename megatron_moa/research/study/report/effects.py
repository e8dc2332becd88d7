"""Writes the effect of each choice, one step at a time."""

from __future__ import annotations

from megatron_moa.research.study.pictures import arm_title, setting_title
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import (
    control_text,
    difference_text,
    listed,
    narrow_text,
    step_sentence,
    table,
    verdict_text,
)
from megatron_moa.research.study.statistics import BETTER, CONFIDENCE, WORSE, Setting
from megatron_moa.research.study.steps import CHAINS, MATCHED, OWN_SCALE


def effects_of_choices(study: Material) -> Lines:
    """Writes the chains of steps in the main setting, if any, each step with its effect on the loss."""
    steps = list(steps_of(study, study.main, in_words=True))
    if not steps:
        return
    yield "## Effect of each choice\n"
    yield f"{setting_title(study.main)}. Each line changes one thing; a negative difference is a gain.\n"
    yield from steps
    yield from _comparisons(study)
    seed = study.results.tuning_seed
    parts = []
    for step in (*OWN_SCALE, *MATCHED):
        known = study.results.difference(study.main, step.arm, step.to, without={seed})
        if known is not None and known.count >= 3:
            parts.append(f"{arm_title(step.arm)} - {arm_title(step.to)} {difference_text(known)}")
    if parts:
        yield f"Without seed {seed}, which chose the rates: {'; '.join(parts)}.\n"


def steps_of(study: Material, setting: Setting, in_words: bool = False) -> Lines:
    """Writes a setting's steps: all for the main one, else those that no table over all settings has."""
    for title, chain in CHAINS:
        if not in_words and chain in (OWN_SCALE, MATCHED):
            continue
        known = [(step, study.results.difference(setting, step.arm, step.to)) for step in chain]
        there = [(step, difference) for step, difference in known if difference is not None]
        if not there:
            continue
        yield f"### {title}\n" if in_words else f"{title}:\n"
        rows = [["what changes", "arm", "compared with", "difference", "seeds", "is"]]
        rows += [
            [
                step.what,
                arm_title(step.arm),
                arm_title(step.to),
                difference_text(difference),
                str(difference.count),
                control_text(step, difference) if step.expected else verdict_text(difference.verdict),
            ]
            for step, difference in there
        ]
        yield from table(rows)
        if in_words:
            yield " ".join(step_sentence(step, difference) for step, difference in there)
            missing = [step.what for step, difference in known if difference is None]
            if missing:
                yield f"Missing, for want of runs: {listed(missing)}."
            yield ""


def _comparisons(study: Material) -> Lines:
    """Writes that among many intervals some miss, and which verdicts bear that."""
    steps = [(step, study.difference(step.arm, step.to)) for _, chain in CHAINS for step in chain]
    several = [(step, known) for step, known in steps if known is not None and known.count > 1]
    if len(several) < 2:
        return
    strict = 1 - (1 - CONFIDENCE) / len(several)
    firm = [
        f"{step.what} ({arm_title(step.arm)} - {arm_title(step.to)})"
        for step, _ in several
        if study.results.difference(study.main, step.arm, step.to, strict).verdict in (BETTER, WORSE)
    ]
    decided = sum(known.verdict in (BETTER, WORSE) for _, known in several)
    yield (
        f"**Many comparisons.** {len(several)} intervals are in these tables; of so many, about "
        f"{(1 - CONFIDENCE) * len(several):.1f} miss the truth by chance. {decided} exclude zero and "
        f"decide. With intervals widened so that all hold together ({strict:.2%} each, Bonferroni) these still do: "
        f"{listed(firm, '; ') or 'none'}.\n"
    )


def settings_beside_one_another(study: Material) -> Lines:
    """Writes the same steps in every setting, side by side."""
    for name, chain in (("with the paper's coefficients", OWN_SCALE), ("at SwiGLU's scale", MATCHED)):
        rows = []
        for setting in study.results.settings:
            known = [study.results.difference(setting, step.arm, step.to) for step in chain]
            if any(known):
                rows.append([setting_title(setting), *(narrow_text(difference) for difference in known)])
        if rows and len(study.results.settings) > 1:
            yield f"### The same steps in every setting, {name}\n"
            yield from table([["setting", *(step.what for step in chain)], *rows])
            yield "±: half the interval's width; bold: decided, the interval excludes zero; (1): one seed, no interval."
            yield "≤, ≥: the best rate of the arm, of what it is compared with, is at the end of what was tried, so"
            yield "that a better one would lower, raise the difference; ?: of both.\n"
