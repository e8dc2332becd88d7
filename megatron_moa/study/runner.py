"""Runs a study's cells: several at once, each one a process, each one's result a line of JSON."""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from megatron_moa.errors import UserError
from megatron_moa.study.arms import ARMS
from megatron_moa.study.corpora import Corpus, make_corpus
from megatron_moa.study.grid import Cell, Study, cell_from, cell_values, pending
from megatron_moa.training_log import TrainingLog

RESULTS = "results.jsonl"
_SCRIPT = Path(__file__).resolve().parents[2] / "pretrain_gpt_moa.py"
_POINTS = 64  # of a loss curve in a line of results
_DIVERGED = 17  # exit code of a run whose loss is not finite (megatron_moa.nonfinite)


def command(study: Study, cell: Cell, corpus: Corpus, time_width: int | None = None) -> list[str]:
    """The flags of a cell's run, without its folders."""
    size, arm = study.sizes[cell.size], ARMS[cell.arm]
    iterations = max(1, round(cell.tokens / (size.sequence * size.batch)))
    flags: dict[str, Any] = {
        "--num-layers": size.layers,
        "--hidden-size": size.hidden,
        "--ffn-hidden-size": arm.width(size, time_width),
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
        "--micro-batch-size": size.batch,
        "--global-batch-size": size.batch,
        "--train-iters": iterations,
        "--lr": f"{cell.rate:g}",
        "--min-lr": f"{cell.rate / 10:g}",
        "--lr-warmup-iters": max(1, iterations // 20),
        "--weight-decay": 0.1,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--log-interval": max(1, iterations // 200),
        "--eval-interval": iterations + 1,  # once, after the last iteration
        "--eval-iters": study.evaluation,
    }
    words = [word for pair in flags.items() for word in map(str, pair)]
    words += ["--disable-bias-linear", "--untie-embeddings-and-output-weights", *corpus.flags()]
    if cell.schedule == "wsd":
        decay = max(1, iterations // 5)
        words += ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", str(decay)]
    else:
        words += ["--lr-decay-style", "cosine"]
    if cell.optimizer == "muon":
        words += "--optimizer muon --muon-momentum 0.95 --muon-nesterov --muon-scale-mode spectral".split()
        words += "--muon-extra-scale-factor 0.2".split()
    return [*words, *size.flags, *study.flags, *arm.flags(size)]


def machine() -> str:
    """What a run was on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} {platform.machine()} CPU cores"


def result_of(
    cell: Cell, flags: Sequence[str], log: TrainingLog, vocabulary: int, seconds: float, code: int
) -> dict[str, Any]:
    """A line of results.

    The loss is the mean over the iterations that a log line stands for, thinned to at most 64 points of
    (tokens, loss); ``final`` is the validation loss after the last iteration, None where the run diverged.
    """
    settings = log.settings
    tokens = int(settings["seq_length"]) * int(settings["global_batch_size"])
    tables = 2 * vocabulary * int(settings["hidden_size"])  # embedding and output layer
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
        "iterations": log.iterations[-1].total if log.iterations else None,
        "milliseconds": round(log.milliseconds, 2),
        "seconds": round(seconds, 1),
        "loss": curve,
        "flags": [word for word in flags if "/" not in word],
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "megatron-moa")},
        "date": time.strftime("%Y-%m-%d"),
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; one that a kill cut off, at the end, is left out.

    Raises:
        UserError: another line that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    whole = lines[:-1]  # behind the last newline there is nothing, or a line that was cut off
    results = []
    for number, line in enumerate(whole, start=1):
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number} is not JSON; delete that line") from None
    return results


def losses_of(results: Sequence[dict[str, Any]]) -> dict[Cell, float]:
    """Final losses by cell, NaN for a run that diverged."""
    return {cell_from(line["cell"]): math.nan if line["final"] is None else line["final"] for line in results}


@dataclass
class _Running:
    cell: Cell
    flags: list[str]
    process: subprocess.Popen
    log: TrainingLog
    output: TextIO
    folder: Path
    start: float

    def follow(self) -> None:
        """Takes in what the run has printed since."""
        while line := self.output.readline():
            self.log.read_line(line)

    def state(self) -> str:
        if not self.log.iterations:
            return f"{self.cell.arm} starting"
        step = self.log.iterations[-1]
        return f"{self.cell.arm} {self.cell.size} lr {self.cell.rate:g} {step.iteration}/{step.total}"


class Runner:
    """Runs what is pending, until nothing is.

    Args:
        out: the study's folder: ``results.jsonl``, ``runs/`` and ``corpora/``.
        at_a_time: runs at once.
        threads: of each.
    """

    def __init__(self, study: Study, out: Path, at_a_time: int, threads: int) -> None:
        self.study, self.out = study, out
        self.at_a_time, self.threads = at_a_time, threads
        self.corpora: dict[str, Corpus] = {}
        self.results = read_results(out / RESULTS)
        self.running: list[_Running] = []
        self.finished_here = 0.0  # seconds of the runs that this process has finished
        self._before = len(self.results)

    def run(self) -> None:
        """Runs all cells; what was running when it is interrupted is ended, and run anew the next time.

        Raises:
            UserError: another process works on the study; a run failed.
        """
        with _locked(self.out):
            self._cut_last_line()
            try:
                while self._step():
                    time.sleep(0.5)
            finally:
                for run in self.running:
                    _end(run.process)

    def _step(self) -> bool:
        for run in list(self.running):
            run.follow()
            if run.process.poll() is not None:
                run.follow()
                self.running.remove(run)
                self._take(run)
        waiting = [cell for cell in self._pending() if cell not in {run.cell for run in self.running}]
        while waiting and len(self.running) < self.at_a_time:
            self.running.append(self._start(waiting.pop(0)))
        self._show(len(waiting))
        return bool(self.running)

    def _pending(self) -> list[Cell]:
        return pending(self.study, losses_of(self.results))

    def _start(self, cell: Cell) -> _Running:
        if cell.corpus not in self.corpora:
            settings = self.study.corpora[cell.corpus]
            self.corpora[cell.corpus] = make_corpus(cell.corpus, settings, self.out / "corpora" / cell.corpus)
        flags = command(self.study, cell, self.corpora[cell.corpus])
        folder = self.out / "runs" / cell.name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        folder.mkdir(parents=True)
        own = ["--data-cache-path", str(folder / "cache")]  # one each: runs at a time would write the same files
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with (folder / "train.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), *flags, *own],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        output = (folder / "train.log").open(errors="replace")
        return _Running(cell, flags, process, TrainingLog(), output, folder, time.monotonic())

    def _take(self, run: _Running) -> None:
        """Writes the line of a run that has ended."""
        run.output.close()
        code = run.process.returncode
        if code not in (0, _DIVERGED) or not run.log.iterations or (code == 0 and not run.log.validation):
            last = (run.folder / "train.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{run.folder}: ended with exit code {code} ({' '.join(last)}); see train.log there")
        vocabulary = self.corpora[run.cell.corpus].padded_vocabulary
        line = result_of(run.cell, run.flags, run.log, vocabulary, time.monotonic() - run.start, code)
        with (self.out / RESULTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results.append(line)
        self.finished_here += line["seconds"]
        shutil.rmtree(run.folder / "cache", ignore_errors=True)
        final = "diverged" if line["final"] is None else f"validation loss {line['final']:.4f}"
        self._line(f"{run.cell.name}: {final}, {line['seconds'] / 60:.1f} min")

    def _cut_last_line(self) -> None:
        path = self.out / RESULTS
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):  # a kill came while it was written
                path.write_bytes(content[: content.rfind(b"\n") + 1])

    def _show(self, waiting: int) -> None:
        if not sys.stderr.isatty():
            return
        done = len(self.results)
        left = ""
        if self.finished_here:
            known = len([1 for _ in self.running]) / 2 + waiting
            here = max(1, done - self._before)
            left = f", about {known * self.finished_here / here / self.at_a_time / 60:.0f} min left for what is known"
        states = "; ".join(run.state() for run in self.running)
        text = f"{done} of {done + len(self.running) + waiting} runs{left}: {states}"
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)

    def _line(self, text: str) -> None:
        print(("\r\033[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process a study."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out {out}: another process works on this study; wait, or name another folder") from None
        yield


def _end_with_parent() -> None:
    """In a new process: it is killed when this one is, whatever way."""
    death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=5)
