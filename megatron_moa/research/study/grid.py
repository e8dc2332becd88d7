"""Reads a study's file, lists its runs, and says which are still to be run.

What is to be run depends on the results that are there (the best learning rate of an arm decides where its seeds are
spent, and whether its grid goes on), so it is asked for again after every run: :func:`pending`.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megatron_moa.errors import UserError
from megatron_moa.research.study.arms import ARMS, Size
from megatron_moa.runs.recipes import read_recipe

PAPER = "paper"  # the scale of a file as it stands
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
    rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1,)
    optimizer: str = "adamw"
    schedule: str = "cosine"
    extend: bool = False

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
        corpora: settings of :mod:`megatron_moa.research.study.corpora`, by name.
        grids: in the order in which they are run.
        flags: of pretrain_gpt_moa.py, for every run.
        evaluation: iterations of the validation at the end of a run.
        warmup: part of a run's iterations in which the learning rate rises.
        timing: rounds in which the arms' steps are timed, alone on the machine, before anything is trained; 0: never.
        keep: arms whose last checkpoint of every run is kept.
        save_interval: iterations between checkpoints, from which a run that was cut off goes on; 0: it starts anew.
        tuning_seed: the seed of the runs that choose learning rates.
        most_extensions: of a grid of rates, at either end.
    """

    sizes: dict[str, Size]
    corpora: dict[str, dict[str, Any]]
    grids: tuple[Grid, ...]
    flags: tuple[str, ...] = ()
    evaluation: int = 40
    warmup: float = 0.05
    timing: int = 15
    keep: tuple[str, ...] = ()
    save_interval: int = 0
    tuning_seed: int = 1
    most_extensions: int = 3


def read_study(path: Path, scale: str = PAPER) -> Study:
    """Reads a study's file (TOML; examples/studies/ has some, which say what the keys mean).

    Args:
        path: the file.
        scale: :data:`PAPER`, the file as it stands, or one of its ``[scales.NAME]``, whose keys take the place of the
            file's: its k-th ``[[scales.NAME.grid]]`` of keys in the k-th ``[[grid]]``; further ones stand alone.

    Raises:
        UserError: no such file, not TOML, no such scale, or a key, name or value that does not fit.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see examples/studies/") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML ({error})") from None
    content = _at_scale(path, content, scale)
    tables = content.pop("grid", [])
    if not tables:
        raise UserError(f"{path}: has no [[grid]]; see examples/studies/")
    sizes = {name: _size(path, name, table) for name, table in content.pop("sizes", {}).items()}
    corpora = content.pop("corpora", {})
    grids = tuple(_filled(Grid, f"{path}: grid {number}", table) for number, table in enumerate(tables, start=1))
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
        if not (grid.arms and grid.sizes and grid.corpora and grid.tokens and grid.seeds):
            raise UserError(f"{path}: grid {number}: a list is empty; only rates may be (each arm's best)")
    study = _filled(Study, str(path), {**content, "sizes": sizes, "corpora": corpora, "grids": grids})
    unknown = [name for name in study.keep if name not in ARMS]
    if unknown:
        raise UserError(f"{path}: keep {unknown[0]}: unknown; there are {', '.join(ARMS)}")
    _check_numbers(path, study)
    _check_flags(path, study)
    for number, grid in enumerate(grids, start=1):
        if not grid.rates:
            _check_best_rates(f"{path}: grid {number}", study, grid)
    return study


def _check_numbers(path: Path, study: Study) -> None:
    found = [
        ("evaluation", study.evaluation, 1),
        ("timing", study.timing, 0),
        ("save_interval", study.save_interval, 0),
    ]
    for name, size in study.sizes.items():
        counts = ("layers", "hidden", "ffn", "heads", "sequence", "batch")
        found += [(f"sizes.{name}.{key}", getattr(size, key), 1) for key in counts]
    for number, grid in enumerate(study.grids, start=1):
        found += [(f"grid {number}: tokens", tokens, 1) for tokens in grid.tokens]
        for rate in grid.rates:
            if not 0 < rate < math.inf:
                raise UserError(f"{path}: grid {number}: rates {rate:g}: give a positive number such as 2e-3")
    for where, value, least in found:
        if value < least:
            raise UserError(f"{path}: {where} {value}: give {least} or more")
    if not 0 <= study.warmup < 1:
        raise UserError(f"{path}: warmup {study.warmup:g}: give a part of the run such as 0.02")


# What a run is named by, so that nobody else may set it.
_OF_CELLS = ("--lr", "--min-lr", "--seed", "--train-iters", "--global-batch-size", "--optimizer", "--lr-decay-style")


def _check_flags(path: Path, study: Study) -> None:
    for where, flags in (
        ("flags", study.flags),
        *((f"sizes.{name}.flags", s.flags) for name, s in study.sizes.items()),
    ):
        for flag in flags:
            if flag.split("=")[0] in _OF_CELLS:
                raise UserError(f"{path}: {where}: {flag}: is the study's own, by a grid's keys; leave it out")


def _check_best_rates(where: str, study: Study, grid: Grid) -> None:
    """A grid without rates waits for runs that choose them: some other grid has to ask for these."""
    for setting in grid.settings():
        for arm in grid.arms:
            tuning = (g for g in study.grids if g.rates and study.tuning_seed in g.seeds and arm in g.arms)
            if not any(setting in other.settings() for other in tuning):
                raise UserError(
                    f"{where}: {arm} has no rates, here or in a grid of this size, corpus and tokens with seed "
                    f"{study.tuning_seed}; add rates"
                )


def _at_scale(path: Path, content: dict[str, Any], scale: str) -> dict[str, Any]:
    """A file's content with the keys of one of its scales in place of its own."""
    scales = content.pop("scales", {})
    if scale == PAPER:
        return content
    if scale not in scales:
        raise UserError(f"--scale {scale}: {path} has no [scales.{scale}]; there are {', '.join([PAPER, *scales])}")
    own, grids = content.get("grid", []), scales[scale].pop("grid", [])
    if len(grids) < len(own):
        raise UserError(f"{path}: scales.{scale}: {len(grids)} [[scales.{scale}.grid]] for {len(own)} [[grid]]")
    merged = [{**(own[number] if number < len(own) else {}), **table} for number, table in enumerate(grids)]
    return {**content, **scales[scale], "grid": merged}


