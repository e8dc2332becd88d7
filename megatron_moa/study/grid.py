"""A study's file, its cells, and which of them are still to be run.

What is to be run depends on the results that are there (the best learning rate of an arm decides where its seeds are
spent, and whether its grid goes on), so it is asked for again after every run: :func:`pending`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_moa.errors import UserError
from megatron_moa.study.arms import ARMS, Size

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        tokens: of the whole run.
        rate: peak learning rate.
    """

    corpus: str
    size: str
    tokens: int
    optimizer: str
    schedule: str
    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """For files and for reading: what distinguishes it."""
        return (
            f"{self.corpus}-{self.size}-{self.tokens / 1e6:g}M-{self.optimizer}-{self.schedule}-{self.arm}"
            f"-lr{self.rate:g}-seed{self.seed}"
        )

    @property
    def setting(self) -> tuple[str, str, int, str, str]:
        """What arms are compared in."""
        return self.corpus, self.size, self.tokens, self.optimizer, self.schedule


@dataclass(frozen=True)
class Grid:
    """Cells to run: every arm with every learning rate and seed, in every setting.

    Attributes:
        rates: learning rates; empty: each arm's best of those that are there for :attr:`Study.tuning_seed`.
        extend: whether the rates go on, by the factor between the two last, while an arm's best is at their end.
    """

    arms: tuple[str, ...]
    sizes: tuple[str, ...]
    corpora: tuple[str, ...]
    tokens: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    optimizer: str
    schedule: str
    extend: bool

    def settings(self) -> Iterator[tuple[str, str, int, str, str]]:
        """See :attr:`Cell.setting`."""
        for corpus in self.corpora:
            for size in self.sizes:
                for tokens in self.tokens:
                    yield corpus, size, tokens, self.optimizer, self.schedule


@dataclass(frozen=True)
class Study:
    """What a study's file says.

    Attributes:
        corpora: settings of :mod:`megatron_moa.study.corpora`, by name.
        grids: in the order in which they are run.
        flags: of pretrain_gpt_moa.py, for every run.
        evaluation: iterations of the validation at the end of a run.
        tuning_seed: the seed of the runs that choose learning rates.
        most_extensions: of a grid of rates, at either end.
    """

    sizes: dict[str, Size]
    corpora: dict[str, dict[str, Any]]
    grids: tuple[Grid, ...]
    flags: tuple[str, ...] = ()
    evaluation: int = 40
    tuning_seed: int = 1
    most_extensions: int = 3


