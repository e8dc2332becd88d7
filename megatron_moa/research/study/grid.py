"""Reads a study's file, lists its runs, and says which are still to be run.

What is to be run depends on the results that are there (the best learning rate of an arm decides where its seeds are
spent, and whether its grid goes on), so it is asked for again after every run: :func:`pending`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_moa.command_line.flags import our_flags
from megatron_moa.command_line.megatron_flags import check_words
from megatron_moa.command_line.words import flag_groups
from megatron_moa.errors import UserError, one_line, printable
from megatron_moa.research.study.arms import ARMS, Size
from megatron_moa.research.study.corpora import check_settings
from megatron_moa.research.study.values import Bound, Count, Natural, Positive, filled, fitting
from megatron_moa.runs.recipes import read_recipe

PAPER = "paper"  # the scale of a file as it stands
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
_Part = Annotated[float, Bound(lambda part: 0 <= part < 1, "give a part of the run such as 0.02")]
_Table = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        tokens: of the whole run.
        rate: peak learning rate.
    """

    corpus: str
    size: str
    tokens: Count
    optimizer: str
    schedule: str
    arm: str
    rate: Positive
    seed: Natural

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
        extend: whether the rates go on, by the factor between the two at that end, while an arm's best is there.
        further_seeds: beside ``seeds``, once rates are chosen: each arm at its best.
    """

    arms: tuple[str, ...]
    sizes: tuple[str, ...]
    corpora: tuple[str, ...]
    tokens: tuple[Count, ...]
    rates: tuple[Positive, ...] = ()
    seeds: tuple[Natural, ...] = (1,)
    optimizer: str = "adamw"
    schedule: str = "cosine"
    extend: bool = False
    further_seeds: tuple[Natural, ...] = ()

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
        grids: in the order in which they are run; of the file's ``[[grid]]``, further seeds as a grid of their own.
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
    grids: tuple[Grid, ...] = field(metadata={"key": "grid"})
    flags: tuple[str, ...] = ()
    evaluation: Count = 40
    warmup: _Part = 0.05
    timing: Natural = 15
    keep: tuple[str, ...] = ()
    save_interval: Natural = 0
    tuning_seed: Natural = 1
    most_extensions: Natural = 3


def read_study(path: Path, scale: str = PAPER) -> Study:
    """Reads a study's file (TOML; examples/studies/ has some, which say what the keys mean).

    Args:
        path: the file.
        scale: :data:`PAPER`, the file as it stands, or one of its ``[scales.NAME]``, whose keys take the place of the
            file's: its k-th ``[[scales.NAME.grid]]`` of keys in the k-th ``[[grid]]``; further ones stand alone.

    Raises:
        UserError: no such file, not TOML, no such scale, or a key, name or value that does not fit.
    """
    content = _at_scale(path, _read_toml(path), scale)
    if not content.get("grid"):
        raise UserError(f"{path}: has no [[grid]]; see examples/studies/")
    sizes = fitting(f"{path}: sizes", content.get("sizes", {}), dict[str, _Table])
    corpora = fitting(f"{path}: corpora", content.get("corpora", {}), dict[str, _Table])
    for name in (*sizes, *corpora):
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"{path}: {printable(name)!r}: names files of the study; give letters, digits and any of _ . + -, no "
                "other"
            )
    for name, settings in corpora.items():
        check_settings(f"{path}: corpora.{name}", settings)
    models = {name: _size(f"{path}: sizes.{name}", name, table) for name, table in sizes.items()}
    study = filled(Study, str(path), {**content, "sizes": models, "corpora": corpora})
    for number, grid in enumerate(study.grids, start=1):
        _check_grid(f"{path}: grid {number}", study, grid)
    unknown = [name for name in study.keep if name not in ARMS]
    if unknown:
        raise UserError(f"{path}: keep {unknown[0]}: unknown; there are {', '.join(ARMS)}")
    _check_flags(f"{path}: flags", study.flags)
    parts = [(number, part) for number, grid in enumerate(study.grids, start=1) for part in _with_further_seeds(grid)]
    study = replace(study, grids=tuple(part for _, part in parts))
    for number, grid in parts:
        if not grid.rates:
            _check_best_rates(f"{path}: grid {number}", study, grid)
    return study


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see examples/studies/") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not TOML ({one_line(error)})") from None


def _check_grid(where: str, study: Study, grid: Grid) -> None:
    """Raises UserError for names that are unknown, and for keys that need another one."""
    for what, names, there in (
        ("arms", grid.arms, ARMS),
        ("sizes", grid.sizes, study.sizes),
        ("corpora", grid.corpora, study.corpora),
        ("optimizer", (grid.optimizer,), OPTIMIZERS),
        ("schedule", (grid.schedule,), SCHEDULES),
    ):
        unknown = [name for name in names if name not in there]
        if unknown:
            raise UserError(f"{where}: {what} {unknown[0]}: unknown; there are {', '.join(there)}")
    for what in ("arms", "sizes", "corpora", "tokens", "seeds"):
        if not getattr(grid, what):
            raise UserError(f"{where}: {what}: a list is empty; only rates may be (each arm's best)")
    if grid.extend and not grid.rates:
        raise UserError(f"{where}: extend true: there are no rates to go on from; add rates")
    if grid.extend and study.tuning_seed not in grid.seeds:
        raise UserError(
            f"{where}: extend true: its seeds lack {study.tuning_seed}, the tuning_seed, which says where the best "
            "rate lies; add it"
        )
    by_time = [arm for arm in grid.arms if ARMS[arm].widened == "time"]
    if by_time and not study.timing:
        raise UserError(
            f"{where}: arms {by_time[0]}: is as wide as step times say, of which timing = 0 measures none; "
            "set timing = 15"
        )
    if grid.further_seeds and not grid.rates:
        raise UserError(
            f"{where}: further_seeds {grid.further_seeds[0]}: there are no rates to choose from; name it in seeds, or "
            "add rates"
        )


def _with_further_seeds(grid: Grid) -> Iterator[Grid]:
    yield replace(grid, further_seeds=())
    if grid.further_seeds:
        yield replace(grid, rates=(), extend=False, seeds=grid.further_seeds, further_seeds=())


# What a run is named by, or its tokens are counted with, so that nobody else may set it.
_OF_CELLS = (
    *("--lr", "--min-lr", "--seed", "--train-iters", "--train-samples", "--optimizer", "--lr-decay-style"),
    *("--swiglu", "--squared-relu", "--moa-mixing", "--moa-form"),
)
# What a size's keys say: the key by its flag.
_KEYS_OF_SIZE = {
    "--num-layers": "layers",
    "--hidden-size": "hidden",
    "--num-attention-heads": "heads",
    "--ffn-hidden-size": "ffn",
    "--moe-ffn-hidden-size": "ffn",
    "--seq-length": "sequence",
    "--global-batch-size": "batch",
    "--micro-batch-size": "micro_batch",
    "--init-method-std": "init_std",
    "--moa-gate-init-std": "gate_init_std",
}


def _check_flags(where: str, flags: Sequence[str]) -> None:
    for flag in flags:
        name, equals, _ = flag.partition("=")
        if name in _OF_CELLS:
            raise UserError(f"{where}: {flag}: is the study's own, by a grid's keys; leave it out")
        if name in _KEYS_OF_SIZE:
            raise UserError(f"{where}: {flag}: a size says that by its key {_KEYS_OF_SIZE[name]}; leave it out")
        if equals and name.startswith("--"):  # flags are looked for by their names
            raise UserError(f"{where}: {flag}: give the flag and its value as two words")
    try:
        check_words(flags, our_flags())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    scales = fitting(f"{path}: scales", content.pop("scales", {}), dict[str, _Table])
    own = fitting(f"{path}: grid", content.get("grid", []), list[_Table], "[[grid]]")
    if scale == PAPER:
        return content
    if scale not in scales:
        raise UserError(f"--scale {scale}: {path} has no [scales.{scale}]; there are {', '.join([PAPER, *scales])}")
    where, head = f"{path}: scales.{scale}: grid", f"[[scales.{scale}.grid]]"
    grids = fitting(where, scales[scale].pop("grid", []), list[_Table], head)
    if len(grids) < len(own):
        raise UserError(f"{path}: scales.{scale}: {len(grids)} {head} for {len(own)} [[grid]]")
    merged = [{**(own[number] if number < len(own) else {}), **table} for number, table in enumerate(grids)]
    return {**content, **scales[scale], "grid": merged}


def _size(where: str, name: str, table: Mapping[str, Any]) -> Size:
    """A model of the file, the rest of it from its recipe where it names one."""
    if "name" in table:
        raise UserError(f"{where}: name: unknown key; the table's head names a size")
    recipe = fitting(f"{where}: recipe", table.get("recipe", ""), str)
    rest = _from_recipe(f"{where}: recipe", recipe) if recipe else {}
    further = fitting(f"{where}: flags", table.get("flags", ()), tuple[str, ...])
    _check_flags(f"{where}: flags", further)
    size = filled(Size, where, {**rest, "name": name, **table, "flags": (*rest.get("flags", ()), *further)})
    if size.hidden % size.heads:
        raise UserError(f"{where}.heads {size.heads}: does not divide hidden {size.hidden}")
    if size.micro_batch and size.batch % size.micro_batch:
        raise UserError(f"{where}.micro_batch {size.micro_batch}: does not divide batch {size.batch}")
    return size


def _from_recipe(where: str, recipe: str) -> dict[str, Any]:
    """Reads what a study's size has from a model of examples/models.

    ``flags`` is what has no name in :class:`Size`.

    Raises:
        UserError: no such recipe.
    """
    found: dict[str, Any] = {"init_std": 0.02}  # Megatron's default
    flags: list[str] = []
    try:
        words = read_recipe(Path(recipe))
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    if "--swiglu" not in words:
        if "FFN" in os.environ:
            raise UserError(f"FFN={os.environ['FFN']}: a study's arms say which layer it is; unset FFN")
        raise UserError(f"{where} {recipe}: its layer is not SwiGLU, which arms are built from; name another recipe")
    for flag, *values in flag_groups(words):
        if flag in _KEYS_OF_SIZE and flag != "--moe-ffn-hidden-size":
            found[_KEYS_OF_SIZE[flag]] = float(values[0]) if flag == "--init-method-std" else int(values[0])
        elif flag not in ("--swiglu", "--squared-relu", "--max-position-embeddings"):  # an arm's, and the study's
            flags += [flag, *values]
    if "--moe-ffn-hidden-size" in flags:  # what arms widen is an expert
        found["ffn"] = int(flags[flags.index("--moe-ffn-hidden-size") + 1])
    return {**found, "flags": tuple(flags)}


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
    factors = (rates[1] / rates[0], rates[-1] / rates[-2]) if len(rates) > 1 else (2.0, 2.0)
    found = rates_of(losses, setting, arm, study.tuning_seed)
    low, high = rates[0], rates[-1]
    for _ in range(study.most_extensions):
        if any(rate not in found for rate in rates):
            break  # not yet known where the best is
        best = min((rate for rate in found if low <= rate <= high), key=found.__getitem__)
        if found[best] == float("inf") or best not in (low, high):
            break
        # Rounded, so that a rate has the same name however it was reached.
        new = float(f"{best / factors[0] if best == low else best * factors[1]:.6g}")
        rates.append(new)
        low, high = min(rates), max(rates)
    return tuple(rates)


def cell_from(values: Mapping[str, Any]) -> Cell:
    """The cell in a line of results."""
    return Cell(**values)


def cell_values(cell: Cell) -> dict[str, Any]:
    """As a line of results has it."""
    return asdict(cell)