def _size(path: Path, name: str, table: Mapping[str, Any]) -> Size:
    """A model of the file, the rest of it from its recipe where it names one."""
    recipe = _from_recipe(table["recipe"]) if "recipe" in table else {}
    flags = (*recipe.get("flags", ()), *_value(f"{path}: sizes.{name}: flags", table.get("flags", ()), tuple[str, ...]))
    size = _filled(Size, f"{path}: sizes.{name}", {**recipe, "name": name, **table, "flags": flags})
    if size.heads > 0 and size.hidden % size.heads:
        raise UserError(f"{path}: sizes.{name}.heads {size.heads}: does not divide hidden {size.hidden}")
    return size


def _from_recipe(recipe: str) -> dict[str, Any]:
    """What a study's size has from a model of examples/models; ``flags``: what has no name in :class:`Size`.

    Raises:
        UserError: no such recipe.
    """
    named = {
        "--num-layers": "layers",
        "--hidden-size": "hidden",
        "--num-attention-heads": "heads",
        "--ffn-hidden-size": "ffn",
        "--seq-length": "sequence",
        "--init-method-std": "init_std",
    }
    found: dict[str, Any] = {"init_std": 0.02}  # Megatron's default
    flags: list[str] = []
    words = read_recipe(Path(recipe))
    if "--swiglu" not in words:
        raise UserError(f"FFN={os.environ.get('FFN', '')}: a study's arms say which layer it is; unset FFN")
    starts = [number for number, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        flag, values = words[start], words[start + 1 : end]
        if flag in named:
            found[named[flag]] = float(values[0]) if flag == "--init-method-std" else int(values[0])
        elif flag not in ("--swiglu", "--squared-relu", "--max-position-embeddings"):  # an arm's, and the study's
            flags += [flag, *values]
    if "--moe-ffn-hidden-size" in flags:  # what arms widen is an expert
        found["ffn"] = int(flags[flags.index("--moe-ffn-hidden-size") + 1])
    return {**found, "flags": tuple(flags)}


def _filled(kind: type, where: str, table: Mapping[str, Any]) -> Any:
    """A dataclass from a table of TOML; a text where it wants several is split at blanks.

    Raises:
        UserError: a key that is unknown or missing, or a value of another type.
    """
    hints = get_type_hints(kind)
    required = [field.name for field in fields(kind) if field.default is MISSING]
    for key in (*table, *required):
        if key not in hints:
            raise UserError(f"{where}: {key}: unknown key; there are {', '.join(sorted(hints))}")
        if key not in table:
            raise UserError(f"{where}: {key}: is missing")
    return kind(**{key: _value(f"{where}: {key}", value, hints[key]) for key, value in table.items()})


def _value(where: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        item, *_ = get_args(hint)
        values = value.split() if isinstance(value, str) else value
        if not isinstance(values, list | tuple):
            raise UserError(f"{where} {value!r}: must be a list")
        return tuple(_value(where, entry, item) for entry in values)
    if get_origin(hint) is dict or hint not in (int, float, str, bool):
        return value
    if isinstance(value, bool) != (hint is bool) or not isinstance(
        value, (int, float) if hint in (int, float) else hint
    ):
        raise UserError(f"{where} {value!r}: must be {'a number' if hint in (int, float) else hint.__name__}")
    if hint is int and (not math.isfinite(value) or value != int(value)):
        raise UserError(f"{where} {value!r}: must be a whole number")
    return hint(value)


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
