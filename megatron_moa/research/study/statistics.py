"""Computes best learning rates, paired differences with intervals, and fits over sizes from results."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from megatron_moa.command_line.words import flag_values
from megatron_moa.research.study.arms import ARMS
from megatron_moa.research.study.grid import best_rate, cell_from, rates_of
from megatron_moa.research.study.runner import losses_of

CONFIDENCE = 0.95
LEAST_SIZES = 4  # of a fit: a law of three parameters goes through three points whatever they are
BASELINE = "swiglu"
BETTER, WORSE, UNDECIDED, ONE_SEED = "better", "worse", "undecided", "not decided by one seed"
UNTUNED = "not decided: best rate not found"
DIVERGED = "not decided: a run diverged"
AT_MOST, AT_LEAST, UNKNOWN = "≤ ", "≥ ", "? "  # of a difference, where an arm's best rate has not been found

# Flags in which runs of one kind of model may differ: those of its size, and those of a run or its arm.
_OF_SIZE = (
    *("--num-layers", "--hidden-size", "--num-attention-heads", "--ffn-hidden-size", "--init-method-std"),
    *("--moe-ffn-hidden-size", "--moe-shared-expert-intermediate-size"),
)
_OF_RUN = ("--lr", "--min-lr", "--seed", "--micro-batch-size", "--swiglu", "--squared-relu")

Setting = tuple[str, str, int, str, str]  # Cell.setting: corpus, size, tokens, optimizer, schedule


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval (Student's t); the ends are NaN where there is a single value.

    Attributes:
        mean, low, high: in the values' unit.
        count: of values.
        bound: of a difference of which an arm has not been tuned out, in which direction the truth may lie:
            :data:`AT_MOST`, :data:`AT_LEAST` or :data:`UNKNOWN`; else empty.
        diverged: whether a run of one of the two, which is not among the values, has no finite loss.
    """

    mean: float
    low: float
    high: float
    count: int
    bound: str = ""
    diverged: bool = False

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
        """Of independent values.

        Raises:
            ValueError: there is none, or one is not finite.
        """
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"an interval needs finite values, not {list(values)}")
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, math.nan, math.nan, count)
        half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
        return cls(mean, mean - half, mean + half, count)

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return self.high - self.mean

    @property
    def decided(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.high < 0 or self.low > 0

    @property
    def verdict(self) -> str:
        """Of a difference of losses: :data:`BETTER`, :data:`WORSE`, :data:`UNDECIDED`, :data:`ONE_SEED`,
        :data:`UNTUNED` where the rates that were not tried may turn it round, or :data:`DIVERGED`.
        """
        if self.diverged:
            return DIVERGED
        low, high = (self.low, self.high) if self.count > 1 else (self.mean, self.mean)
        if self.bound and not (high < 0 if self.bound == AT_MOST else low > 0 and self.bound == AT_LEAST):
            return UNTUNED
        if self.count < 2:
            return ONE_SEED
        if not self.decided:
            return UNDECIDED
        return BETTER if self.mean < 0 else WORSE


@dataclass(frozen=True)
class Tuned:
    """An arm at its best learning rate in one setting.

    Attributes:
        rates: loss by rate, of the seed that the rate was chosen with; infinite where it diverged.
        rate: the best.
        losses: final validation loss by seed, at that rate, in nats per token.
        lines: the results, by seed.
        diverged: seeds without a finite loss at that rate; they are in nothing else.
    """

    arm: str
    rates: dict[float, float]
    rate: float
    losses: dict[int, float]
    lines: dict[int, dict[str, Any]]
    diverged: tuple[int, ...]

    @property
    def inside(self) -> bool:
        """Whether worse rates were tried on both sides of the best one."""
        return min(self.rates) < self.rate < max(self.rates)

    @property
    def loss(self) -> Interval:
        """Over seeds."""
        return Interval.of(list(self.losses.values()))

    @property
    def non_embedding(self) -> int:
        """Parameters without the embedding and the output layer."""
        return next(iter(self.lines.values()))["non_embedding"]


class Results:
    """Finished runs of one or several studies.

    Attributes:
        lines: by cell.
        tuning_seed: the seed with the most runs: learning rates are chosen with it.
        settings: in which arms were compared, in the order in which they were run.
    """

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.lines = {cell_from(line["cell"]): line for line in lines}
        self.losses = losses_of(lines)
        seeds = Counter(cell.seed for cell in self.lines)
        self.tuning_seed = min(seeds, key=lambda seed: (-seeds[seed], seed))
        self.settings: list[Setting] = list(dict.fromkeys(cell.setting for cell in self.lines))
        self._arms: dict[Setting, dict[str, Tuned | None]] = {setting: {} for setting in self.settings}
        for cell in self.lines:
            if cell.arm not in self._arms[cell.setting]:
                self._arms[cell.setting][cell.arm] = self._tune(cell.setting, cell.arm)

    @property
    def main(self) -> Setting:
        """Returns the setting with the most runs of further seeds.

        Such runs decide what rates alone do not. Of several settings, the one with the most runs, then the first.
        """
        runs = Counter(cell.setting for cell in self.lines)
        further = Counter(cell.setting for cell in self.lines if cell.seed != self.tuning_seed)
        return max(self.settings, key=lambda setting: (further[setting], runs[setting]))

    def arms(self, setting: Setting) -> list[str]:
        """Those with a run in a setting, in the order in which they were run."""
        return list(self._arms[setting])

    def tuned(self, setting: Setting, arm: str) -> Tuned | None:
        """An arm at its best; None without a run of the tuning seed there that ended with a finite loss."""
        return self._arms[setting].get(arm)

    def _tune(self, setting: Setting, arm: str) -> Tuned | None:
        rate = best_rate(self.losses, setting, arm, self.tuning_seed)
        if rate is None:
            return None
        cells = sorted(
            (cell for cell in self.lines if (cell.setting, cell.arm, cell.rate) == (setting, arm, rate)),
            key=lambda cell: cell.seed,
        )
        ended = [cell for cell in cells if math.isfinite(self.losses[cell])]
        return Tuned(
            arm,
            rates_of(self.losses, setting, arm, self.tuning_seed),
            rate,
            {cell.seed: self.losses[cell] for cell in ended},
            {cell.seed: self.lines[cell] for cell in ended},
            tuple(cell.seed for cell in cells if cell not in ended),
        )

    def kinds(self, settings: Collection[Setting]) -> dict[Setting, tuple[object, ...]]:
        """Returns by setting what models of different sizes must share for one law over sizes.

        That is all flags but those of the size itself (a dense model and a MoE are not two sizes of one model), and the
        weights at step 0: where their standard deviation is not everywhere the same, pre-activations as large, to two
        digits.
        """
        flags = {setting: self.flags(setting) for setting in settings}
        deviations = {values.get("--init-method-std") for values in flags.values()}
        kinds = {}
        for setting, values in flags.items():
            scale = ""
            if len(deviations) > 1 and "--init-method-std" in values:
                scale = f"{float(values['--init-method-std']) * float(values['--hidden-size']) ** 0.5:.2g}"
            shared = {name: text for name, text in values.items() if name not in (*_OF_SIZE, *_OF_RUN)}
            kinds[setting] = (scale, *sorted(pair for pair in shared.items() if not pair[0].startswith("--moa-")))
        return kinds

    def flags(self, setting: Setting) -> dict[str, str]:
        """Those of a setting's first run, as :func:`flag_values` returns them."""
        return flag_values(next(line for cell, line in self.lines.items() if cell.setting == setting)["flags"])

    def differences(self, setting: Setting, arm: str, to: str) -> dict[int, float]:
        """Returns the loss of one arm minus another's, by seed that both have.

        Each arm is at its best rate of those that were tried.
        """
        first, second = self.tuned(setting, arm), self.tuned(setting, to)
        if first is None or second is None:
            return {}
        return {seed: loss - second.losses[seed] for seed, loss in first.losses.items() if seed in second.losses}

    def difference(
        self, setting: Setting, arm: str, to: str, confidence: float = CONFIDENCE, without: Collection[int] = ()
    ) -> Interval | None:
        """Returns the mean of :meth:`differences` with its interval, paired by seed.

        A seed stands for the data's order and all shared weights at step 0.

        Args:
            without: seeds to leave out.

        Returns:
            None without a seed in common.
        """
        pairs = self.differences(setting, arm, to).items()
        values = [difference for seed, difference in pairs if seed not in without]
        if not values:
            return None
        # An arm's loss at a better rate would be lower.
        bound = {(True, False): AT_MOST, (False, True): AT_LEAST, (True, True): UNKNOWN}.get(
            (self.may_be_lower(setting, arm), self.may_be_lower(setting, to)), ""
        )
        return replace(Interval.of(values, confidence), bound=bound, diverged=self.diverged(setting, arm, to))

    def diverged(self, setting: Setting, *arms: str) -> bool:
        """Returns whether a run of one of these arms at its best rate has no finite loss."""
        return any(self.tuned(setting, arm).diverged for arm in arms)

    def may_be_lower(self, setting: Setting, arm: str) -> bool:
        """Returns whether a rate that was not tried may be an arm's best.

        That is so where the best is the lowest or the highest that was tried, or the only one. An arm with
        ``other_seeds`` (its baseline again) need not try rates itself where it has the baseline's best, if that has
        worse ones on both sides.
        """
        tuned = self.tuned(setting, arm)
        if arm in ARMS and ARMS[arm].other_seeds:
            same = self.tuned(setting, ARMS[arm].baseline)
            return same is None or tuned.rate != same.rate or not same.inside
        return not tuned.inside

    def lost(self, setting: Setting, arm: str, factor: float) -> dict[int, float]:
        """Returns by seed the loss at ``factor`` times the best rate less that at the best.

        It is infinite where the run diverged. The result is empty where no such rate was tried.
        """
        tuned = self.tuned(setting, arm)
        if tuned is None:
            return {}
        found = {}
        for cell, loss in self.losses.items():
            wanted = (cell.setting, cell.arm) == (setting, arm) and cell.seed in tuned.losses
            if wanted and math.isclose(cell.rate, factor * tuned.rate, rel_tol=0.01):
                found[cell.seed] = loss - tuned.losses[cell.seed] if math.isfinite(loss) else math.inf
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class PowerLaw:
    """L = E + A N^-a, fitted by least squares.

    Attributes:
        values, halves: of (E, A, a), and half the width of their 95 % intervals, from the fit's linearisation; infinite
            where the points do not determine them.
    """

    values: tuple[float, float, float]
    halves: tuple[float, float, float]

    def __call__(self, size: np.ndarray) -> np.ndarray:
        return _law(size, *self.values)


def _law(size: np.ndarray, floor: float, factor: float, exponent: float) -> np.ndarray:
    return floor + factor * size**-exponent


def fit_power_law(sizes: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """The law through points (N in millions, loss), several seeds of a size being several points.

    Returns:
        None for fewer than :data:`LEAST_SIZES` different sizes, or where the search does not end.
    """
    if len(set(sizes)) < LEAST_SIZES:
        return None
    x, y = np.array(sizes, float), np.array(losses, float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optimize.OptimizeWarning)  # no covariance: it is infinite then, and said so
        try:
            values, covariance = optimize.curve_fit(
                _law,
                x,
                y,
                p0=(y.min() * 0.8, y.max() - y.min() * 0.8, 0.3),
                bounds=([0, 0, 0], [y.min(), np.inf, 2]),
                max_nfev=20000,
            )
        except RuntimeError:
            return None
    halves = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 3) * np.sqrt(np.diag(covariance))
    return PowerLaw(tuple(values.tolist()), tuple(halves.tolist()))
