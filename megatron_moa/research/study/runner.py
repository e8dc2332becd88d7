"""Runs a study's cells: several at once, each one a process, each one's result a line of JSON."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from megatron_moa.checkpoints.files import TRACKER
from megatron_moa.command_line.processes import end_processes, end_with_parent, start_process
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.single_process import TASK_COUNTS
from megatron_moa.research.study.arms import ARMS
from megatron_moa.research.study.corpora import Corpus, make_corpus
from megatron_moa.research.study.grid import Cell, Study, cell_from, cell_values, pending
from megatron_moa.research.study.lines import RESULTS, end_last_line, read_results, read_timings
from megatron_moa.research.study.timing import TIMING, WIDER, step_times, width_of_equal_time
from megatron_moa.runs.training_log import TrainingLog

_COMMAND = "command.json"  # of a run, in its folder
_SCRIPT = Path(__file__).resolve().parents[3] / "pretrain_gpt_moa.py"
_POINTS = 64  # of a loss curve in a line of results
_DIVERGED = 17  # exit code of a run whose loss is not finite (megatron_moa.training.nan_guard)


def command(study: Study, cell: Cell, time_width: int | None = None) -> list[str]:
    """The flags of a cell's run, without its data and folders."""
    size, arm = study.sizes[cell.size], ARMS[cell.arm]
    iterations = max(1, round(cell.tokens / (size.sequence * size.batch)))
    flags: dict[str, Any] = {
        "--num-layers": size.layers,
        "--hidden-size": size.hidden,
        "--num-attention-heads": size.heads,
        "--seq-length": size.sequence,
        "--max-position-embeddings": size.sequence,
        "--position-embedding-type": "rope",
        "--normalization": "RMSNorm",
        "--init-method-std": size.init_std,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--split": "95,5,0",
        "--seed": arm.seed(cell.seed),
        "--micro-batch-size": size.micro_batch or size.batch,
        "--global-batch-size": size.batch,
        "--train-iters": iterations,
        "--lr": f"{cell.rate:g}",
        "--min-lr": "0" if cell.schedule == "wsd" else f"{cell.rate / 20:g}",  # as the paper's end
        "--lr-warmup-iters": max(1, round(iterations * study.warmup)),
        "--weight-decay": 0.1,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--log-interval": max(1, iterations // 200),
        "--eval-interval": iterations + 1,  # once, after the last iteration
        "--eval-iters": study.evaluation,
    }
    words = [word for pair in flags.items() for word in map(str, pair)]
    words += ["--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    if cell.schedule == "wsd":
        decay = max(1, iterations // 5)
        words += ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", str(decay)]
    else:
        words += ["--lr-decay-style", "cosine"]
    if cell.optimizer == "muon":
        words += "--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-scale-mode spectral".split()
        words += "--muon-extra-scale-factor 0.2".split()
    shared = arm.shared_flags([*size.flags, *study.flags])
    return with_width([*words, *shared, *arm.flags(size)], arm.width(size, time_width))


def with_width(flags: Sequence[str], width: int) -> list[str]:
    """Flags, and the width of feed-forward layers and experts behind them."""
    experts = ["--moe-ffn-hidden-size", str(width)] if "--num-experts" in flags else []
    return [*flags, "--ffn-hidden-size", str(width), *experts]


def surroundings() -> dict[str, Any]:
    """What a result depends on beside its flags."""
    return {
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "megatron-moa")},
        "date": time.strftime("%Y-%m-%d"),
    }


