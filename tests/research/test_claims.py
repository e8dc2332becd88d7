"""Tests megatron_moa/research/study/claims.py, which gives verdicts on the paper's claims.

The lines that are judged are such whose truth is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_moa.research.study.arms import ARMS
from megatron_moa.research.study.claims import CLAIMS, MIXED, Verdict, judge, matched, paper_figure
from megatron_moa.research.study.findings import CONFIRMED, CONTRADICTED, LEAST_MOE_GAIN
from megatron_moa.research.study.grid import read_study
from megatron_moa.research.study.statistics import UNDECIDED, Results, Setting
from tests.research.test_study_report import report_of, row, write
from tests.research.test_study_statistics import SETTING, line, seeds, tried
from tests.support.training import ROOT

CLAIM = {claim.title.split(".")[0]: claim for claim in CLAIMS}
FORMS = ("moa-one-sided", "moa-bi-sided", "moa-quadratic")
OTHER: Setting = ("english", *SETTING[1:])
OFFSETS = (0.0, 0.001, -0.001)
Lines = list[dict[str, Any]]


def arm(name: str, loss: float, rates: Sequence[float] = (0.004, 0.008, 0.016), count: int = 3, **where: Any) -> Lines:
    """Seeds at 0.008, which is the best of the rates; an arm's seeds differ by more than arms of a seed."""
    lines = seeds(name, [loss + 0.1 * seed + OFFSETS[seed] * len(name) / 9 for seed in range(count)], **where)
    return lines + [line(name, loss + 0.2, rate=rate, **where) for rate in rates if rate != 0.008]


def arms(*losses: tuple[str, float], **where: Any) -> Lines:
    return [content for name, loss in losses for content in arm(name, loss, **where)]


def verdict(number: str, lines: Lines, ours: bool = False) -> Verdict:
    return judge(Results(lines), CLAIM[number], ours)


def moe(lines: Lines) -> Lines:
    return [content | {"flags": ["--swiglu", "--num-experts", "8"]} for content in lines]


def test_a_claim_is_confirmed_where_every_form_is() -> None:
    lines = arms(("swiglu", 3.0), *((name, 2.9) for name in FORMS))
    found = verdict("1a", lines)
    assert (found.word, found.counts, found.missing) == (CONFIRMED, (3, 0), ())
    assert found.deciding[0].known.mean == pytest.approx(-0.1)
    assert verdict("1a", lines, ours=True).deciding == ()  # the paper's arms are not ours
    some = verdict("1a", arms(("swiglu", 3.0), ("moa-bi-sided", 2.9)))
    assert (some.word, some.shown) == (UNDECIDED, (("moa-bi-sided", "swiglu"),))
    assert some.missing == (("moa-one-sided", "swiglu"), ("moa-quadratic", "swiglu"))


def test_a_decided_setting_against_it_contradicts_and_two_that_disagree_decide_nothing() -> None:
    against = arms(("swiglu", 3.0), ("moa-bi-sided", 3.1))
    assert verdict("1a", against).word == CONTRADICTED
    other = arms(("swiglu", 3.0), ("moa-bi-sided", 2.9), setting=OTHER)
    found = verdict("1a", against + other)
    assert (found.word, found.counts) == (MIXED, (1, 1))
    assert [finding.setting for finding in found.deciding] == [OTHER, SETTING]
    # An undecided setting takes nothing from a decided one.
    open_one = [
        *tried("swiglu", [3.0, 3.1, 3.2], setting=OTHER),
        *tried("moa-bi-sided", [3.1, 3.0, 3.2], setting=OTHER),
    ]
    found = verdict("1a", against + open_one)
    assert (found.word, found.reasons) == (CONTRADICTED, {"interval spans 0": 1})


def test_why_nothing_is_decided() -> None:
    assert verdict("1a", arms(("swiglu", 3.0))).reasons == {}
    assert verdict("1a", arms(("swiglu", 3.0), ("moa-bi-sided", 2.9), count=1)).reasons == {"one seed": 1}
    diverged = [*arms(("swiglu", 3.0)), *arm("moa-bi-sided", 2.9), line("moa-bi-sided", None, seed=4)]
    found = verdict("1a", diverged)
    assert (found.word, found.reasons) == (UNDECIDED, {"a run diverged": 1})


