"""Tests megatron_moa/research/study/statistics.py against scipy and known truth.

Tested are intervals, best rates, differences and fits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_moa.research.study.statistics import (
    AT_LEAST,
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
    fit_power_law,
)

SETTING = ("python", "0_4M", 2_000_000, "adamw", "cosine")


def line(
    arm: str,
    final: float | None,
    *,
    rate: float = 0.008,
    seed: int = 1,
    setting: tuple[str, str, int, str, str] = SETTING,
    non_embedding: int = 400_000,
) -> dict[str, Any]:
    """A line of results as tools/study.py writes it, with a loss curve that ends where the run does."""
    corpus, size, tokens, optimizer, schedule = setting
    cell = {"corpus": corpus, "size": size, "tokens": tokens, "optimizer": optimizer, "schedule": schedule}
    points = [(tokens * (step + 1) // 16, (final or 9.0) + 4 * math.exp(-step / 2)) for step in range(16)]
    return {
        "cell": {**cell, "arm": arm, "rate": rate, "seed": seed},
        "final": final,
        "parameters": 2 * non_embedding,
        "non_embedding": non_embedding,
        "ffn": 256,
        "iterations": 976,
        "milliseconds": 100.0,
        "seconds": 100.0,
        "loss": points,
        "flags": ["--swiglu"],
        "machine": "2 x86_64 CPU cores",
        "versions": {"torch": "2.11.0", "megatron-core": "0.19.2"},
        "date": "2026-11-24",
    }


def seeds(arm: str, losses: list[float | None], **where: Any) -> list[dict[str, Any]]:
    """A line for each of the seeds 1, 2, …"""
    return [line(arm, final, seed=seed, **where) for seed, final in enumerate(losses, start=1)]


def tried(arm: str, losses: list[float | None], **where: Any) -> list[dict[str, Any]]:
    """As :func:`seeds`, at a rate on both sides of which worse ones were tried."""
    return seeds(arm, losses, **where) + [line(arm, 99.0, rate=rate, **where) for rate in (0.004, 0.016)]


def test_the_interval_is_students() -> None:
    values = [0.3, -0.1, 0.25, 0.4]
    known = Interval.of(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (known.mean, known.count) == (pytest.approx(0.2125), 4)
    assert (known.low, known.high) == pytest.approx((expected.low, expected.high))
    assert known.half == pytest.approx(known.mean - known.low)
    wider = Interval.of(values, 0.99)
    assert wider.high == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.99).high)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.1, -0.11, -0.12], BETTER),
        ([0.1, 0.11, 0.12], WORSE),
        ([0.1, -0.11, 0.12], UNDECIDED),
        ([0.0, 0.0, 0.0], UNDECIDED),
        ([-5.0], ONE_SEED),
    ],
)
def test_verdicts(values: list[float], verdict: str) -> None:
    known = Interval.of(values)
    assert known.verdict == verdict
    assert known.decided == (verdict in (BETTER, WORSE))
    assert math.isnan(known.low) == (len(values) == 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_an_interval_needs_finite_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Interval.of(values)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_pairing_pays() -> None:
    """The seeds' own spread is ten times the difference's: only a paired comparison can see through it."""
    draw = np.random.default_rng(7)
    covered, decided, rounds = 0, 0, 800
    for _ in range(rounds):
        shared, own = draw.normal(3.0, 0.1, 3), draw.normal(0.0, 0.01, (2, 3))
        results = Results(
            [*tried("swiglu", list(shared + own[0])), *tried("moa-bi-sided", list(shared - 0.08 + own[1]))]
        )
        known = results.difference(SETTING, "moa-bi-sided", "swiglu")
        covered += known.low <= -0.08 <= known.high
        decided += known.verdict == BETTER
    assert covered / rounds == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / rounds))
    assert decided / rounds > 0.7


def test_an_arm_against_itself_is_undecided_as_often_as_it_should_be() -> None:
    draw = np.random.default_rng(8)
    rounds, wrong = 800, 0
    for _ in range(rounds):
        first, second = draw.normal(3.0, 0.1, (2, 3))
        results = Results([*seeds("swiglu", list(first)), *seeds("swiglu-again", list(second))])
        wrong += results.difference(SETTING, "swiglu-again", "swiglu").decided
    assert wrong / rounds == pytest.approx(0.05, abs=3 * math.sqrt(0.95 * 0.05 / rounds))


def test_an_arm_is_taken_at_the_rate_that_is_best_for_the_tuning_seed() -> None:
    lines = [
        line("moa-bi-sided", loss, rate=rate)
        for rate, loss in ((0.004, 3.4), (0.008, 3.3), (0.016, None), (0.032, 3.5))
    ]
    lines += [line("moa-bi-sided", 3.35, rate=0.008, seed=2), line("moa-bi-sided", 3.0, rate=0.004, seed=2)]
    tuned = Results(lines).tuned(SETTING, "moa-bi-sided")
    assert (tuned.rate, tuned.inside, tuned.losses) == (0.008, True, {1: 3.3, 2: 3.35})
    assert tuned.rates == {0.004: 3.4, 0.008: 3.3, 0.016: math.inf, 0.032: 3.5}
    assert tuned.loss.mean == pytest.approx(3.325)


@pytest.mark.parametrize("best", [0, 2])
def test_a_best_rate_at_the_end_is_not_inside(best: int) -> None:
    lines = [line("moa-bi-sided", 3.4 - (index == best), rate=0.004 * 2**index) for index in range(3)]
    assert not Results(lines).tuned(SETTING, "moa-bi-sided").inside


def test_runs_that_diverged_are_named_and_in_no_mean() -> None:
    results = Results(
        [*tried("swiglu", [3.0, 3.1, 3.2]), *tried("moa-bi-sided", [2.9, None, 3.1]), line("la-bi-sided", None)]
    )
    tuned = results.tuned(SETTING, "moa-bi-sided")
    assert (tuned.losses, tuned.diverged) == ({1: 2.9, 3: 3.1}, (2,))
    assert results.differences(SETTING, "moa-bi-sided", "swiglu") == pytest.approx({1: -0.1, 3: -0.1})
    assert (
        results.difference(SETTING, "moa-bi-sided", "swiglu").verdict == DIVERGED
    )  # a loss that is no number is no gain
    assert results.difference(SETTING, "swiglu", "moa-bi-sided").verdict == DIVERGED
    assert results.tuned(SETTING, "la-bi-sided") is None
    assert results.difference(SETTING, "la-bi-sided", "swiglu") is None


def test_differences_are_of_the_seeds_that_both_have() -> None:
    results = Results([*seeds("swiglu", [3.0, 3.1, 3.2]), *seeds("moa-bi-sided", [2.9, 3.05])])
    assert results.differences(SETTING, "moa-bi-sided", "swiglu") == pytest.approx({1: -0.1, 2: -0.05})
    assert results.difference(SETTING, "moa-bi-sided", "swiglu", without={1}).mean == pytest.approx(-0.05)
    assert results.difference(SETTING, "moa-bi-sided", "swiglu", without={1, 2}) is None
    assert results.difference(SETTING, "moa-bi-sided", "gelu") is None


def test_the_main_setting_and_the_tuning_seed_are_where_the_runs_are() -> None:
    other = ("english", *SETTING[1:])
    rates = [line("moa-bi-sided", 3.0, seed=5, rate=rate, setting=other) for rate in (0.1, 0.2, 0.4)]
    results = Results([*rates, line("moa-bi-sided", 3.0, seed=5)])
    assert (results.main, results.tuning_seed) == (other, 5)
    # Further seeds decide more than further rates.
    results = Results([*rates, line("moa-bi-sided", 3.0, seed=5), line("moa-bi-sided", 3.0, seed=2)])
    assert (results.main, results.tuning_seed) == (SETTING, 5)


def test_what_a_multiple_of_the_best_rate_loses() -> None:
    lines = [
        *seeds("moa-bi-sided", [3.0, 3.1]),
        *seeds("moa-bi-sided", [3.2, 3.4], rate=0.016),
        line("moa-bi-sided", None, rate=0.032),
    ]
    results = Results(lines)
    assert results.lost(SETTING, "moa-bi-sided", 2) == pytest.approx({1: 0.2, 2: 0.3})
    assert results.lost(SETTING, "moa-bi-sided", 4) == {1: math.inf}
    assert results.lost(SETTING, "moa-bi-sided", 8) == {}
    assert results.lost(SETTING, "la-bi-sided", 2) == {}


def test_a_law_is_found_again() -> None:
    sizes = np.array([0.5, 1, 3, 10, 40])
    law = fit_power_law(sizes, 1.7 + 1.3 * sizes**-0.4)
    assert law.values == pytest.approx((1.7, 1.3, 0.4), rel=1e-4)
    assert max(law.halves) < 1e-3
    assert law(np.array([100.0])) == pytest.approx([1.7 + 1.3 * 100**-0.4], rel=1e-4)


def test_a_laws_intervals_cover_the_truth() -> None:
    draw = np.random.default_rng(3)
    sizes, rounds = np.repeat([0.5, 1, 2, 4, 8, 16, 32], 3), 100
    laws = [fit_power_law(sizes, 1.7 + 1.3 * sizes**-0.4 + draw.normal(0, 0.005, len(sizes))) for _ in range(rounds)]
    covered = sum(abs(law.values[2] - 0.4) <= law.halves[2] for law in laws) / rounds
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / rounds))


def test_three_sizes_are_too_few_however_many_seeds() -> None:
    assert fit_power_law([1, 1, 1, 2, 2, 2, 3, 3, 3], [3.0] * 9) is None


def test_a_difference_of_an_arm_whose_best_rate_is_at_the_end_is_a_bound() -> None:
    baseline = [*seeds("swiglu", [3.0, 3.1, 3.2]), line("swiglu", 3.2, rate=0.004), line("swiglu", 3.2, rate=0.016)]
    lower = [*seeds("moa-bi-sided", [2.8, 2.91, 3.0]), line("moa-bi-sided", 2.9, rate=0.004)]
    higher = [*seeds("la-bi-sided", [3.2, 3.31, 3.4]), line("la-bi-sided", 3.3, rate=0.004)]
    results = Results(
        [*baseline, *lower, *higher, line("gelu", 2.0, rate=0.001), *seeds("swiglu-half", [3.2, 3.31, 3.4])]
        + seeds("swiglu-again", [3.2, 3.1, 3.0])
    )

    def seen(arm: str, to: str) -> tuple[str, str]:
        known = results.difference(SETTING, arm, to)
        return known.bound, known.verdict

    assert seen("moa-bi-sided", "swiglu") == (AT_MOST, BETTER)  # a better rate makes it lower still
    assert seen("la-bi-sided", "swiglu") == (AT_MOST, UNTUNED)
    assert seen("swiglu", "moa-bi-sided") == (AT_LEAST, WORSE)
    assert seen("swiglu", "la-bi-sided") == (AT_LEAST, UNTUNED)
    assert seen("moa-bi-sided", "la-bi-sided") == (UNKNOWN, UNTUNED)
    assert seen("gelu", "swiglu") == (AT_MOST, ONE_SEED)
    assert seen("swiglu-half", "swiglu") == (AT_MOST, UNTUNED)  # one rate, the baseline's best
    assert seen("swiglu-again", "swiglu") == ("", UNDECIDED)  # the same layer


def test_a_law_over_sizes_is_of_models_of_one_kind() -> None:
    def of(size: str, deviation: float, hidden: int, *more: str) -> dict[str, Any]:
        content = line("swiglu", 3.0, setting=("python", size, *SETTING[2:]))
        shape = ["--num-layers", "4", "--hidden-size", str(hidden), "--init-method-std", str(deviation)]
        return content | {"flags": [*shape, *more, "--lr", "0.004", "--moa-mixing", "none", "--swiglu"]}

    def groups(*lines: dict[str, Any]) -> list[set[str]]:
        results = Results(lines)
        kinds = results.kinds(results.settings)
        return [{s[1] for s in kinds if kinds[s] == kind} for kind in dict.fromkeys(kinds.values())]

    small, large = of("small", 0.08, 64), of("large", 0.0444, 208)
    assert groups(small, large) == [{"small", "large"}]
    widths = ("--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size")
    experts = [[word for flag in widths for word in (flag, width)] for width in ("42", "84")]
    assert groups(of("a", 0.08, 64, *experts[0]), of("b", 0.08, 64, *experts[1])) == [{"a", "b"}]
    assert groups(small, large, of("moe", 0.08, 64, "--num-experts", "8")) == [{"small", "large"}, {"moe"}]
    assert groups(small, of("starved", 0.02, 96), large) == [{"small", "large"}, {"starved"}]
    assert groups(of("one", 0.02, 64), of("other", 0.02, 208)) == [{"one", "other"}]
