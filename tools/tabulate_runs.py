"""Prints a table of finished runs, with each mixture's best learning rate.

    python tools/tabulate_runs.py runs/sweep-dense-0.12b          every train.log below that folder
    python tools/tabulate_runs.py runs/a/train.log runs/b/train.log --csv

The table has each mixture's distance to the best baseline of its kind: gated (SwiGLU), or not (ReLU2, GELU). Runs that
differ in the seed alone are one line: mean validation loss after the last iteration, and the standard deviation over
seeds. Settings are read from the list of arguments that a run prints, not from names of folders. Runs that are not at
their end, or have no finite validation loss, are listed on stderr and counted nowhere.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors, printable
from megatron_moa.runs.training_log import COUNT, NUMBER, TrainingLog

PROGRAM = "tabulate_runs.py"
# What an arm is: of a mixture all of it, of a baseline the layer alone.
_LAYER = ("swiglu", "squared_relu", "ffn_hidden_size", "moe_ffn_hidden_size")
_MIXTURE = (
    *("moa_mixing", "moa_form", "moa_activations", "moa_gate", "moa_gate_bias", "moa_freeze_gates", "moa_amplitude"),
    *("moa_init", "moa_gate_init_std", "moa_init_scale", "moa_gate_lr_scale", "moa_gate_weight_decay"),
)
_BEFORE = {"moa_gate_lr_scale": "1.0", "moa_gate_weight_decay": "None"}  # in logs older than these settings
_SETTINGS = (*_MIXTURE, *_LAYER)  # of an arm, in this order
_SWIGLU = _SETTINGS.index("swiglu")
_NUMBERS = {"lr": re.compile(NUMBER), "seed": re.compile(r"-?" + COUNT)}
# The terms of a comparison: runs of different ones do not belong into one table.
_SAME = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_experts", "moe_router_topk", "seq_length"),
    *("global_batch_size", "train_iters", "optimizer", "lr_decay_style", "weight_decay", "init_method_std", "split"),
    *("data_path", "data_args_path", "tokenizer_model"),
)


@dataclass(frozen=True)
class FoundLog:
    """A log, and the path it was found at."""

    path: Path
    log: TrainingLog

    @property
    def arm(self) -> tuple[str, ...]:
        """The values of :data:`_SETTINGS`; those of a mixture are empty for a baseline."""
        values = [self.log.settings.get(name, _BEFORE.get(name, "")) for name in _SETTINGS]
        if values[0] == "none":
            values[1 : len(_MIXTURE)] = [""] * (len(_MIXTURE) - 1)
        return tuple(values)

    @property
    def learning_rate(self) -> float:
        return float(self.log.settings["lr"])


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed alone."""

    arm: tuple[str, ...]
    learning_rate: float
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    milliseconds: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; NaN for a single one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else math.nan