def machine() -> str:
    """What a run was on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} {platform.machine()} CPU cores"


def result_of(
    cell: Cell, flags: Sequence[str], log: TrainingLog, corpus: Corpus, seconds: float, code: int
) -> dict[str, Any]:
    """A line of results.

    The loss is the mean over the iterations that a log line stands for, thinned to at most 64 points of
    (tokens, loss); ``final`` is the validation loss after the last iteration, None where the run diverged.
    """
    settings = log.settings
    tokens = int(settings["seq_length"]) * int(settings["global_batch_size"])
    tables = 2 * corpus.padded_vocabulary * int(settings["hidden_size"])  # embedding and output layer
    lines = [step for step in log.iterations if step.loss is not None]
    every = max(1, math.ceil(len(lines) / _POINTS))
    curve = [
        (part[-1].iteration * tokens, round(sum(step.loss for step in part) / len(part), 5))
        for part in (lines[start : start + every] for start in range(0, len(lines), every))
    ]
    final = log.final_validation
    return {
        "cell": cell_values(cell),
        "final": final if math.isfinite(final) and code == 0 else None,
        "parameters": log.parameters,
        "non_embedding": log.parameters - tables,
        "ffn": int(settings["ffn_hidden_size"]),
        "iterations": log.iterations[-1].total if log.iterations else int(settings["train_iters"]),
        "milliseconds": round(log.milliseconds, 2) if log.iterations else None,
        "seconds": round(seconds, 1),
        "loss": curve,
        "flags": list(flags),
        "text": corpus.content(),
        **surroundings(),
    }


def losses_of(results: Sequence[dict[str, Any]]) -> dict[Cell, float]:
    """Final losses by cell, NaN for a run that diverged."""
    return {cell_from(line["cell"]): math.nan if line["final"] is None else line["final"] for line in results}


def time_widths(timings: Sequence[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """By size and optimizer: f at which SwiGLU's step takes as long as MoA's."""
    return {(line["size"], line["optimizer"]): line["equal_time_width"] for line in timings}


def _append(path: Path, line: dict[str, Any]) -> None:
    """On the disk before this returns."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass
class _Running:
    cell: Cell
    slot: int
    flags: list[str]
    process: subprocess.Popen
    log: TrainingLog
    output: TextIO
    folder: Path
    start: float
    seconds_before: float  # of earlier starts' iterations

    def follow(self) -> None:
        """Takes in what the run has printed since."""
        while line := self.output.readline():
            self.log.read_line(line)

    @property
    def fraction_done(self) -> float:
        """The part of the run that is behind it."""
        return self.log.iterations[-1].iteration / self.log.iterations[-1].total if self.log.iterations else 0.0

    def state(self) -> str:
        return f"{self.cell.arm} {self.cell.size} lr {self.cell.rate:g} {self.fraction_done:.0%}"


