"""Writes the paper's claims, each with its verdict here and the comparison that decides it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moa.research.study.arms import ARMS, by_gate
from megatron_moa.research.study.claims import (
    CLAIMS,
    DENSE,
    Claim,
    Verdict,
    judge,
    paper_figure,
)
from megatron_moa.research.study.findings import CONFIRMED, CONTRADICTED, LEAST_MOE_GAIN, Pair, SettingVerdict
from megatron_moa.research.study.paper import CURVES, RATES_BORNE
from megatron_moa.research.study.pictures import arm_title, setting_title
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import counted, difference_text, listed, table
from megatron_moa.research.study.statistics import UNDECIDED

_CURVES = {  # over which of the paper's models a claim of growth goes
    "6a": (
        (("dense-0.12b", 20), ("dense-0.25b", 20)),
        tuple((model, 100) for model in ("moe-0.25b", "moe-0.5b", "moe-0.8b", "moe-1b", "moe-2b")),
    ),
    "6b": ((("dense-0.12b", 20), ("dense-0.12b", 100)),),
}


def papers_claims(study: Material) -> Lines:
    """Writes a row for each claim with the paper's coefficients at the start.

    A claim has a second row for ours where they were run. Where no claim has a comparison, a sentence says so.
    """
    papers, ours = ([(claim, judge(study.results, claim, own)) for claim in CLAIMS] for own in (False, True))
    run = [(claim, verdict) for claim, verdict in ours if verdict.deciding]
    yield "## The paper's claims\n"
    if not run and not any(verdict.deciding for _, verdict in papers):
        yield f"None of the {len(CLAIMS)} claims is judged: no two arms that one compares were run.\n"
        return
    yield f"With the paper's coefficients at the start: **{tally(papers)}**."
    yield f"With mixtures that start at SwiGLU's scale, which are ours: **{tally(run)}**.\n"
    rows = [
        ["claim", "the paper's figures", "start", "here", "weightiest comparison", "setting", "all settings, and why"]
    ]
    for claim, verdict in papers:
        rows.append([claim.title, _reported(claim), "the paper's", *_cells(verdict, claim.studies)])
        rows += [[_number(claim), "", "ours", *_cells(own)] for other, own in run if other == claim]
    yield from table(rows)
    yield f"The {len(CLAIMS)} statements are ours, drawn from the paper's figures."
    yield "The start is the paper's in coefficients and form; gate vectors are drawn with the deviations under"
    yield '"What was run", which are ours where they are not 0.02. A rule gives each verdict. A setting decides'
    yield "where the 95 % interval over paired seeds excludes 0, no rate beyond those tried could turn that round and"
    yield "no run diverged. A claim is confirmed where every form of it has a setting that decides so and none decides"
    yield "otherwise; contradicted where one decides otherwise and none so. That speaks for these settings alone:"
    yield "they are not the paper's. The weightiest comparison has the most seeds at best rates, then the narrowest"
    yield "interval. 4 compares what a larger rate costs the mixture with what it costs SwiGLU. 5b is confirmed"
    yield f"where the interval holds smaller gains than {LEAST_MOE_GAIN:g} alone, the paper's least of other forms in"
    yield "MoE, and contradicted where it holds larger ones alone. 6 needs a decided gain in the smaller setting. No"
    yield "interval is widened for their number."
    yield "A file is run by `python tools/study.py --study examples/studies/FILE`.\n"


def tally(verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    """Counts verdicts; whatever is neither confirmed nor contradicted is undecided."""
    words = [verdict.word for _, verdict in verdicts]
    yes, no = (words.count(word) for word in (CONFIRMED, CONTRADICTED))
    return f"of {counted(len(words), 'claim')} {yes} confirmed, {no} contradicted, {len(words) - yes - no} undecided"


def _number(claim: Claim) -> str:
    return claim.title.split(".")[0]


def _cells(verdict: Verdict, studies: Sequence[str] = ()) -> list[str]:
    """Returns the verdict, what decides it, in which setting, and what all settings say together."""
    word = f"**{verdict.word}**" if verdict.word in (CONFIRMED, CONTRADICTED) else verdict.word
    settings = listed((setting_title(found.setting) for found in verdict.deciding), "; ")
    return [word, "; ".join(map(_comparison, verdict.deciding)), settings, _why(verdict, studies)]


def _comparison(found: SettingVerdict) -> str:
    note = f" ({found.note})" if found.note else ""
    text = f"{pair_title(found.pair, with_fixed=True)}{note}"
    return f"{text}: {difference_text(found.known)}, {counted(found.known.count, 'seed')}" if found.known else text


def _why(verdict: Verdict, studies: Sequence[str]) -> str:
    files = f" ({listed(f'`{name}`' for name in studies)})" if studies else ""
    if not verdict.deciding:
        return f"not run{files}"
    words = zip(verdict.counts, (CONFIRMED, CONTRADICTED), strict=True)
    parts = [f"{count} {word}" for count, word in words if count]
    parts += [f"{count} undecided ({reason})" for reason, count in verdict.reasons.items()]
    if verdict.shown and verdict.word == UNDECIDED:
        parts.append(f"confirmed for {listed(map(pair_title, verdict.shown))} alone")
    if verdict.missing:
        parts.append(f"not run: {listed(map(pair_title, verdict.missing))}{files}")
    return "; ".join(parts)


def pair_title(pair: Pair, with_fixed: bool = False) -> str:
    """Names what is compared, without its start; the fixed layer, or LA, on request."""
    first, second = (ARMS[name].unmatched or name for name in pair)
    arm, to = arm_title(first), arm_title(second)
    if second in by_gate(first).values():
        return f"{arm}, {ARMS[first].mixture.gate} minus {ARMS[second].mixture.gate} gates"
    return f"{arm} minus {to}" if with_fixed else arm


def _reported(claim: Claim) -> str:
    """Returns the paper's figures, and of which model and where."""
    if _number(claim) == "4":
        return "peak rates that are borne: {:g} to {:g} times the baseline's".format(*RATES_BORNE)
    if _number(claim) in _CURVES:
        return "; ".join(_growth(models) for models in _CURVES[_number(claim)])
    text = _figures([pair for part in claim.parts for pair in part], claim.model)
    return text + (f"; left out, as its figures speak against it: {_figures(claim.left_out)}" if claim.left_out else "")


def _figures(pairs: Sequence[Pair], model: str = DENSE) -> str:
    found: dict[str, list[str]] = {}
    for pair in pairs:
        value, where = paper_figure(pair, model)
        found.setdefault(where, []).append(f"{pair_title(pair)} {value:+.3f}")
    return "; ".join(f"{listed(texts, '; ')} ({where})" for where, texts in found.items())


def _growth(models: Sequence[tuple[str, int]]) -> str:
    arms = [arm for arm in CURVES[models[0]] if all(arm in CURVES[model] for model in models) and ARMS[arm].mixture]
    texts = [f"{arm_title(arm)} {listed(f'{CURVES[model][arm]:+.3f}' for model in models)}" for arm in arms]
    names, tokens = (listed(dict.fromkeys(values)) for values in zip(*models, strict=True))
    return f"{listed(texts, '; ')} ({names}; {tokens} tokens a parameter; curves)"