def read_study(path: Path) -> Study:
    """Reads a study's file (TOML; examples/studies/ has some, which say what the keys mean).

    Raises:
        UserError: no such file, not TOML, or a key or name that is unknown.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see examples/studies/") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML ({error})") from None
    _known(path, content, {"sizes", "corpora", "grid", "flags", "evaluation", "tuning_seed", "most_extensions"})
    sizes = {}
    for name, values in content.pop("sizes", {}).items():
        _known(path, values, {field.name for field in fields(Size)} - {"name"}, f"sizes.{name}.")
        sizes[name] = Size(name, **{**values, "flags": tuple(str(values.get("flags", "")).split())})
    corpora = content.pop("corpora", {})
    grids = tuple(_grid(path, number, table) for number, table in enumerate(content.pop("grid", []), start=1))
    for number, grid in enumerate(grids, start=1):
        for what, names, there in (
            ("arms", grid.arms, ARMS),
            ("sizes", grid.sizes, sizes),
            ("corpora", grid.corpora, corpora),
            ("optimizer", (grid.optimizer,), OPTIMIZERS),
            ("schedule", (grid.schedule,), SCHEDULES),
        ):
            unknown = [name for name in names if name not in there]
            if unknown:
                raise UserError(f"{path}: grid {number}: {what} {unknown[0]}: unknown; there are {', '.join(there)}")
    if not grids:
        raise UserError(f"{path}: has no [[grid]]; see examples/studies/")
    return Study(sizes, corpora, grids, tuple(str(content.pop("flags", "")).split()), **content)


def _known(path: Path, table: Mapping[str, Any], keys: set[str], prefix: str = "") -> None:
    unknown = sorted(table.keys() - keys)
    if unknown:
        raise UserError(f"{path}: {prefix}{unknown[0]}: unknown key; there are {', '.join(sorted(keys))}")


def _grid(path: Path, number: int, table: dict[str, Any]) -> Grid:
    _known(path, table, {field.name for field in fields(Grid)}, f"grid {number}: ")
    values = {"rates": [], "seeds": [1], "optimizer": "adamw", "schedule": "cosine", "extend": False, **table}
    missing = [field.name for field in fields(Grid) if field.name not in values]
    if missing:
        raise UserError(f"{path}: grid {number}: {missing[0]}: is missing")
    values["tokens"] = [round(float(count)) for count in values["tokens"]]
    return Grid(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


Losses = Mapping[Cell, float]  # of the runs that are done; inf or NaN for one that diverged


def pending(study: Study, losses: Losses) -> list[Cell]:
    """The cells that can be run now, in order; none when the study is complete.

    Args:
        losses: final validation losses of what has been run.
    """
    cells: dict[Cell, None] = {}
    for grid in study.grids:
        for setting in grid.settings():
            for arm in grid.arms:
                rates: Iterable[float] = grid.rates
                if not rates:
                    best = best_rate(losses, setting, arm, study.tuning_seed)
                    rates = [] if best is None or _tuning(study, losses, setting, arm) else [best]
                elif grid.extend:
                    rates = extended(study, grid, losses, setting, arm)
                for rate in rates:
                    cells |= dict.fromkeys(Cell(*setting, arm, rate, seed) for seed in grid.seeds)
    return [cell for cell in cells if cell not in losses]


def _tuning(study: Study, losses: Losses, setting: tuple, arm: str) -> bool:
    """Whether rates of this arm are still to be run for the seed that chooses among them."""
    for grid in study.grids:
        if grid.rates and arm in grid.arms and setting in grid.settings() and study.tuning_seed in grid.seeds:
            rates = extended(study, grid, losses, setting, arm) if grid.extend else grid.rates
            if any(Cell(*setting, arm, rate, study.tuning_seed) not in losses for rate in rates):
                return True
    return False


def rates_of(losses: Losses, setting: tuple, arm: str, seed: int) -> dict[float, float]:
    """Loss by learning rate, in increasing order of the rate; NaN is infinite."""
    found = {
        cell.rate: loss if loss == loss else float("inf")
        for cell, loss in losses.items()
        if cell.setting == setting and cell.arm == arm and cell.seed == seed
    }
    return dict(sorted(found.items()))


def best_rate(losses: Losses, setting: tuple, arm: str, seed: int) -> float | None:
    """The learning rate of the lowest loss; None if there is none, or all diverged."""
    found = rates_of(losses, setting, arm, seed)
    best = min(found, key=found.__getitem__, default=None)
    return None if best is None or found[best] == float("inf") else best


def extended(study: Study, grid: Grid, losses: Losses, setting: tuple, arm: str) -> tuple[float, ...]:
    """The grid's rates, and one more at the end at which the best of those that have been run lies."""
    rates = sorted(grid.rates)
    factor = rates[1] / rates[0] if len(rates) > 1 else 2.0
    found = rates_of(losses, setting, arm, study.tuning_seed)
    low, high = rates[0], rates[-1]
    for _ in range(study.most_extensions):
        if any(rate not in found for rate in rates):
            break  # not yet known where the best is
        best = min((rate for rate in found if low <= rate <= high), key=found.__getitem__)
        if found[best] == float("inf") or best not in (low, high):
            break
        # Rounded, so that a rate has the same name however it was reached.
        new = float(f"{best / factor if best == low else best * factor:.6g}")
        rates.append(new)
        low, high = min(rates), max(rates)
    return tuple(rates)


def cell_from(values: Mapping[str, Any]) -> Cell:
    """The cell in a line of results."""
    return Cell(**values)


def cell_values(cell: Cell) -> dict[str, Any]:
    """As a line of results has it."""
    return asdict(cell)