@pytest.mark.parametrize(
    ("swiglu", "moa", "loss", "word"),
    [
        ((0.004, 0.016), (0.016,), 3.1, UNDECIDED),  # a better rate of MoA's could turn it round
        ((0.004, 0.016), (0.004,), 3.1, UNDECIDED),
        ((0.016,), (0.004, 0.016), 2.9, UNDECIDED),  # and one of SwiGLU's this
        ((0.004, 0.016), (0.016,), 2.9, CONFIRMED),  # what would only add to it does no harm
        ((0.016,), (0.004, 0.016), 3.1, CONTRADICTED),
    ],
)
def test_a_best_rate_at_the_end_of_those_tried(swiglu: tuple, moa: tuple, loss: float, word: str) -> None:
    lines = arm("relu2", 3.0, swiglu) + arm("moa-type1", loss, moa)
    found = verdict("1b", lines)
    assert found.word == word
    assert found.reasons == ({"best rate at the end of those tried, or the only one": 1} if word == UNDECIDED else {})


def test_ours_and_the_papers_are_judged_apart() -> None:
    lines = arms(
        ("la-bi-sided", 3.0), ("moa-bi-sided", 3.1), ("la-bi-sided-matched", 3.0), ("moa-bi-sided-matched", 2.9)
    )
    assert verdict("2", lines).word == CONTRADICTED
    own = verdict("2", lines, ours=True)
    assert own.shown == (("moa-bi-sided-matched", "la-bi-sided-matched"),)
    assert matched(("moa-bi-sided", "swiglu")) == ("moa-bi-sided-matched", "swiglu")


def test_sigmoid_has_to_be_better_than_both_others_in_both_forms() -> None:
    names = [(form, 2.9) for form in ("moa-type1", "moa-bi-sided")]
    names += [(f"{form}-{gate}", 3.0) for form, _ in names for gate in ("softmax", "tanh")]
    assert verdict("3", arms(*names)).word == CONFIRMED
    assert verdict("3", arms(*names[:-1])).missing == (("moa-bi-sided", "moa-bi-sided-tanh"),)


def test_larger_rates_cost_the_mixture_less() -> None:
    def lines(fixed: float, mixed: float, best: float = 3.0) -> Lines:
        found = []
        for name, cost in (("swiglu", fixed), *((form, mixed) for form in FORMS)):
            found += arm(name, best, (0.004,))
            found += seeds(name, [best + 0.1 * seed + cost + OFFSETS[seed] for seed in range(3)], rate=0.016)
        return found

    assert verdict("4", lines(0.2, 0.1)).word == CONFIRMED
    assert verdict("4", lines(0.1, 0.2)).word == CONTRADICTED
    found = verdict("4", lines(0.2, -0.1))  # best at twice SwiGLU's, where the grid ends: more could only help
    assert (found.word, found.deciding[0].note) == (CONFIRMED, "what rate 0.016 costs over 0.008")
    few = [content for content in lines(0.2, 0.1) if content["cell"]["seed"] == 1]
    assert verdict("4", few).reasons == {"one seed": 3}
    lost = [*lines(0.2, 0.1), line("swiglu", None, rate=0.016, seed=4), line("swiglu", 3.4, seed=4)]
    lost += [line(name, 3.4, seed=4, rate=rate) for name in FORMS for rate in (0.008, 0.016)]
    assert verdict("4", lost).reasons == {"a run diverged": 3}
    no_lower = [
        content for content in lines(0.2, 0.1) if (content["cell"]["arm"], content["cell"]["rate"]) != ("swiglu", 0.004)
    ]
    assert verdict("4", no_lower).reasons == {"best rate at the end of those tried, or the only one": 3}


