"""Writes a study's report as markdown: what is shown, what is not, and the effect of each choice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.research.study.arms import ARMS
from megatron_moa.research.study.evidence import Evidence
from megatron_moa.research.study.paper import ROWS, reported
from megatron_moa.research.study.pictures import (
    CHIEF_ARMS,
    anchor,
    arm_panel,
    arm_title,
    draw_curves,
    draw_differences,
    draw_growth,
    draw_rates,
    plan_title,
    setting_title,
    size_title,
)
from megatron_moa.research.study.statistics import (
    AT_LEAST,
    AT_MOST,
    BASELINE,
    BETTER,
    CONFIDENCE,
    LEAST_SIZES,
    ONE_SEED,
    UNDECIDED,
    UNTUNED,
    WORSE,
    Interval,
    Setting,
    Tuned,
    fit_power_law,
)
from megatron_moa.research.study.steps import CHAINS, CONTROLS, MATCHED, OWN_SCALE, Step
from megatron_moa.research.study.timing import TIMING

_BI_SIDED = ("moa-bi-sided", "moa-bi-sided-matched", "la-bi-sided", "la-bi-sided-matched")
PAPER_SMALLEST = 120e6  # parameters; what arXiv 2605.26647 begins at


Lines = Iterator[str]


def report(evidence: Evidence, command: str, pictures: Path, link: str) -> str:
    """The whole text; its pictures are drawn on the way.

    Args:
        command: that writes this report.
        pictures: an empty folder to draw into.
        link: that folder, as seen from the text.

    Returns:
        Markdown, the same for the same evidence.
    """
    return "\n".join(_Report(evidence, command, pictures, link).lines()) + "\n"


class _Report:
    def __init__(self, evidence: Evidence, command: str, pictures: Path, link: str) -> None:
        self.evidence, self.results = evidence, evidence.results
        self.command, self.pictures, self.link = command, pictures, link
        self.main = self.results.main

    def lines(self) -> Lines:
        yield "# Does it pay? Mixtures of activations against tuned baselines\n"
        yield f"Written by `{self.command}` from the lines of finished runs; edit nothing here.\n"
        yield from self._in_short()
        yield from self._beside_the_paper()
        yield from self._what_was_run()
        yield from self._not_shown()
        yield from self._due_to_what()
        yield from self._settings_beside_one_another()
        yield from self._setting(self.main, "The main setting, arm by arm")
        yield from self._larger_rates()
        yield from self._against_tokens_and_time()
        yield from self._growth()
        yield from self._gates()
        others = [setting for setting in self.results.settings if setting != self.main]
        for setting in others:
            yield from self._setting(setting, setting_title(setting), steps=True)

    # The first screen.

    def _in_short(self) -> Lines:
        yield "## In short\n"
        yield f"Main setting: {setting_title(self.main)}. Validation loss in nats per token, every arm at its own best"
        yield "learning rate; differences are paired by seed, in brackets their 95 % interval.\n"
        mixtures = [arm for arm in self.results.arms(self.main) if arm_panel(arm) in ("LA", "MoA")]
        verdicts = [known.verdict for arm in mixtures if (known := self._difference(arm, BASELINE)) is not None]
        if verdicts:
            yield f"**Of {_count(len(verdicts), 'gated mixture')}, against tuned SwiGLU: {_tally(verdicts)}.**\n"
        for arm in _BI_SIDED:
            known = self._difference(arm, BASELINE)
            if known is not None:
                yield f"- {arm_title(arm)}, against SwiGLU: {self._with_percent(known)}: {_bold(known.verdict)}."
        for name, chain in (("as the paper starts it", OWN_SCALE[:3]), ("at SwiGLU's scale", MATCHED[:2])):
            parts = [(step, self._difference(step.arm, step.to)) for step in chain]
            if all(known for _, known in parts):
                text = "; ".join(f"{step.what} {_number(known)} ({known.verdict})" for step, known in parts)
                yield f"- What that is due to, {name}: {text}."
        for to, what in (("swiglu-params", "as many parameters"), ("swiglu-time", "the same step time")):
            for arm in _BI_SIDED[:2]:
                known = self._difference(arm, to)
                if known is not None:
                    yield f"- {arm_title(arm)}, against a SwiGLU of {what}: {_number(known)}: {_bold(known.verdict)}."
        yield from self._elsewhere()
        best = min(self._tuned(self.main), key=lambda tuned: tuned.loss.mean, default=None)
        if best is not None:
            count = len(self._tuned(self.main))
            yield (
                f"- The lowest loss of {count} arms: {arm_title(best.arm)}, {best.loss.mean:.4f} "
                f"({_count(len(best.losses), 'seed')})."
            )
        yield from self._controls_in_short()
        yield from self._gates_in_short()
        yield ""

    def _elsewhere(self) -> Lines:
        """How often the main comparisons come out the same way in other settings."""
        for arm in _BI_SIDED[:2]:
            known = [self.results.difference(setting, arm, BASELINE) for setting in self.results.settings]
            verdicts = [difference.verdict for difference in known if difference is not None]
            if len(verdicts) > 1:
                yield f"- {arm_title(arm)}, against SwiGLU, in {len(verdicts)} settings: {_tally(verdicts)}."

    def _gates_in_short(self) -> Lines:
        from megatron_moa.research.gates.analysis import change, continued_summary

        what = {"frozen": "with frozen gates", "la": "with gates replaced by their means, which train"}
        means = [
            f"{name} {change(row)}"
            for name, content in self.evidence.gates.items()
            for row in (content.get("ablation") or {"rows": []})["rows"]
            if row["kind"] == "mean"
        ]
        if means:
            yield f"- [Trained gates](#trained-gates) replaced by their means: {_listed(means, '; ')}."
        for name, content in self.evidence.gates.items():
            for entry in continued_summary(content.get("continued") or []):
                if "difference" in entry:
                    yield (
                        f"- {name} trained on {what[entry['way']]}, against training on as it is: "
                        f"{change(entry)}, {_count(len(entry['seeds']), 'seed')}."
                    )

    def _controls_in_short(self) -> Lines:
        for step in CONTROLS:
            known = self._difference(step.arm, step.to)
            if known is not None:
                yield f"- Control, {arm_title(step.arm)}: {_number(known)}, {_judged(step, known)}."

    def _beside_the_paper(self) -> Lines:
        """The rows of the paper's tables 1 and 2, setting by setting."""
        yield "## Beside the paper\n"
        yield "Type I against ReLU2, Type II against SwiGLU, every arm at its own best rate; gates are sigmoid where no"
        yield "others are named. The last column: what arXiv 2605.26647 reports, and of which model.\n"
        for setting in self.results.settings:
            rows = [row for arm in ROWS if (row := self._row(setting, arm))]
            if any(row[4] for row in rows):
                yield f"### {setting_title(setting)}\n"
                header = ["arm", "best rate", "loss", "compared with", "difference", "is", "the paper's"]
                yield from _table([header, *rows])

    def _row(self, setting: Setting, arm: str) -> list[str]:
        """An arm beside what the paper reports of it; nothing where it was not run."""
        tuned = self.results.tuned(setting, arm)
        if tuned is None:
            return [arm_title(arm), "none, all diverged", *[""] * 5] if arm in self.results.arms(setting) else []
        end = "" if tuned.inside else ", the only one" if len(tuned.rates) == 1 else ", at the end"
        row = [arm_title(arm), f"{tuned.rate:g}{end}", f"{tuned.loss.mean:.4f}"]
        to = BASELINE if arm == ARMS[arm].baseline else ARMS[arm].baseline
        known = None if arm == to else self.results.difference(setting, arm, to)
        if known is None:
            return [*row, *[""] * 4]
        there = reported(arm, setting[1], setting[2])
        beside = f"{there[0]:+.3f} ({there[1]})" if there else ""
        return [*row, arm_title(to), _number(known), _bold(known.verdict), beside]

    def _what_was_run(self) -> Lines:
        lines = self.results.lines
        cells = list(lines)
        yield "## What was run\n"
        diverged = sum(not math.isfinite(loss) for loss in self.results.losses.values())
        arms = dict.fromkeys(cell.arm for cell in cells)
        yield f"- {_count(len(cells), 'run')} of {_count(len(arms), 'arm')}, {diverged} diverged."
        yield f"- Text: {_listed(dict.fromkeys(cell.corpus for cell in cells))}."
        sizes = {cell.size: lines[cell]["non_embedding"] for cell in cells if cell.arm == BASELINE}
        sizes = {cell.size: lines[cell]["non_embedding"] for cell in cells if cell.size not in sizes} | sizes
        text = _listed(f"{size_title(size)} ({count:,})" for size, count in sorted(sizes.items(), key=lambda s: s[1]))
        yield f"- Sizes (SwiGLU's parameters without embedding and output layer): {text}."
        budgets = sorted({cell.tokens for cell in cells})
        yield f"- Tokens: {_listed(f'{tokens / 1e6:g}M' for tokens in budgets)}."
        plans = dict.fromkeys(plan_title(cell.optimizer, cell.schedule) for cell in cells)
        yield f"- Optimizers and schedules: {_listed(plans, '; ')}. {self._ends()}"
        yield from self._gate_starts()
        seed = self.results.tuning_seed
        yield (
            f"- Seeds: {_listed(sorted({cell.seed for cell in cells}))}. A seed stands for the order of the data and "
            f"the weights at step 0 that arms share. Rates are chosen with seed {seed}."
        )
        versions = dict.fromkeys(
            ", ".join(f"{name} {number}" for name, number in line["versions"].items()) for line in lines.values()
        )
        dates = sorted({line["date"] for line in lines.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        machines = _listed(dict.fromkeys(line["machine"] for line in lines.values()))
        yield f"- On {machines}, {when}; {'; '.join(versions)}.\n"

    def _gate_starts(self) -> Lines:
        """How large gate vectors were at step 0, by width; runs without a flag for it drew them as the weights."""
        found: dict[str, None] = {}
        for line in self.results.lines.values():
            given = dict(pairwise(line["flags"]))
            deviation = given.get("--moa-gate-init-std", given.get("--init-method-std"))
            if given.get("--moa-mixing") == "moa" and deviation is not None:
                found[f"{deviation} at h {given['--hidden-size']}"] = None
        if found:
            yield f"- Standard deviation of gate vectors at step 0: {_listed(found)} (the paper's: 0.02)."

    def _ends(self) -> str:
        """What the learning rate comes down to, by what runs were given."""
        ends: dict[str, None] = {}
        for line in self.results.lines.values():
            given = dict(pairwise(line["flags"]))
            if "--min-lr" in given:
                ends[f"{float(given['--min-lr']) / float(given['--lr']):.3g}"] = None
        return f"Rates come down to {_listed(ends)} of their peak (the paper's: 0.05 cosine, 0 WSD)." if ends else ""

    def _not_shown(self) -> Lines:
        results, cells = self.results, list(self.results.lines)
        lines = results.lines.values()
        largest = max(line["non_embedding"] for line in lines)
        budget = max(cell.tokens for cell in cells)
        yield "## What is not shown\n"
        beside = f"; the paper begins at {PAPER_SMALLEST / 1e6:g}M" if largest < PAPER_SMALLEST else ""
        yield (
            f"- Larger models and longer training: the largest here has {largest / 1e6:.2g}M parameters without "
            f"embeddings{beside}, the longest run {budget / 1e6:g}M tokens."
        )
        yield f"- Other text than {_listed(dict.fromkeys(cell.corpus for cell in cells))}, and any downstream task."
        if all("CPU" in line["machine"] for line in lines):
            yield "- A GPU: none was used. What a mixture costs in time there is not known from this."
        if not any(flag in line["flags"] for line in lines for flag in ("--bf16", "--fp16")):
            yield "- bf16 and fp16: everything here is float32."
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
            yield f"- Not run: {_listed(not_run)}."
        if not self.evidence.timings:
            yield f"- Loss against time: steps were not timed one arm at a time (no {TIMING})."
        if not self.evidence.gates:
            yield "- What trained gates do: there is no analysis of them (gates-NAME.json)."
        yield from self._undecided()
        yield from self._weak_tuning()
        yield (
            f"- Rates were chosen with seed {results.tuning_seed}, which then counts like the others. That flatters "
            "every arm a little, one with more rates tried a little more; a rate between two tried ones may be better."
        )
        yield ""

    def _undecided(self) -> Lines:
        known = {arm: self._difference(arm, BASELINE) for arm in self.results.arms(self.main) if arm != BASELINE}
        known = {arm: difference for arm, difference in known.items() if difference is not None}
        for verdict, text in (
            (UNDECIDED, "Whether these differ from SwiGLU (main setting, several seeds)"),
            (ONE_SEED, "Whether these differ from SwiGLU (main setting): one seed decides nothing"),
        ):
            arms = [arm_title(arm) for arm, difference in known.items() if difference.verdict == verdict]
            if arms:
                yield f"- {text}: {_listed(arms, '; ')}."
        halves = [difference.half for difference in known.values() if difference.count > 1]
        if halves:
            yield (
                f"- Differences below about {statistics.median(halves):.3f} nats, half the width of the main setting's "
                "middle interval."
            )
        compared = dict.fromkeys(arm for _, chain in CHAINS for step in chain for arm in (step.arm, step.to))
        there = {cell.arm for cell in self.results.lines}
        missing = [arm for arm in compared if self.results.tuned(self.main, arm) is None]
        for text, arms in (
            ("not run in the main setting but in others", [arm for arm in missing if arm in there]),
            ("not run", [arm for arm in missing if arm not in there]),
        ):
            if arms:
                yield f"- What needs these arms, {text}: {_listed(map(arm_title, arms), '; ')}."

    def _weak_tuning(self) -> Lines:
        """Arms whose best rate may lie elsewhere, and runs that diverged."""
        ends, single = [], []
        for setting in self.results.settings:
            there = [tuned for tuned in self._tuned(setting) if not tuned.inside]
            of = setting_title(setting)
            at_end = [arm_title(tuned.arm) for tuned in there if len(tuned.rates) > 1]
            alone = [arm_title(tuned.arm) for tuned in there if len(tuned.rates) == 1]
            ends += [f"in {of}: {_listed(at_end, '; ')}."] if at_end else []
            single += [f"in {of}: {_listed(alone, '; ')}."] if alone else []
        if ends:
            yield f"- The best rate, where an arm's best is at the end of what was tried: {' '.join(ends)}"
        if single:
            yield f"- The best rate, where one alone was tried: {' '.join(single)}"
        lost = [
            f"{arm_title(cell.arm)} at {cell.rate:g}, seed {cell.seed} ({setting_title(cell.setting)})"
            for cell, loss in self.results.losses.items()
            if not math.isfinite(loss)
        ]
        if lost:
            yield f"- The loss of runs that diverged: {'; '.join(lost)}. They are in no mean."

    # What is due to what.

    def _due_to_what(self) -> Lines:
        yield "## What is due to what\n"
        yield f"{setting_title(self.main)}. Each line changes one thing; a negative difference is a gain.\n"
        yield from self._steps(self.main, in_words=True)
        yield from self._comparisons()
        seed = self.results.tuning_seed
        parts = []
        for step in (*OWN_SCALE, *MATCHED):
            known = self.results.difference(self.main, step.arm, step.to, without={seed})
            if known is not None and known.count >= 3:
                parts.append(f"{arm_title(step.arm)} - {arm_title(step.to)} {_number(known)}")
        if parts:
            yield f"Without seed {seed}, which chose the rates: {'; '.join(parts)}.\n"

    def _steps(self, setting: Setting, in_words: bool = False) -> Lines:
        """All of them for the main setting; for another, those that are not in the tables over all settings."""
        for title, chain in CHAINS:
            if not in_words and chain in (OWN_SCALE, MATCHED):
                continue
            known = [(step, self.results.difference(setting, step.arm, step.to)) for step in chain]
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
                    _number(difference),
                    str(difference.count),
                    _judged(step, difference) if step.expected else _bold(difference.verdict),
                ]
                for step, difference in there
            ]
            yield from _table(rows)
            if in_words:
                yield " ".join(_sentence(step, difference) for step, difference in there)
                missing = [step.what for step, difference in known if difference is None]
                if missing:
                    yield f"Missing, for want of runs: {_listed(missing)}."
                yield ""

    def _comparisons(self) -> Lines:
        """That among many intervals some miss, and which verdicts bear that."""
        steps = [(step, self._difference(step.arm, step.to)) for _, chain in CHAINS for step in chain]
        several = [(step, known) for step, known in steps if known is not None and known.count > 1]
        if len(several) < 2:
            return
        strict = 1 - (1 - CONFIDENCE) / len(several)
        firm = [
            f"{step.what} ({arm_title(step.arm)} - {arm_title(step.to)})"
            for step, _ in several
            if self.results.difference(self.main, step.arm, step.to, strict).decided
        ]
        decided = sum(known.decided for _, known in several)
        yield (
            f"**Many comparisons.** {len(several)} intervals are in these tables; of so many, about "
            f"{(1 - CONFIDENCE) * len(several):.1f} miss the truth by chance. {decided} exclude zero. With intervals "
            f"widened so that all hold together ({strict:.2%} each, Bonferroni) these still do: "
            f"{_listed(firm, '; ') or 'none'}.\n"
        )

    def _settings_beside_one_another(self) -> Lines:
        for name, chain in (("as the paper starts it", OWN_SCALE), ("at SwiGLU's scale", MATCHED)):
            rows = []
            for setting in self.results.settings:
                known = [self.results.difference(setting, step.arm, step.to) for step in chain]
                if any(known):
                    rows.append([setting_title(setting), *(_short(difference) for difference in known)])
            if rows and len(self.results.settings) > 1:
                yield f"### The same steps in every setting, {name}\n"
                yield from _table([["setting", *(step.what for step in chain)], *rows])
                yield "±: half the interval's width; bold: the interval excludes zero; (1): one seed, no interval."
                yield "≤, ≥: the best rate of the arm, of what it is compared with, is at the end of what was tried, so"
                yield "that a better one would lower, raise the difference; ?: of both.\n"

    # Setting by setting.

    def _setting(self, setting: Setting, title: str, steps: bool = False) -> Lines:
        yield f"## {title}\n"
        if self.results.tuned(setting, BASELINE) is None:
            yield "SwiGLU has no finished run here: nothing to take differences to.\n"
        rows = [["arm", "best rate", "rates tried: loss", "seeds", "loss", "less SwiGLU's", "is"]]
        for arm in self.results.arms(setting):
            tuned = self.results.tuned(setting, arm)
            if tuned is None:
                rows.append([arm_title(arm), "none", f"no finite loss of seed {self.results.tuning_seed}", *[""] * 4])
                continue
            known = None if arm == BASELINE else self.results.difference(setting, arm, BASELINE)
            rates = ", ".join(f"{rate:g}: {_loss(loss)}" for rate, loss in tuned.rates.items())
            seeds = " ".join(map(str, tuned.losses))
            seeds += "".join(f" ({seed} diverged)" for seed in tuned.diverged)
            end = "" if tuned.inside else ", **the only one**" if len(tuned.rates) == 1 else ", **at the end**"
            verdict = "" if known is None else _bold(known.verdict)
            difference = "" if known is None else _number(known)
            rows.append(
                [arm_title(arm), f"{tuned.rate:g}{end}", rates, seeds, f"{tuned.loss.mean:.4f}", difference, verdict]
            )
        yield from _table(rows)
        if setting == self.main and len(self._tuned(setting)) > 1 and self.results.tuned(setting, BASELINE):
            yield from self._picture("differences.png", "difference to SwiGLU", draw_differences, setting)
        if any(len(tuned.rates) > 1 for tuned in self._tuned(setting)):
            yield from self._picture(f"rates-{anchor(setting)}.png", "loss against learning rate", draw_rates, setting)
        if steps:
            yield from self._steps(setting)

    def _larger_rates(self) -> Lines:
        yield "## Larger learning rates\n"
        rows = [["arm", "best rate", "lost at twice", "lost at four times", "less what SwiGLU loses at twice", "is"]]
        baseline = self.results.lost(self.main, BASELINE, 2)
        for tuned in self._tuned(self.main):
            twice, four = (self.results.lost(self.main, tuned.arm, factor) for factor in (2, 4))
            if not twice and not four:
                continue
            beside, verdict = "", ""
            if tuned.arm != BASELINE:
                pairs = [twice[seed] - baseline[seed] for seed in twice if seed in baseline]
                if pairs and all(map(math.isfinite, pairs)):
                    known = Interval.of(pairs)
                    beside, verdict = (
                        _number(known),
                        {BETTER: "bears more", WORSE: "bears less"}.get(known.verdict, known.verdict),
                    )
            rows.append([arm_title(tuned.arm), f"{tuned.rate:g}", _lost(twice), _lost(four), beside, verdict])
        if len(rows) == 1:
            yield "No arm was run at twice or four times its best rate.\n"
            return
        yield f"{setting_title(self.main)}. What an arm loses at a multiple of its own best rate, mean over seeds.\n"
        yield from _table(rows)
        for arm in _BI_SIDED[:2]:
            yield from self._bears_more(arm)
        yield from self._best_rates()

    def _best_rates(self) -> Lines:
        """Of the arms that have a learning rate in several settings, beside one another."""
        arms = (BASELINE, "la-bi-sided", "la-bi-sided-matched", "moa-bi-sided", "moa-bi-sided-matched")
        rows = []
        for setting in self.results.settings:
            baseline, *mixtures = (self.results.tuned(setting, arm) for arm in arms)
            if baseline is not None and any(mixtures):
                rows.append([setting_title(setting), *(self._rate(setting, tuned) for tuned in (baseline, *mixtures))])
        if len(rows) > 1:
            yield "### Best rates in every setting, and what is lost at twice\n"
            yield from _table([["setting", *map(arm_title, arms)], *rows])
            seed = self.results.tuning_seed
            yield f"With seed {seed}; ≤, ≥: at the lower, upper end of what was tried, a better one may lie beyond;"
            yield "(?): the only one tried. In brackets: the loss at twice that rate, less that at it.\n"

    def _rate(self, setting: Setting, tuned: Tuned | None) -> str:
        """An arm's best learning rate, where among those that were tried it lies, and how much is lost at twice."""
        if tuned is None:
            return ""
        if len(tuned.rates) == 1:
            return f"{tuned.rate:g} (?)"
        bound = "" if tuned.inside else AT_MOST if tuned.rate == min(tuned.rates) else AT_LEAST
        twice = self.results.lost(setting, tuned.arm, 2)
        seed = self.results.tuning_seed
        return f"{bound}{tuned.rate:g}" + (f" ({_lost({seed: twice[seed]})})" if seed in twice else "")

    def _bears_more(self, arm: str) -> Lines:
        """The paper's claim, in a sentence."""
        mixed, fixed = self.results.tuned(self.main, arm), self.results.tuned(self.main, BASELINE)
        mine, theirs = (self.results.lost(self.main, name, 2) for name in (arm, BASELINE))
        pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
        if mixed is None or fixed is None or not pairs:
            return
        factor = mixed.rate / fixed.rate
        known = Interval.of(pairs) if all(map(math.isfinite, pairs)) else None
        flatter = statistics.fmean(pairs) < 0
        if factor >= 1.5 and flatter:
            claim = "seen"
        elif factor >= 1.5 or flatter:
            claim = "seen in part"
        else:
            claim = "not seen"
        how = "one seed: not decided" if len(pairs) == 1 else f"{len(pairs)} seeds"
        interval = "" if known is None or known.count == 1 else f", {_number(known)}: {known.verdict}"
        best = "SwiGLU's too" if factor == 1 else f"{factor:g} times SwiGLU's"
        yield (
            f"That MoA bears 1.5 to 2 times the baseline's rate is **{claim}** for {arm_title(arm)}: its best rate is "
            f"{best}, and at twice that it loses {_lost(mine)} where SwiGLU loses {_lost(theirs)} ({how}{interval}).\n"
        )

    def _against_tokens_and_time(self) -> Lines:
        there = {tuned.arm for tuned in self._tuned(self.main)}
        arms = [arm for arm in CHIEF_ARMS if arm in there]
        yield "## Against tokens and time\n"
        if BASELINE not in there:
            yield "SwiGLU has no finished run in the main setting.\n"
            return
        yield from self._picture("tokens.png", "training loss against tokens", draw_curves, self.main, arms)
        timing = self.evidence.timings.get((self.main[1], self.main[3]))
        for (size, optimizer), line in self.evidence.timings.items():
            times, reference = line["milliseconds"], line["milliseconds"].get(BASELINE)
            yield (
                f"A step's time, size {size_title(size)} with {optimizer}: median of {line['rounds']}, the arms' steps "
                f"in turn, {_count(line['threads'], 'thread')}; {line['machine']}, {line['date']}. "
                f"SwiGLU takes MoA's time with f = {line['equal_time_width']}.\n"
            )
            rows = [["arm", "ms a step", "times SwiGLU's"]]
            rows += [
                [arm_title(arm), f"{time:.1f}", f"{time / reference:.3f}" if reference else ""]
                for arm, time in times.items()
                if arm in ARMS
            ]
            yield from _table(rows)
        if timing is None:
            yield f"No step times ({TIMING}) for the main setting's size and optimizer: no comparison against time.\n"
            return
        timed = [arm for arm in arms if arm in timing["milliseconds"]]
        left = [arm_title(arm) for arm in self.results.arms(self.main) if arm not in timing["milliseconds"]]
        if left:
            yield f"Not timed, so left out of this: {_listed(left, '; ')}.\n"
        if BASELINE in timed:
            times = timing["milliseconds"]
            yield from self._picture("time.png", "training loss against time", draw_curves, self.main, timed, times)
            yield (
                "Where a faster arm's run ends, a slower one's learning rate has not come down yet: what compares "
                "fairly at equal time is a widened SwiGLU, above.\n"
            )

    def _growth(self) -> Lines:
        """Over sizes and over budgets: pictures and fits."""
        yield "## Against parameters, and fits\n"
        by_size = []
        for family in self._families(self.results.settings, lambda setting: (setting[0], *setting[2:])):
            by_size += self._families(family, self.results.kinds(family).__getitem__)
        by_tokens = self._families(self.results.settings, lambda setting: (setting[0], setting[1], *setting[3:]))
        for family in by_size:
            if len(family) > 1 or family == [self.main]:
                name = f"parameters-{anchor(family[0])}.png"
                yield from self._picture(name, "loss against parameters", draw_growth, family)
        for family in by_tokens:
            if len(family) > 1:
                name = f"budgets-{family[0][0]}-{family[0][1]}-{'-'.join(family[0][3:])}.png"
                yield from self._picture(name, "loss against tokens trained on", draw_growth, family, True)
        fits = [
            line
            for families, over_tokens in ((by_size, False), (by_tokens, True))
            for family in families
            for line in self._fits(family, over_tokens)
        ]
        if fits:
            yield from fits
            yield "±: half the 95 % interval, by the fit's linearisation; open: the points do not determine it.\n"
        else:
            sizes, budgets = (max(map(len, families), default=0) for families in (by_size, by_tokens))
            yield (
                f"No fit of L = E + A N^-a: it needs {LEAST_SIZES} sizes or budgets of an arm, all else equal; there "
                f"are at most {sizes} and {budgets}.\n"
            )

    def _fits(self, family: Sequence[Setting], over_tokens: bool) -> Lines:
        """A table of the arms that have points enough for a law; nothing where none has."""
        what, n = ("budgets", "tokens") if over_tokens else ("sizes", "parameters without embeddings")
        rows = [["arm", what, "E", "A", "a"]]
        for arm in dict.fromkeys(arm for setting in family for arm in self.results.arms(setting)):
            points = [
                ((setting[2] if over_tokens else tuned.non_embedding) / 1e6, loss)
                for setting in family
                if (tuned := self.results.tuned(setting, arm)) is not None
                for loss in tuned.losses.values()
            ]
            law = fit_power_law(*zip(*points, strict=True)) if points else None
            if law is not None:
                pairs = zip(law.values, law.halves, strict=True)
                fitted = [f"{value:.3g} ± {half:.2g}" if math.isfinite(half) else "open" for value, half in pairs]
                rows.append([arm_title(arm), str(len({x for x, _ in points})), *fitted])
        if len(rows) > 1:
            corpus, size, tokens, *plan = family[0]
            fixed = f"size {size_title(size)}" if over_tokens else f"{tokens / 1e6:g}M tokens"
            yield f"L = E + A N^-a over {what}, N in million {n} ({corpus}, {fixed}, {plan_title(*plan)}):\n"
            yield from _table(rows)

    def _families(self, settings: Sequence[Setting], key: Callable[[Setting], tuple]) -> list[list[Setting]]:
        """Those with the same key together, smaller ones first."""
        families: dict[tuple, list[Setting]] = {}
        for setting in settings:
            families.setdefault(key(setting), []).append(setting)
        return [sorted(family, key=self._extent) for family in families.values()]

    def _extent(self, setting: Setting) -> tuple[int, int]:
        return max((tuned.non_embedding for tuned in self._tuned(setting)), default=0), setting[2]

    def _gates(self) -> Lines:
        if not self.evidence.gates:
            return
        from megatron_moa.research.gates.analysis import beside_one_another, markdown
        from megatron_moa.research.gates.pictures import draw_curves

        yield "## Trained gates\n"
        if len(self.evidence.gates) > 1:
            yield from beside_one_another(self.evidence.gates)
            yield ""
        for number, (name, content) in enumerate(self.evidence.gates.items()):
            yield f"### {name}\n"
            yield from markdown(content, explained=number == 0)
            file = f"gates-{name}.png"
            draw_curves(content, self.pictures / file)
            yield ""
            yield "Each layer's activations at the mean coefficients (black) and at those of random tokens:\n"
            yield f"![activations of {name}]({self.link}/{file})\n"

    # Helpers.

    def _difference(self, arm: str, to: str) -> Interval | None:
        return self.results.difference(self.main, arm, to)

    def _tuned(self, setting: Setting) -> list[Tuned]:
        pairs = [self.results.tuned(setting, arm) for arm in self.results.arms(setting)]
        return [tuned for tuned in pairs if tuned is not None]

    def _with_percent(self, known: Interval) -> str:
        loss = self.results.tuned(self.main, BASELINE).loss.mean
        return f"{_number(known)}, {known.mean / loss:+.1%}"

    def _picture(self, name: str, title: str, draw: Callable[..., None], *what: object) -> Lines:
        """Draws it and shows it."""
        draw(self.results, self.pictures / name, *what)
        yield f"![{title}]({self.link}/{name})\n"