class Runner:
    """Runs what is pending, until nothing is.

    Args:
        out: the study's folder: results.jsonl, timing.jsonl, ``runs/`` and ``corpora/``.
        at_a_time: runs at once; on GPUs each has one of its own.
        threads: CPU threads of each.
        file: the study's, for messages.
    """

    def __init__(
        self, study: Study, out: Path, at_a_time: int, threads: int, file: Path | str = "the study's file"
    ) -> None:
        try:
            os.scandir(out).close()
        except FileNotFoundError:
            pass  # it is made when something runs
        except OSError as error:
            raise _unusable(out, error) from None
        self.study, self.out, self.file = study, out, file
        self.at_a_time, self.threads = at_a_time, threads
        self.corpora: dict[str, Corpus] = {}
        self.results = read_results(out / RESULTS)
        self.timings = read_timings(out / TIMING)
        self.running: list[_Running] = []
        self._check_results()

    def _check_results(self) -> None:
        """Refuses results of other settings under the same names."""
        asked = {cell.setting for cell in pending(self.study, {})}
        widths = time_widths(self.timings)
        for number, line in enumerate(self.results, start=1):
            cell = cell_from(line["cell"])
            if cell.setting not in asked or cell.arm not in ARMS:
                continue  # of a grid that the study's file no longer has
            width = widths.get((cell.size, cell.optimizer))
            if ARMS[cell.arm].widened == "time" and width is None:
                raise UserError(
                    f"{self.out / TIMING}: has no step times of {cell.size} with {cell.optimizer}, by which line "
                    f"{number} of {RESULTS} ({cell.name}) was run; put them back, or take another --out"
                )
            now = command(self.study, cell, width)
            if line["flags"] != now:
                had, has = next(pair for pair in zip_longest(line["flags"], now, fillvalue="") if pair[0] != pair[1])
                raise UserError(
                    f"{self.out / RESULTS}: line {number} ({cell.name}) was run with other settings ({had!r}; now "
                    f"{has!r}); take another --out, or delete that line"
                )

    def run(self) -> None:
        """Runs all cells of the study.

        Runs that are going when it is interrupted are ended, and go on (:meth:`_start`) the next time.

        Raises:
            UserError: another process works on the study; a run failed.
        """
        with _locked(self.out):
            for name in (RESULTS, TIMING):
                end_last_line(self.out / name)
            for name in dict.fromkeys(cell.corpus for cell in self.pending()):
                self._corpus(name)  # what is wrong with one is told before anything runs
            if self.study.timing:
                self._measure()
            try:
                while self._step():
                    time.sleep(0.2)
            finally:
                end_processes([run.process for run in self.running])

    def pending(self) -> list[Cell]:
        """Cells without a result whose turn it is, those that are running among them."""
        return pending(self.study, losses_of(self.results))

    def _step(self) -> bool:
        for run in list(self.running):
            run.follow()
            if run.process.poll() is not None:
                run.follow()
                self.running.remove(run)
                self._take(run)
        waiting = [cell for cell in self.pending() if cell not in {run.cell for run in self.running}]
        while waiting and len(self.running) < self.at_a_time:
            self.running.append(self._start(waiting.pop(0)))
        if sys.stderr.isatty():
            states = "; ".join(run.state() for run in self.running)
            text = f"{self._progress(waiting)}: {states}"
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        return bool(self.running)

    def _corpus(self, name: str) -> Corpus:
        if name not in self.corpora:
            try:
                corpus = make_corpus(name, self.study.corpora[name], self.out / "corpora" / name)
                self._check_text(name, corpus)
            except UserError as error:
                raise UserError(f"{self.file}: {error}") from None
            self.corpora[name] = corpus
        return self.corpora[name]

    def _check_text(self, name: str, corpus: Corpus) -> None:
        """Refuses a corpus of another text than results of its name were run with."""
        content = corpus.content()
        for number, line in enumerate(self.results, start=1):
            if line["cell"]["corpus"] == name and line["text"] not in (None, content):
                raise UserError(
                    f"corpora.{name}: {corpus.data} is another text, or of another tokenizer, than line {number} of "
                    f"{self.out / RESULTS} was run with; give that one, or take another --out"
                )

    def _environment(self, slot: int = 0) -> dict[str, str]:
        """Of a run: its threads, its GPU, and this package before any other that is installed."""
        path = os.pathsep.join(filter(None, (str(_SCRIPT.parent), os.environ.get("PYTHONPATH"))))
        own = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        gpus = visible_gpus()
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        inherited = {name: value for name, value in os.environ.items() if name not in TASK_COUNTS}  # this task's alone
        return {"OMP_WAIT_POLICY": "PASSIVE", **inherited, **own}

    def _measure(self) -> None:
        """Times the steps of all arms of every size and optimizer that have not been timed."""
        arms: dict[tuple[str, str], dict[str, None]] = {}
        for grid in self.study.grids:
            for size in grid.sizes:
                arms.setdefault((size, grid.optimizer), {}).update(dict.fromkeys(grid.arms))
        for (size, optimizer), wanted in arms.items():
            before = {(line["size"], line["optimizer"]): line for line in self.timings}.get((size, optimizer))
            timed = [arm for arm in wanted if ARMS[arm].widened != "time"]
            if before is not None and set(timed) <= set(before["milliseconds"]):
                continue
            self._line(f"timing {size}, {optimizer}: {len(timed)} arms, {self.study.timing} steps of each, in turn")
            contenders = {arm: self._timed_flags(size, optimizer, arm) for arm in ("swiglu", "moa-bi-sided", *timed)}
            width = self.study.sizes[size].ffn
            contenders[WIDER] = with_width(contenders["swiglu"], width * 3 // 2)
            with (self.out / f"timing-{size}-{optimizer}.log").open("w") as log:
                times = step_times(contenders, self.study.timing, self._environment(), log)
            medians = {arm: time["median"] for arm, time in times.items()}
            equal = width_of_equal_time(medians, width, width * 3 // 2, medians["moa-bi-sided"])
            line = {
                "size": size,
                "optimizer": optimizer,
                "milliseconds": medians,
                "quartiles": {arm: [time["low"], time["high"]] for arm, time in times.items()},
                # Once measured it stays: runs of that width may be there.
                "equal_time_width": equal if before is None else before["equal_time_width"],
                "rounds": self.study.timing,
                "threads": self.threads,
                **surroundings(),
            }
            _append(self.out / TIMING, line)
            self.timings.append(line)

    def _timed_flags(self, size: str, optimizer: str, arm: str) -> list[str]:
        corpus = next(grid.corpora[0] for grid in self.study.grids if size in grid.sizes)
        cell = Cell(corpus, size, 10**9, optimizer, "cosine", arm, 1e-3, 1)  # far from the schedule's end
        return [*command(self.study, cell), *self._corpus(corpus).flags()]

    def _start(self, cell: Cell) -> _Running:
        """Starts a run: from the last checkpoint that the same command left in its folder, else anew."""
        corpus = self._corpus(cell.corpus)
        flags = command(self.study, cell, time_widths(self.timings).get((cell.size, cell.optimizer)))
        folder = self.out / "runs" / cell.name
        checkpoint = folder / "checkpoint"
        own = ["--data-cache-path", str(folder / "cache")]  # one each: runs at a time would write the same files
        if self.study.save_interval or cell.arm in self.study.keep:
            interval = self.study.save_interval or 10**9  # after the last iteration alone
            own += ["--save", str(checkpoint), "--save-interval", str(interval), "--moa-keep-last", "1"]
        words = [*flags, *corpus.flags(), *own]
        if _command_of(folder) != words or not (checkpoint / TRACKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / _COMMAND).write_text(json.dumps(words))
        else:
            words += ["--load", str(checkpoint)]
            shutil.rmtree(folder / "cache", ignore_errors=True)  # the kill may have come while it was written
        slot = min(set(range(self.at_a_time)) - {run.slot for run in self.running})
        log_file = folder / "train.log"
        before = TrainingLog.read(log_file).seconds if log_file.exists() else 0.0
        with log_file.open("a") as log:
            process = start_process(
                [sys.executable, str(_SCRIPT), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                preexec_fn=end_with_parent,
            )
        output = log_file.open(errors="replace")
        return _Running(cell, slot, flags, process, TrainingLog(), output, folder, time.monotonic(), before)

    def _take(self, run: _Running) -> None:
        """Writes the line of a run that has ended."""
        run.output.close()
        code = run.process.returncode
        if code not in (0, _DIVERGED) or (code == 0 and not (run.log.iterations and run.log.validation)):
            last = (run.folder / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{run.folder}: ended with exit code {code} ({' '.join(last)}); see train.log there")
        seconds = run.seconds_before + time.monotonic() - run.start
        line = result_of(run.cell, run.flags, run.log, self.corpora[run.cell.corpus], seconds, code)
        _append(self.out / RESULTS, line)
        self.results.append(line)
        kept = run.cell.arm in self.study.keep
        for name in ("cache",) if kept else ("cache", "checkpoint"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        final = "diverged" if line["final"] is None else f"validation loss {line['final']:.4f}"
        waiting = [cell for cell in self.pending() if cell not in {other.cell for other in self.running}]
        self._line(f"{run.cell.name}: {final} in {line['seconds'] / 60:.1f} min; {self._progress(waiting)}")

    def _progress(self, waiting: Sequence[Cell]) -> str:
        """How many runs are done, and how long those that are known of will take, by those that are done."""
        done, known = len(self.results), len(self.results) + len(self.running) + len(waiting)
        text = f"{done} of {known} runs"
        left = sum(map(self._seconds, waiting)) + sum(
            (1 - run.fraction_done) * self._seconds(run.cell) for run in self.running
        )
        return f"{text}, about {left / self.at_a_time / 60:.0f} min left" if left else text

    def _seconds(self, cell: Cell) -> float:
        """Estimates how many seconds a run will take.

        A run takes as long as others of its size and tokens did, else by FLOPs; 0 while nothing is known.
        """
        here = [line for line in self.results if line["cell"]["size"] in self.study.sizes]
        alike = [line for line in here if all(line["cell"][key] == getattr(cell, key) for key in ("size", "tokens"))]
        if alike:
            return sum(line["seconds"] for line in alike) / len(alike)
        work = sum(self._work(cell_from(line["cell"])) for line in here)
        return self._work(cell) * sum(line["seconds"] for line in here) / work if work else 0.0

    def _work(self, cell: Cell) -> float:
        """In proportion to a run's FLOPs: tokens times weights."""
        size = self.study.sizes[cell.size]
        weights = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.ffn) + 2048 * size.hidden
        return cell.tokens * weights

    def _line(self, text: str) -> None:
        print(("\r\033[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs for ``CUDA_VISIBLE_DEVICES``."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named and count else [str(number) for number in range(count)]


def _command_of(folder: Path) -> list[str] | None:
    """The command that a run's folder is of; None if it is of none, or a kill came while it was written."""
    try:
        return json.loads((folder / _COMMAND).read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process a study."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    except OSError as error:
        raise _unusable(out, error) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another process works on this study; wait, or name another folder") from None
        yield


def _unusable(out: Path, error: OSError) -> UserError:
    return UserError(f"--out {out}: cannot be used ({error.strerror}); name another folder")
