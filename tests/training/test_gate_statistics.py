"""megatron_moa/training/gate_statistics.py: shares, ranks and intervals where the answer is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from megatron_moa.training.gate_statistics import GateStatistics, paired_interval

TOKENS, TYPES, CONTEXT = 20_000, 5_000, 50


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


def zipf_types() -> Tensor:
    """Types [t] of a text: a few are frequent, most occur once or twice."""
    weights = 1 / torch.arange(1.0, TYPES + 1)
    return torch.multinomial(weights, TOKENS, replacement=True, generator=drawn(1))


def recorded(rows: Tensor, types: Tensor, positions: Tensor | None = None) -> GateStatistics:
    """Taken in by batches of odd sizes, in two halves that are added."""
    positions = torch.arange(len(rows)) % CONTEXT if positions is None else positions
    halves = [GateStatistics(rows.shape[1], TYPES, CONTEXT) for _ in range(2)]
    cuts = [0, 7, len(rows) // 2, len(rows) - 3, len(rows)]
    for first, last in itertools.pairwise(cuts):
        part = slice(first, last)
        halves[first >= len(rows) // 2].add(rows[part], types[part], positions[part])
    return halves[0] + halves[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_share_between_types_is_what_was_put_in(share: float) -> None:
    types = zipf_types()
    effects, noise = normal(TYPES, 3, seed=2)[types], normal(TOKENS, 3, seed=3)
    effects, noise = ((part - part.mean(0)) / part.std(0) for part in (effects, noise))
    found = recorded(0.4 + 0.1 * (share**0.5 * effects + (1 - share) ** 0.5 * noise), types)
    corrected, naive = (found.share_between(found.by_type, correct) for correct in (True, False))
    # Standard error of the share without any effect: about sqrt(2 G) / N = 0.005.
    torch.testing.assert_close(corrected, torch.full((3,), share, dtype=torch.float64), atol=0.02, rtol=0)
    # Means of G groups of noise keep (G - 1) / (N - 1) of its variance.
    groups = types.unique().numel()
    expected = share + (1 - share) * (groups - 1) / (TOKENS - 1)
    torch.testing.assert_close(naive, torch.full((3,), expected, dtype=torch.float64), atol=0.02, rtol=0)


def test_share_by_position() -> None:
    positions = torch.arange(TOKENS) % CONTEXT
    effect = normal(CONTEXT, 1, seed=4)[positions]
    rows = effect / effect.std() + normal(TOKENS, 1, seed=5)
    found = recorded(rows, zipf_types(), positions)
    assert found.share_between(found.by_position).item() == pytest.approx(0.5, abs=0.02)
    assert found.share_between(found.by_type).item() == pytest.approx(0, abs=0.02)


def test_every_type_once_says_nothing() -> None:
    found = recorded(normal(100, 2, seed=6), torch.arange(100))
    assert found.share_between(found.by_type).isnan().all()
    torch.testing.assert_close(found.share_between(found.by_type, corrected=False), torch.ones(2).double())


def test_moments_and_ranks_are_those_of_the_whole_matrix() -> None:
    # As float32 coefficients near 0.5: the mean is large beside the spread.
    rows = (0.5 + 0.01 * normal(TOKENS, 6, seed=7) @ normal(6, 6, seed=8)).float()
    found = recorded(rows, zipf_types())
    exact = rows.double()
    torch.testing.assert_close(found.mean, exact.mean(0))
    torch.testing.assert_close(found.variance, exact.var(0, correction=0))
    values = torch.linalg.svdvals(exact - exact.mean(0))
    part = values / values.sum()
    assert found.effective_rank() == pytest.approx(math.exp(-(part * part.log()).sum()))
    assert found.participation_ratio() == pytest.approx((values**2).sum() ** 2 / (values**4).sum())


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_of_directions_that_vary_alike(rank: int) -> None:
    directions = torch.linalg.qr(normal(8, 8, seed=9))[0][:rank]
    weights = torch.linalg.qr(normal(4_000, rank, seed=10))[0]
    weights = torch.linalg.qr(weights - weights.mean(0))[0]  # centred, with equal singular values
    found = recorded(0.5 + weights @ directions, torch.zeros(4_000, dtype=torch.long))
    assert found.effective_rank() == pytest.approx(rank, rel=1e-4)
    assert found.participation_ratio() == pytest.approx(rank, rel=1e-4)


def test_constants_do_not_vary() -> None:
    found = recorded(torch.tensor([[0.1, 0.7]]).expand(TOKENS, 2), zipf_types())
    assert found.variance.tolist() == [0, 0]
    assert found.share_between(found.by_type).isnan().all()
    assert (found.effective_rank(), found.participation_ratio()) == (0, 0)
    torch.testing.assert_close(found.type_means(), found.mean.expand(TYPES, 2))


def test_means_of_types_are_drawn_together_as_far_as_it_helps() -> None:
    types = zipf_types()
    truth = 0.5 + 0.1 * normal(TYPES, 1, seed=11)
    found = recorded(truth[types] + 0.2 * normal(TOKENS, 1, seed=12), types)
    seen = found.by_type.counts > 0

    def error(estimate: Tensor) -> float:
        return (estimate - truth)[seen].square().mean().item()

    drawn_together, raw = error(found.type_means()), error(found.by_type.means())
    assert drawn_together < 0.9 * min(raw, error(found.mean.expand_as(truth)))
    frequent = found.by_type.counts.argmax()
    torch.testing.assert_close(found.type_means()[frequent], found.by_type.means()[frequent], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.type_means()[~seen], found.mean.expand(int((~seen).sum()), 1))


def test_experts_have_means_of_their_own() -> None:
    found = GateStatistics(1, 1, 1, experts=3)
    for expert, value in ((0, 1.0), (0, 3.0), (2, 8.0)):
        here = torch.zeros(1, dtype=torch.long)
        found.add(torch.tensor([[value]]), here, here, expert)
    assert found.expert_means().flatten().tolist() == [2, 4, 8]  # the one without tokens: the mean of all
    assert found.count == 3


def test_interval_is_students_and_clusters_count_once() -> None:
    values = normal(12, seed=13).tolist()
    found = paired_interval(values, list(range(12)))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # Four windows that say the same say it once.
    repeated = paired_interval([value for value in values for _ in range(4)], [i for i in range(12) for _ in range(4)])
    assert (repeated.mean, repeated.low, repeated.high) == pytest.approx((found.mean, found.low, found.high))
    alone = paired_interval([1.0, 2.0], [5, 5])
    assert alone.mean == 1.5
    assert math.isnan(alone.low)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 20 clusters of 5 windows that share half of their variance: 400 intervals miss 0 in 5 % of the cases, +- 3.3 %.
    clusters = torch.arange(20).repeat_interleave(5)
    missed = 0
    for seed in range(400):
        shared, own = normal(20, seed=1000 + seed)[clusters], normal(100, seed=5000 + seed)
        found = paired_interval((shared + own).tolist(), clusters.tolist())
        missed += not found.low <= 0 <= found.high
    assert 0.017 <= missed / 400 <= 0.083
