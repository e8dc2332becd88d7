"""Writes what was run and what the runs do not show."""

from __future__ import annotations

import math
import statistics

from megatron_moa.command_line.words import flag_values
from megatron_moa.research.study.pictures import arm_title, plan_title, setting_title, size_title
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import counted, listed
from megatron_moa.research.study.statistics import BASELINE, DIVERGED, ONE_SEED, UNDECIDED, UNTUNED
from megatron_moa.research.study.steps import CHAINS
from megatron_moa.research.study.timing import TIMING

# What arXiv 2605.26647 begins at: parameters of its 0.12B without embedding and output layer, and tokens.
PAPER_SMALLEST, PAPER_SHORTEST = 42e6, 2.4e9


def what_was_run(study: Material) -> Lines:
    """Writes how many runs there were, of what, and where."""
    lines = study.results.lines
    cells = list(lines)
    yield "## What was run\n"
    diverged = sum(not math.isfinite(loss) for loss in study.results.losses.values())
    arms = dict.fromkeys(cell.arm for cell in cells)
    yield f"- {counted(len(cells), 'run')} of {counted(len(arms), 'arm')}, {diverged} diverged."
    yield f"- Text: {listed(dict.fromkeys(cell.corpus for cell in cells))}."
    sizes = {cell.size: lines[cell]["non_embedding"] for cell in cells if cell.arm == BASELINE}
    sizes = {cell.size: lines[cell]["non_embedding"] for cell in cells if cell.size not in sizes} | sizes
    text = listed(f"{size_title(size)} ({count:,})" for size, count in sorted(sizes.items(), key=lambda s: s[1]))
    yield f"- Sizes, by their names in the studies (SwiGLU's parameters without embedding and output layer): {text}."
    budgets = sorted({cell.tokens for cell in cells})
    yield f"- Tokens: {listed(f'{tokens / 1e6:g}M' for tokens in budgets)}."
    plans = dict.fromkeys(plan_title(cell.optimizer, cell.schedule) for cell in cells)
    yield f"- Optimizers and schedules: {listed(plans, '; ')}. {_ends(study)}"
    yield from _gate_starts(study)
    seed = study.results.tuning_seed
    yield (
        f"- Seeds: {listed(sorted({cell.seed for cell in cells}))}. A seed stands for the order of the data and "
        f"the weights at step 0 that arms share. Rates are chosen with seed {seed}."
    )
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in line["versions"].items()) for line in lines.values()
    )
    dates = sorted({line["date"] for line in lines.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    machines = listed(dict.fromkeys(line["machine"] for line in lines.values()))
    yield f"- On {machines}, {when}; {'; '.join(versions)}.\n"


def _gate_starts(study: Material) -> Lines:
    """Writes how large gate vectors were at step 0, by width.

    Without a flag of their own they were drawn as the weights.
    """
    found: dict[str, None] = {}
    for line in study.results.lines.values():
        given = flag_values(line["flags"])
        deviation = given.get("--moa-gate-init-std", given.get("--init-method-std"))
        if given.get("--moa-mixing") == "moa" and deviation is not None:
            found[f"{deviation} at h {given['--hidden-size']}"] = None
    if found:
        yield f"- Standard deviation of gate vectors at step 0: {listed(found)} (the paper's: 0.02)."


def _ends(study: Material) -> str:
    """Returns what learning rates come down to, by the flags of the runs."""
    ends: dict[str, None] = {}
    for line in study.results.lines.values():
        given = flag_values(line["flags"])
        if "--min-lr" in given:
            ends[f"{float(given['--min-lr']) / float(given['--lr']):.3g}"] = None
    return f"Rates come down to {listed(ends)} of their peak (the paper's: 0.05 cosine, 0 WSD)." if ends else ""


def not_shown(study: Material) -> Lines:
    """Writes what the runs leave open: sizes, texts, machines, arms that are missing or undecided."""
    results, cells = study.results, list(study.results.lines)
    lines = results.lines.values()
    largest = max(line["non_embedding"] for line in lines)
    budget = max(cell.tokens for cell in cells)
    yield "## What is not shown\n"
    yield (
        f"- Larger models and longer training: the largest here has {largest / 1e6:.2g}M parameters without "
        f"embeddings, the longest run {budget / 1e6:g}M tokens; the paper begins at {PAPER_SMALLEST / 1e6:g}M and "
        f"{PAPER_SHORTEST / 1e6:g}M."
    )
    yield f"- Other text than {listed(dict.fromkeys(cell.corpus for cell in cells))}, and any downstream task."
    if all("CPU" in line["machine"] for line in lines):
        yield "- A GPU: none was used. What a mixture costs in time there is not known from this."
    if not any(flag in line["flags"] for line in lines for flag in ("--bf16", "--fp16")):
        yield "- bf16 and fp16: everything here is float32."
    yield from _not_run(study)
    if not study.evidence.timings:
        yield f"- Loss against time: steps were not timed one arm at a time (no {TIMING})."
    if not study.evidence.gates:
        yield "- What trained gates do: there is no analysis of them (gates-NAME.json)."
    yield from _undecided(study)
    yield from _weak_tuning(study)
    yield (
        f"- Rates were chosen with seed {results.tuning_seed}, which then counts like the others. That flatters "
        "every arm a little, one with more rates tried a little more; a rate between two tried ones may be better."
    )
    yield ""


def _not_run(study: Material) -> Lines:
    """Names optimizers, schedules and arms without any run."""
    cells, lines = list(study.results.lines), study.results.lines.values()
    not_run = [
        name
        for name, run in (
            ("Muon", any(cell.optimizer == "muon" for cell in cells)),
            ("WSD", any(cell.schedule == "wsd" for cell in cells)),
            ("a MoE", any("--num-experts" in line["flags"] for line in lines)),
            ("SwiGLU of MoA's step time", any(cell.arm == "swiglu-time" for cell in cells)),
        )
        if not run
    ]
    if not_run:
        yield f"- Not run: {listed(not_run)}."


def _undecided(study: Material) -> Lines:
    """Writes which arms are undecided against SwiGLU, and which are missing."""
    known = {arm: study.difference(arm, BASELINE) for arm in study.results.arms(study.main) if arm != BASELINE}
    known = {arm: difference for arm, difference in known.items() if difference is not None}
    for verdict, why in (
        (UNDECIDED, ", several seeds)"),
        (ONE_SEED, "): one seed decides nothing"),
        (UNTUNED, "): best rate not found"),
        (DIVERGED, "): a run diverged"),
    ):
        arms = [arm_title(arm) for arm, difference in known.items() if difference.verdict == verdict]
        if arms:
            yield f"- Whether these differ from SwiGLU (main setting{why}: {listed(arms, '; ')}."
    halves = [difference.half for difference in known.values() if difference.count > 1]
    if halves:
        yield (
            f"- Differences below about {statistics.median(halves):.3f} nats, half the width of the main setting's "
            "middle interval."
        )
    steps = [step for _, chain in CHAINS for step in chain]
    if not any(study.difference(step.arm, step.to) for step in steps):
        return  # a study of other arms
    compared = dict.fromkeys(arm for step in steps for arm in (step.arm, step.to))
    there = {cell.arm for cell in study.results.lines}
    missing = [arm for arm in compared if study.results.tuned(study.main, arm) is None]
    for text, arms in (
        ("not run in the main setting but in others", [arm for arm in missing if arm in there]),
        ("not run", [arm for arm in missing if arm not in there]),
    ):
        if arms:
            yield f"- What needs these arms, {text}: {listed(map(arm_title, arms), '; ')}."


def _weak_tuning(study: Material) -> Lines:
    """Writes which best rates may lie elsewhere, and which runs diverged."""
    ends, single = [], []
    for setting in study.results.settings:
        there = [tuned for tuned in study.tuned(setting) if not tuned.inside]
        of = setting_title(setting)
        at_end = [arm_title(tuned.arm) for tuned in there if len(tuned.rates) > 1]
        alone = [arm_title(tuned.arm) for tuned in there if len(tuned.rates) == 1]
        ends += [f"in {of}: {listed(at_end, '; ')}."] if at_end else []
        single += [f"in {of}: {listed(alone, '; ')}."] if alone else []
    if ends:
        yield f"- The best rate, where an arm's best is at the end of what was tried: {' '.join(ends)}"
    if single:
        yield f"- The best rate, where one alone was tried: {' '.join(single)}"
    lost = [
        f"{arm_title(cell.arm)} at {cell.rate:g}, seed {cell.seed} ({setting_title(cell.setting)})"
        for cell, loss in study.results.losses.items()
        if not math.isfinite(loss)
    ]
    if lost:
        yield f"- The loss of runs that diverged: {'; '.join(lost)}. They are in no mean."