def find_logs(paths: Sequence[Path]) -> list[Path]:
    """The files named, and every train.log below the folders named.

    Raises:
        UserError: no such path, or no log in it.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(path.glob("**/train.log"))
            if not below:
                raise UserError(f"{path}: holds no train.log; give the folder of a sweep, or log files")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: there is no such file or folder")
    return found


def read_runs(paths: Sequence[Path]) -> tuple[list[FoundLog], list[str]]:
    """The complete runs, and a line on each of the others.

    Raises:
        UserError: runs of different models or budgets.
    """
    runs, others = [], []
    for path in find_logs(paths):
        run = FoundLog(path, TrainingLog.read(path))
        if not run.log.iterations or "lr" not in run.log.settings:
            others.append(f"{path}: no training in it")
        elif damaged := [name for name, form in _NUMBERS.items() if not form.fullmatch(run.log.settings.get(name, ""))]:
            others.append(f"{path}: its list of arguments is damaged at {damaged[0]}")
        elif not run.log.complete:
            step = run.log.iterations[-1]
            others.append(f"{path}: at iteration {step.iteration} of {step.total}")
        elif not math.isfinite(run.log.final_validation):
            others.append(f"{path}: no finite validation loss; --eval-iters 0, or it diverged")
        else:
            try:
                _upgrade(run)
            except UserError as error:
                others.append(str(error))
            else:
                runs.append(run)
    for name in _SAME:
        known = [(run.path, run.log.settings[name]) for run in runs if name in run.log.settings]
        for path, value in known[1:]:
            if value != known[0][1]:
                raise UserError(f"{path}: has {name} {value}, {known[0][0]} has {known[0][1]}; tabulate them apart")
    return runs, others


def _upgrade(run: FoundLog) -> None:
    """Brings a log's settings to today's names; those of format version 1 have ``moa_la_init``.

    Raises:
        UserError: a form that means another function today, or a setting is missing.
    """
    if "moa_la_init" in run.log.settings:
        from megatron_moa.checkpoints.settings import upgrade_saved_settings  # which takes seconds, for torch

        settings = argparse.Namespace(**run.log.settings)
        try:
            upgrade_saved_settings(settings, run.path)
        except AttributeError as error:
            raise UserError(f"{run.path}: its list of arguments is damaged at {error.name}") from None
        run.log.settings = {name: str(value) for name, value in vars(settings).items()}


def lines_of(runs: Sequence[FoundLog]) -> list[Line]:
    """Runs by arm and learning rate, baselines first, arms in the order they were found."""
    groups: dict[tuple[tuple[str, ...], float], dict[int, FoundLog]] = {}
    for run in runs:
        group = groups.setdefault((run.arm, run.learning_rate), {})
        seed = int(run.log.settings["seed"])
        if seed in group:
            raise UserError(f"{run.path}: the same run as {group[seed].path}; leave one out")
        group[seed] = run
    arms = list(dict.fromkeys(arm for arm, _ in groups))
    arms.sort(key=lambda arm: arm[0] != "none")
    return [
        Line(
            arm,
            rate,
            tuple(sorted(group)),
            tuple(group[seed].log.final_validation for seed in sorted(group)),
            statistics.median(run.log.milliseconds for run in group.values()),
        )
        for (arm, rate), group in sorted(groups.items(), key=lambda item: (arms.index(item[0][0]), item[0][1]))
    ]


def arm_names(lines: Sequence[Line]) -> dict[tuple[str, ...], str]:
    """A name for each arm: its mixing, and what else tells it from other mixtures or baselines."""
    arms = list(dict.fromkeys(line.arm for line in lines))
    names = {}
    for arm in arms:
        alike = zip(*(other for other in arms if (other[0] == "none") == (arm[0] == "none")), strict=True)
        words = [
            setting.removeprefix("moa_") if value == "True" else value
            for setting, value, values in zip(_SETTINGS, arm, alike, strict=True)
            if len(set(values)) > 1 and value != "False"
        ]
        names[arm] = " ".join(words if words and words[0] == arm[0] else [arm[0], *words])
    return names


def best_of(lines: Sequence[Line]) -> dict[tuple[str, ...], Line]:
    """Each arm's line of the lowest loss."""
    return {
        arm: min((line for line in lines if line.arm == arm), key=lambda line: line.mean) for arm in arm_names(lines)
    }


def untuned(lines: Sequence[Line]) -> list[str]:
    """Returns a line on each arm whose best learning rate is the lowest or highest tried.

    A better one may lie beyond.
    """
    names = arm_names(lines)
    notes = []
    for arm, best in best_of(lines).items():
        rates = [line.learning_rate for line in lines if line.arm == arm]
        if len(rates) == 1:
            notes.append(f"{names[arm]}: one learning rate tried; try others before comparing")
        elif best.learning_rate in (min(rates), max(rates)):
            end, beyond = ("lowest", "lower") if best.learning_rate == min(rates) else ("highest", "higher")
            notes.append(
                f"{names[arm]}: best at the {end} learning rate tried, {best.learning_rate:g}; try a {beyond} one"
            )
    return notes


def rows_of(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The table's cells, its header first."""
    names = arm_names(lines)
    best = best_of(lines)
    baselines: dict[str, Line] = {}  # the best one of gated layers, and of others
    for line in sorted(best.values(), key=lambda line: -line.mean):
        if line.arm[0] == "none":
            baselines[line.arm[_SWIGLU]] = line
    rows = [("mixing", "learning rate", "seeds", "validation loss", "over seeds", "ms", "to the baseline's best")]
    for line in lines:
        baseline = baselines.get(line.arm[_SWIGLU], line)
        difference = "" if line.arm == baseline.arm else f"{line.mean - baseline.mean:+.4f}"
        rows.append(
            (
                names[line.arm],
                f"{line.learning_rate:g}",
                ",".join(map(str, line.seeds)),
                f"{line.mean:.4f}" + (" *" if best[line.arm] is line else ""),
                "" if math.isnan(line.spread) else f"+- {line.spread:.4f}",
                f"{line.milliseconds:.0f}",
                difference,
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a log file, or a folder with train.log below it"
    )
    parser.add_argument("--csv", action="store_true", help="comma-separated values instead of a markdown table")
    options = parser.parse_args(argv)
    with one_line_errors(PROGRAM):
        runs, others = read_runs(options.runs)
        lines = lines_of(runs)
        rows = rows_of(lines) if lines else []
        if options.csv:
            csv.writer(sys.stdout).writerows(rows)
        elif rows:
            print(markdown_table(rows[0], rows[1:]))
            print("\n* the best learning rate of each mixing")
        for note in untuned(lines):
            print(note, file=sys.stderr)
        for line in others:
            print(f"not counted: {printable(line)}", file=sys.stderr)
        if not lines:
            raise UserError(f"{' '.join(map(str, options.runs))}: no run is complete; let one end, or name others")


if __name__ == "__main__":
    main()
