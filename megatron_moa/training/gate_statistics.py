"""Measures how mixing coefficients vary over tokens, batch by batch.

The log and analyses of gates use it. Every result follows from sums in float64: of coefficients by group (token type,
position, expert), and of their products. No matrix of tokens by coefficients is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Below this part of a coefficient's square a variance is rounding, and nothing is said of its parts.
_NO_VARIANCE = 1e-12
# Clusters from which an interval is taken; below, single windows are.
FEWEST_DOCUMENTS = 10


class GroupSums:
    """Sums of coefficients by group.

    Attributes:
        sums: [groups, n] float64.
        counts: [groups] float64.
    """

    def __init__(self, groups: int, n: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(groups, n, dtype=torch.float64, device=device)
        self.counts = torch.zeros(groups, dtype=torch.float64, device=device)

    def add(self, rows: Tensor, groups: Tensor) -> None:
        """Takes in rows [t, n] (float64) of these groups [t]."""
        self.sums.index_add_(0, groups, rows)
        self.counts += torch.bincount(groups, minlength=len(self.counts))

    def means(self) -> Tensor:
        """[groups, n]; NaN for a group without rows."""
        return self.sums / self.counts[:, None]


class GateStatistics:
    """What is known of one layer's coefficients.

    Args:
        n: coefficients.
        types: kinds of tokens in the text.
        positions: in a window.
        experts: that the coefficients belong to; 1 for a dense layer and a shared expert.
    """

    def __init__(
        self, n: int, types: int, positions: int, experts: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.products = torch.zeros(n, n, dtype=torch.float64, device=device)
        self.by_type = GroupSums(types, n, device)
        self.by_position = GroupSums(positions, n, device)
        self.by_expert = GroupSums(experts, n, device)

    def add(self, coefficients: Tensor, types: Tensor, positions: Tensor, expert: int = 0) -> None:
        """Takes in coefficients [t, n] of tokens of these types [t] at these positions [t]."""
        rows = coefficients.double()
        self.products += rows.T @ rows
        self.by_type.add(rows, types)
        self.by_position.add(rows, positions)
        self.by_expert.add(rows, torch.full_like(types, expert))

    def __add__(self, other: GateStatistics) -> GateStatistics:
        total = GateStatistics(0, 0, 0, 0)
        total.products = self.products + other.products
        for name in ("by_type", "by_position", "by_expert"):
            ours, theirs, sums = getattr(self, name), getattr(other, name), getattr(total, name)
            sums.sums, sums.counts = ours.sums + theirs.sums, ours.counts + theirs.counts
        return total

    @property
    def count(self) -> float:
        """Rows: tokens, for routed experts token-expert pairs."""
        return self.by_expert.counts.sum().item()

    @property
    def mean(self) -> Tensor:
        """[n]"""
        return self.by_expert.sums.sum(0) / self.count

    @property
    def covariance(self) -> Tensor:
        """[n, n], over tokens."""
        return self.products / self.count - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> Tensor:
        """[n]; exactly 0 where it is nothing but rounding."""
        variance, square = self.covariance.diagonal(), self.products.diagonal() / self.count
        return torch.where(variance > _NO_VARIANCE * square, variance, 0.0)

    def share_between(self, groups: GroupSums, corrected: bool = True) -> Tensor:
        """Returns the share of the variance that lies between groups, [n].

        NaN where nothing varies; the corrected share is NaN where every group is one row, too.

        The naive share is that of the groups' means, SSB / SST. With few rows a group it is far too high: means of few
        rows differ by chance alone; with as many groups as rows it is 1 whatever the data. The corrected one takes off
        what chance gives, (G - 1) SSW / (N - G), for G groups and N rows: Kelley's epsilon squared (1935), the adjusted
        R² of a one-way analysis of variance. Below 0, as it comes out by chance where there is nothing, it is 0.
        """
        there = groups.counts > 0
        counts, rows, number = groups.counts[there], self.count, int(there.sum())
        total = self.variance * rows
        between = (counts[:, None] * (groups.sums[there] / counts[:, None] - self.mean).square()).sum(0)
        if corrected:
            if rows <= number:
                return torch.full_like(total, torch.nan)
            between = between - (number - 1) * (total - between).clamp_min(0) / (rows - number)
        return torch.where(total > 0, (between / total).clamp(0, 1), torch.nan)

    def type_means(self) -> Tensor:
        """Returns each type's mean, drawn towards the mean of all, [types, n].

        It is drawn by as much as the type's few occurrences ask for: the best linear prediction under a model of random
        effects, m + w (m_t - m) with w = n_t B / (n_t B + W), B the variance between types and W that within (of
        :meth:`share_between`). A type that was not seen gets m.
        """
        share = self.share_between(self.by_type).nan_to_num(0.0)
        weight = self.by_type.counts[:, None] * share
        weight = weight / (weight + (1 - share)).clamp_min(torch.finfo(torch.float64).tiny)
        return self.mean + weight * (self.by_type.means().nan_to_num(0.0) - self.mean)

    def expert_means(self) -> Tensor:
        """[experts, n]; an expert without tokens has the mean of all."""
        means = self.by_expert.means()
        return torch.where(self.by_expert.counts[:, None] > 0, means, self.mean)

    def effective_rank(self) -> float:
        """Returns the effective rank of the centred matrix of tokens by coefficients.

        That is exp of the entropy of the normalised singular values (Roy and Vetterli, "The effective rank", 2007): 1
        where all coefficients move together, n where none does; 0 where nothing varies.
        """
        values = self._eigenvalues().sqrt()
        if not values.sum() > 0:
            return 0.0
        part = values / values.sum()
        return math.exp(-torch.special.xlogy(part, part).sum().item())

    def participation_ratio(self) -> float:
        """Returns (sum of the covariance's eigenvalues)² over the sum of their squares.

        It is from 1 to n as :meth:`effective_rank`, but weak directions count less.
        """
        values = self._eigenvalues()
        return (values.sum().square() / values.square().sum()).item() if values.sum() > 0 else 0.0

    def _eigenvalues(self) -> Tensor:
        """Of the covariance, [n]; squares of the singular values over the number of rows."""
        values = torch.linalg.eigvalsh(self.covariance)
        floor = _NO_VARIANCE * self.products.diagonal().sum() / self.count
        return torch.where(values > floor, values, 0.0)


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean with its 95 % interval; NaN limits where there are fewer than two clusters."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float], clusters: Sequence[int]) -> ConfidenceInterval:
    """Returns the mean of differences and its 95 % interval by Student's t over clusters.

    Members of a cluster may depend on one another: the standard error is cluster-robust, sqrt(C / (C - 1) sum_c (sum_i
    in c (d_i - mean))²) / N, with C - 1 degrees of freedom.

    Args:
        differences: [N], such as of each window's loss.
        clusters: [N], such as the document a window is of.
    """
    from scipy.stats import t

    values, groups = torch.tensor(differences, dtype=torch.float64), torch.tensor(clusters)
    mean = values.mean().item()
    _, index = groups.unique(return_inverse=True)
    number = int(index.max()) + 1
    if number < 2:
        return ConfidenceInterval(mean, math.nan, math.nan)
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, index, values - mean)
    error = math.sqrt(number / (number - 1) * sums.square().sum().item()) / len(values)
    reach = float(t.ppf(0.975, number - 1)) * error
    return ConfidenceInterval(mean, mean - reach, mean + reach)