@pytest.mark.parametrize(
    ("gain", "spread", "word"),
    [
        (0.0, 0.001, CONFIRMED),  # an interval narrower than any gain that the paper reports
        (0.0, 0.01, UNDECIDED),
        (0.1, 0.01, CONFIRMED),
        (-0.1, 0.01, CONTRADICTED),
        (-0.001, 0.0001, CONFIRMED),  # a gain that is sure, and as small as the paper's
        (-0.006, 0.0001, UNDECIDED),
    ],
)
def test_no_gain_needs_an_interval_without_one(gain: float, spread: float, word: str) -> None:
    assert f"{LEAST_MOE_GAIN:.3f}" == "0.006"
    lines = [*tried("swiglu", [3.0, 3.1, 3.2])]
    lines += tried("moa-bi-sided", [3.0 + gain, 3.1 + gain + spread, 3.2 + gain - spread])
    assert verdict("5b", moe(lines)).word == word
    assert verdict("5b", lines).deciding == ()  # a dense model says nothing of it
    assert verdict("1a", moe(lines)).deciding == ()
    assert verdict("5a", moe(arms(("swiglu", 3.0), ("moa-one-sided", 2.9), ("moa-quadratic", 2.9)))).word == CONFIRMED


@pytest.mark.parametrize(
    ("small", "large", "word"),
    [
        (-0.1, -0.05, CONFIRMED),
        (-0.1, 0.05, CONTRADICTED),
        (-0.1, 0.0, CONTRADICTED),  # the interval spans 0, and lies above that of the smaller
        (0.0, -0.1, UNDECIDED),
    ],
)
def test_a_gain_keeps(small: float, large: float, word: str) -> None:
    for number, setting, size in (
        ("6a", ("python", "1M", *SETTING[2:]), 10**6),
        ("6b", (*SETTING[:2], 4_000_000, *SETTING[3:]), 400_000),
    ):
        lines: Lines = []
        for gain, where in ((small, {}), (large, {"setting": setting, "non_embedding": size})):
            lines += arms(("swiglu", 3.0), **where)
            for name in FORMS:
                lines += [
                    content | {"final": content["final"] + gain * (content["cell"]["rate"] == 0.008)}
                    for content in arm(name, 3.0, **where)
                ]
        found = verdict(number, lines)
        assert found.word == word, number
        assert found.deciding[0].setting == setting
        if word == UNDECIDED:
            assert found.reasons == {"no decided gain in the smaller one": 3}
    assert verdict("6a", lines).deciding == ()  # more tokens are no larger model


def test_every_claim_names_studies_that_run_its_arms() -> None:
    for claim in CLAIMS:
        runs = [read_study(ROOT / "examples" / "studies" / name) for name in claim.studies]
        run = {name for study in runs for grid in study.grids for name in grid.arms}
        assert set(itertools.chain(*itertools.chain(*claim.parts))) <= run, claim.title
        for pair in itertools.chain(*claim.parts):
            assert paper_figure(pair, claim.model)[0] < 0, pair  # the paper's own figures bear the claim out
            assert set(matched(pair)) <= ARMS.keys()


def test_the_section_has_a_row_for_each_claim_and_one_for_ours(tmp_path: Any) -> None:
    lines = arms(("swiglu", 3.0), ("moa-bi-sided", 3.1), ("moa-bi-sided-matched", 2.9))
    text = report_of(tmp_path, write(tmp_path / "study", lines)).split("## The paper's claims")[1].split("\n## ")[0]
    assert (
        "With the paper's coefficients at the start: **of 9 claims 0 confirmed, 1 contradicted, 8 undecided**." in text
    )
    cells = row(text, CLAIM["1a"].title)
    assert "bi-sided MoA -0.029 (dense-0.12b, table 2)" in cells[1]
    assert cells[2:4] == ["the paper's", "**contradicted**"]
    assert cells[4].startswith("bi-sided MoA minus SwiGLU: +0.1000 [")
    assert cells[4].endswith("], 3 seeds")
    assert cells[5] == "python, size 0.4M, 2M tokens, AdamW, cosine"
    assert cells[6].endswith("not run: one-sided MoA, quadratic MoA (`paper-dense.toml`, `paper-table1.toml`)")
    own = row(text, "1a", "", "ours")
    assert own[3] == "undecided"
    assert own[6] == "1 confirmed; confirmed for bi-sided MoA alone; not run: one-sided MoA, quadratic MoA"
    assert row(text, CLAIM["5a"].title)[6] == "not run (`paper-moe.toml`)"
