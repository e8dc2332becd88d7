"""Writes a report's first screen and the table beside the paper's figures."""

from __future__ import annotations

from megatron_moa.research.study.arms import ARMS, MAIN_LA, MAIN_MOA
from megatron_moa.research.study.paper import ROWS, reported
from megatron_moa.research.study.pictures import arm_panel, arm_title, setting_title
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import (
    control_text,
    counted,
    difference_text,
    listed,
    table,
    tally,
    verdict_text,
)
from megatron_moa.research.study.statistics import BASELINE, Interval, Setting
from megatron_moa.research.study.steps import CONTROLS, MATCHED, OWN_SCALE


def in_short(study: Material) -> Lines:
    """Writes the first screen: how the chief arms and the controls come out."""
    yield "## In short\n"
    yield f"Main setting: {setting_title(study.main)}. Validation loss in nats per token, every arm at its own best"
    yield "learning rate; differences are paired by seed, in brackets their 95 % interval.\n"
    mixtures = [arm for arm in study.results.arms(study.main) if arm_panel(arm) in ("LA", "MoA")]
    verdicts = [known.verdict for arm in mixtures if (known := study.difference(arm, BASELINE)) is not None]
    if verdicts:
        yield f"**Of {counted(len(verdicts), 'gated mixture')}, against tuned SwiGLU: {tally(verdicts)}.**\n"
    for arm in (*MAIN_MOA, *MAIN_LA):
        known = study.difference(arm, BASELINE)
        if known is not None:
            yield f"- {arm_title(arm)}, against SwiGLU: {_with_percent(study, known)}: {verdict_text(known.verdict)}."
    for name, chain in (("with the paper's coefficients", OWN_SCALE[:3]), ("at SwiGLU's scale", MATCHED[:2])):
        parts = [(step, study.difference(step.arm, step.to)) for step in chain]
        if all(known for _, known in parts):
            text = "; ".join(f"{step.what} {difference_text(known)} ({known.verdict})" for step, known in parts)
            yield f"- Effect of each choice, {name}: {text}."
    for to, what in (("swiglu-params", "as many parameters"), ("swiglu-time", "the same step time")):
        for arm in MAIN_MOA:
            known = study.difference(arm, to)
            if known is not None:
                judged = f"{difference_text(known)}: {verdict_text(known.verdict)}"
                yield f"- {arm_title(arm)}, against a SwiGLU of {what}: {judged}."
    yield from _elsewhere(study)
    best = min(study.tuned(study.main), key=lambda tuned: tuned.loss.mean, default=None)
    if best is not None:
        count = len(study.tuned(study.main))
        yield (
            f"- The lowest loss of {count} arms: {arm_title(best.arm)}, {best.loss.mean:.4f} "
            f"({counted(len(best.losses), 'seed')})."
        )
    yield from _controls_in_short(study)
    yield from _gates_in_short(study)
    yield ""


def _elsewhere(study: Material) -> Lines:
    """Writes how often the main comparisons come out the same way in other settings."""
    for arm in MAIN_MOA:
        known = [study.results.difference(setting, arm, BASELINE) for setting in study.results.settings]
        verdicts = [difference.verdict for difference in known if difference is not None]
        if len(verdicts) > 1:
            yield f"- {arm_title(arm)}, against SwiGLU, in {len(verdicts)} settings: {tally(verdicts)}."


def _gates_in_short(study: Material) -> Lines:
    from megatron_moa.research.gates.analysis import change, continued_summary

    what = {"frozen": "with frozen gates", "la": "with gates replaced by their means, which train"}
    means = [
        f"{name} {change(row)}"
        for name, content in study.evidence.gates.items()
        for row in (content.get("ablation") or {"rows": []})["rows"]
        if row["kind"] == "mean"
    ]
    if means:
        yield f"- [Trained gates](#trained-gates) replaced by their means: {listed(means, '; ')}."
    for name, content in study.evidence.gates.items():
        for entry in continued_summary(content.get("continued") or []):
            if "difference" in entry:
                yield (
                    f"- {name} trained on {what[entry['way']]}, against training on as it is: "
                    f"{change(entry)}, {counted(len(entry['seeds']), 'seed')}."
                )


def _controls_in_short(study: Material) -> Lines:
    for step in CONTROLS:
        known = study.difference(step.arm, step.to)
        if known is not None:
            yield f"- Control, {arm_title(step.arm)}: {difference_text(known)}, {control_text(step, known)}."


def _with_percent(study: Material, known: Interval) -> str:
    loss = study.results.tuned(study.main, BASELINE).loss.mean
    return f"{difference_text(known)}, {known.mean / loss:+.1%}"


def beside_the_paper(study: Material) -> Lines:
    """Writes the rows of the paper's tables 1 and 2, setting by setting, if any were run."""
    tables = {s: [row for arm in ROWS if (row := _row(study, s, arm))] for s in study.results.settings}
    tables = {setting: rows for setting, rows in tables.items() if any(row[4] for row in rows)}
    if not tables:
        return
    yield "## Beside the paper\n"
    yield "Type I against ReLU2, Type II against SwiGLU, every arm at its own best rate; gates are sigmoid where no"
    yield "others are named. The last column: what arXiv 2605.26647 reports, and of which model.\n"
    for setting, rows in tables.items():
        yield f"### {setting_title(setting)}\n"
        header = ["arm", "best rate", "loss", "compared with", "difference", "is", "the paper's"]
        yield from table([header, *rows])


def _row(study: Material, setting: Setting, arm: str) -> list[str]:
    """Returns an arm beside what the paper reports of it; nothing where it was not run."""
    tuned = study.results.tuned(setting, arm)
    if tuned is None:
        return [arm_title(arm), "none, all diverged", *[""] * 5] if arm in study.results.arms(setting) else []
    end = "" if tuned.inside else ", the only one" if len(tuned.rates) == 1 else ", at the end"
    row = [arm_title(arm), f"{tuned.rate:g}{end}", f"{tuned.loss.mean:.4f}"]
    to = BASELINE if arm == ARMS[arm].baseline else ARMS[arm].baseline
    known = None if arm == to else study.results.difference(setting, arm, to)
    if known is None:
        return [*row, *[""] * 4]
    there = reported(arm, setting[1], setting[2])
    beside = f"{there[0]:+.3f} ({there[1]})" if there else ""
    return [*row, arm_title(to), difference_text(known), verdict_text(known.verdict), beside]