def _table(rows: Sequence[Sequence[str]]) -> Lines:
    """Markdown, the header first."""
    yield markdown_table(rows[0], rows[1:])
    yield ""


def _number(known: Interval) -> str:
    """A difference, with its interval where there is one."""
    text = f"{known.bound}{known.mean:+.4f}"
    return text if known.count < 2 else f"{text} [{known.low:+.4f}, {known.high:+.4f}]"


def _short(known: Interval | None) -> str:
    """The same for a narrow column."""
    if known is None:
        return ""
    text = f"{known.bound}{known.mean:+.4f}"
    if known.count < 2:
        return f"{text} (1)"
    text = f"{text} ± {known.half:.4f}"
    return f"**{text}**" if known.verdict in (BETTER, WORSE) else text


def _bold(verdict: str) -> str:
    return f"**{verdict}**" if verdict in (BETTER, WORSE) else verdict


def _judged(step: Step, known: Interval) -> str:
    """Whether a control comes out as it must."""
    if known.verdict in (ONE_SEED, UNTUNED):
        return known.verdict
    return f"{known.verdict}, {'as it must be' if known.verdict == step.expected else '**as it must not be**'}"


def _tally(verdicts: Sequence[str]) -> str:
    return _listed(
        f"{verdicts.count(word)} {word}" for word in (BETTER, WORSE, UNDECIDED, ONE_SEED, UNTUNED) if word in verdicts
    )


def _sentence(step: Step, known: Interval) -> str:
    """A step in words."""
    subject = step.words[0].upper() + step.words[1:]
    if known.verdict == UNTUNED:
        return f"{subject} was not compared at the best rate of both ({_number(known)})."
    if known.verdict == UNDECIDED:
        return f"{subject} makes no difference that {known.count} seeds decide ({_number(known)})."
    direction = "lowers" if known.mean < 0 else "raises"
    text = f"{subject} {direction} the loss by {abs(known.mean):.4f}"
    return f"{text} (one seed: not decided)." if known.count < 2 else f"{text}."


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def _lost(found: dict[int, float]) -> str:
    """The mean over seeds; in how many the run diverged."""
    if not found:
        return "not run"
    finite = [loss for loss in found.values() if math.isfinite(loss)]
    parts = [f"{statistics.fmean(finite):+.4f}"] if finite else []
    if len(finite) < len(found):
        parts.append(f"{len(found) - len(finite)} of {len(found)} diverged")
    return ", ".join(parts)


def _listed(names: Iterable[object], separator: str = ", ") -> str:
    return separator.join(map(str, names))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
