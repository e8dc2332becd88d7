#!/usr/bin/env python3
"""Trains the same small GPT with SwiGLU, LA and MoA on Python's own source text and compares them; no GPU needed.

Usage: ``make demo`` or ``python tools/demo.py [--iterations N] [--minutes M] [--seed S] [--out DIR] [--quick]``.
Hardware: two CPU cores are enough. Duration: 5 to 8 minutes; a slow machine gets fewer iterations, and is told so.
Result: a table on the screen, ``results.json``, ``loss.png``, one log a run and checkpoints, all in ``runs/demo``.

Every step is a command that a user could type: tools/train_tokenizer.py, tools/preprocess_data.py, pretrain_gpt_moa.py
and tools/generate.py run as processes of their own, and what is shown is read from Megatron's log.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_moa.runs.training_log import TrainingLog

ROOT = Path(__file__).resolve().parents[1]
MARKER = "demo.json"  # tells a folder of ours, which a rerun may empty, from any other

# Not in the text: Python's tests, installed packages, tables of data.
LEFT_OUT = ["test/*", "*/test*/*", "*/idle_test/*", "*-packages/*", "encodings/*", "pydoc_data/*"]


@dataclass(frozen=True)
class Settings:
    """Sizes of the text, the model and the runs."""

    files: str = "**/*.py"  # of Python's library
    vocabulary: int = 2048
    layers: int = 4
    hidden: int = 128
    # Megatron's 0.02 suits widths near 1000; times sqrt(1024 / 128), pre-activations start as large as there. It would
    # handicap SwiGLU, whose output is the smallest at the start.
    init_std: float = 0.06
    ffn: int = 352  # 8/3 h, the usual width for a gated layer, rounded up to a multiple of 32
    heads: int = 4
    sequence: int = 128
    batch: int = 16
    iterations: int = 240
    learning_rate: float = 4e-3  # SwiGLU's best of 2e-3, 4e-3 and 8e-3 here
    log_interval: int = 5
    eval_iterations: int = 24
    tokens_to_generate: int = 80
    second_rate: bool = True  # the arms once more at 1.5 times the learning rate, if there is time

    @property
    def tokens_per_iteration(self) -> int:
        return self.sequence * self.batch


QUICK = Settings(
    files="asyncio/*.py",
    vocabulary=512,
    layers=2,
    hidden=32,
    ffn=96,
    heads=2,
    sequence=64,
    batch=4,
    iterations=12,
    log_interval=2,
    eval_iterations=2,
    tokens_to_generate=8,
    second_rate=False,
)


# What a mixture may take beyond SwiGLU, the one whose speed is measured: seconds to compile, and time per iteration.
MIXTURE_EXTRA = 25.0
MIXTURE_FACTOR = 1.3


@dataclass(frozen=True)
class Arm:
    """One training run: a mixing and a multiple of the base learning rate."""

    mixing: str
    factor: float

    @property
    def label(self) -> str:
        return {"none": "SwiGLU", "la": "LA", "moa": "MoA"}[self.mixing]

    @property
    def name(self) -> str:
        """For files: ``moa-1x``, ``moa-1.5x``."""
        return f"{self.label.lower()}-{self.factor:g}x"


FIRST_ARMS = tuple(Arm(mixing, 1.0) for mixing in ("none", "la", "moa"))
# All three again, so that each has had the same number of tries when the best line of each is compared.
SECOND_ARMS = tuple(Arm(mixing, 1.5) for mixing in ("none", "la", "moa"))


@dataclass
class Result:
    """A run and what its log said."""

    arm: Arm
    learning_rate: float
    log: TrainingLog = field(default_factory=TrainingLog)
    seconds: float = 0.0
    startup: float = 0.0  # until the first line of the training log

    @property
    def title(self) -> str:
        return f"{self.arm.label:<6} lr {self.learning_rate:.1e}"


class DemoError(RuntimeError):
    """A step that failed; its text is for the screen."""


class TooSlow(Exception):
    """Raised while the first arms run when they would not fit the time."""

    def __init__(self, startup: float, seconds_per_iteration: float) -> None:
        super().__init__(startup, seconds_per_iteration)
        self.startup = startup
        self.seconds_per_iteration = seconds_per_iteration


class Screen:
    """Progress: one line that is rewritten on a terminal, and now and then a whole line elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()

    def update(self, text: str) -> None:
        """Shows ``text`` for the moment, on a terminal only."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:<{width}}", end="", flush=True)

    def line(self, text: str = "") -> None:
        """Prints ``text`` for good, over what ``update`` showed."""
        if self.live:
            print("\r\033[K", end="")
        print(text, flush=True)


def elapsed(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def shown_path(path: Path) -> str:
    """``path`` as one would type it in the project's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shown(command: list[str]) -> str:
    """``command`` as one would type it in the project's folder, a flag and its values never torn apart."""
    groups: list[str] = []
    for word in command:
        quoted = shlex.quote(word.replace(f"{ROOT}{os.sep}", ""))
        if word.startswith("--") or not groups:
            groups.append(quoted)
        else:
            groups[-1] += f" {quoted}"
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) < 105:
            lines[-1] += f" {group}"
        else:
            lines.append(group)
    return " \\\n        ".join(lines)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def output_lines(
    command: list[str], log: Path, threads: int | None = None, only_stdout: bool = False
) -> Iterator[str | None]:
    """Runs ``command`` in the project's folder and yields its lines, and None once a second when it is silent.

    Everything it prints goes to ``log``; with ``only_stdout`` standard output is yielded and the rest goes to ``log``.
    Raises :class:`DemoError` with the log's last lines if it fails. If the generator is closed early (Ctrl-C included),
    the process and what it started are ended.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if threads:
        # PASSIVE: threads that wait by spinning made steps several times slower when other work kept the cores busy.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **environment, "OMP_NUM_THREADS": str(threads)}
    lines: queue.Queue[str | None] = queue.Queue()

    def read(process: subprocess.Popen) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file if only_stdout else subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=read, args=(process,), daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    yield None
                    continue
                if line is None:
                    break
                if not only_stdout:
                    file.write(line)
                    file.flush()
                yield line.rstrip("\n")
            process.wait()
        finally:
            end(process)
    if process.returncode != 0:
        raise DemoError(
            f"this command ended with exit code {process.returncode}:\n    {shown(command)}\n"
            f"The last lines of {shown_path(log)}:\n{last_lines(log)}"
        )


def end(process: subprocess.Popen) -> None:
    """Ends a process that still runs, and those it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=5)


def last_lines(log: Path, count: int = 20) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-count:])


class Demo:
    """The steps of the demo, in the order of the methods."""

    def __init__(self, settings: Settings, out: Path, seed: int, minutes: float) -> None:
        self.settings = settings
        self.out = out
        self.seed = seed
        self.budget = minutes * 60
        self.screen = Screen()
        self.start = time.monotonic()
        self.stop = threading.Event()
        # One thread a run and several runs at a time do more in all than one run after the other on all cores: a model
        # this small gains far less than twofold from a second thread. All arms share the machine in the same way.
        self.at_a_time = min(len(FIRST_ARMS), usable_cores())
        self.threads = max(1, min(4, usable_cores() // self.at_a_time))

    def spent(self) -> float:
        return time.monotonic() - self.start

    def prepare_folder(self) -> None:
        """An empty folder; one with files that are not the demo's is left alone."""
        if self.out.is_dir() and any(self.out.iterdir()):
            if not (self.out / MARKER).is_file():
                raise DemoError(f"--out {shown_path(self.out)} has files that are not ours; name an empty folder")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")

    def step(self, title: str, command: list[str], log: Path, only_stdout: bool = False) -> list[str]:
        """Runs one of the short tools with a running clock; returns what it printed."""
        start = time.monotonic()
        self.screen.line(f"{title}\n  $ {shown(command)}")
        printed = []
        for line in output_lines(command, log, only_stdout=only_stdout):
            printed += [] if line is None else [line]
            self.screen.update(f"  {elapsed(time.monotonic() - start)}")
        return printed

    def text(self) -> list[str]:
        """The flags that name the text: Python's own library."""
        library = sysconfig.get_paths()["stdlib"]
        return ["--input", library, "--glob", self.settings.files, "--exclude", *LEFT_OUT]

    def tokenizer(self) -> list[str]:
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.out / "tokenizer.model")]

    def make_data(self) -> None:
        """Tokenizer and dataset. Documents are shuffled: the validation set is the end of the dataset, and would
        otherwise be one corner of the library. Their order is the same for every seed.
        """
        tokenizer = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *self.text()]
        tokenizer += ["--vocab-size", str(self.settings.vocabulary), "--output", str(self.out / "tokenizer")]
        title = f"[1/4] A tokenizer of {self.settings.vocabulary} words, from the source text of Python's own library"
        self.step(title, tokenizer, self.out / "tokenizer.log")

        dataset = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *self.text(), *self.tokenizer()]
        dataset += ["--shuffle-documents", "0", "--output-prefix", str(self.out / "data")]
        printed = self.step("[2/4] The text as a dataset of token numbers", dataset, self.out / "dataset.log")
        counts = dict(line.split(None, 1) for line in printed if line.startswith(("documents", "tokens")))
        self.screen.line(f"  {counts.get('documents', '?')} documents, {counts.get('tokens', '?')} tokens\n")

    def command(self, arm: Arm) -> list[str]:
        """The pretraining command; arms differ in --moa-mixing, the learning rates and their folders alone."""
        s = self.settings
        rate = s.learning_rate * arm.factor
        flags = {
            "--num-layers": s.layers,
            "--hidden-size": s.hidden,
            "--ffn-hidden-size": s.ffn,
            "--num-attention-heads": s.heads,
            "--seq-length": s.sequence,
            "--max-position-embeddings": s.sequence,
            "--position-embedding-type": "rope",
            "--normalization": "RMSNorm",
            "--init-method-std": s.init_std,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
            "--data-path": self.out / "data",
            "--split": "95,5,0",
            "--seed": self.seed,
            "--micro-batch-size": s.batch,
            "--global-batch-size": s.batch,
            "--train-iters": s.iterations,
            "--lr-decay-style": "cosine",
            "--lr-warmup-iters": max(1, s.iterations // 10),
            "--weight-decay": 0.1,
            "--adam-beta1": 0.9,
            "--adam-beta2": 0.95,
            "--clip-grad": 1.0,
            "--log-interval": s.log_interval,
            "--eval-interval": s.iterations + 1,  # only the evaluation after the last iteration
            "--eval-iters": s.eval_iterations,
            "--save-interval": s.iterations,
            "--lr": f"{rate:g}",
            "--min-lr": f"{rate / 10:g}",
            "--save": self.checkpoint(arm),
            "--data-cache-path": self.out / arm.name / "cache",  # one each: runs at a time would write the same files
            "--moa-mixing": arm.mixing,
        }
        words = [sys.executable, str(ROOT / "pretrain_gpt_moa.py"), "--swiglu", "--disable-bias-linear"]
        words += ["--untie-embeddings-and-output-weights", *self.tokenizer()]
        return words + [str(word) for pair in flags.items() for word in pair]

    def checkpoint(self, arm: Arm) -> Path:
        return self.out / arm.name / "checkpoints"

    def train(self, result: Result) -> None:
        """One run, in a thread of its own; ``result`` is filled as it goes. Ends early if ``self.stop`` is set."""
        log = self.out / result.arm.name / "log.txt"
        log.parent.mkdir()
        start = time.monotonic()
        with contextlib.closing(output_lines(self.command(result.arm), log, self.threads)) as lines:
            for line in lines:
                if self.stop.is_set():
                    return
                if line is not None and result.log.read_line(line) is not None and not result.startup:
                    result.startup = time.monotonic() - start
        result.seconds = time.monotonic() - start
        if not result.log.validation:
            raise DemoError(f"{shown_path(log)} has no validation loss; its last lines:\n{last_lines(log)}")

    def train_all(self) -> list[Result]:
        """All runs, or as many as the time allows, in the order of the arms."""
        s = self.settings
        first = f"OMP_NUM_THREADS={self.threads} {shown(self.command(FIRST_ARMS[0]))}"
        self.screen.line(
            f"[3/4] Training: {s.layers} layers, hidden size {s.hidden}, {s.iterations} iterations of "
            f"{s.tokens_per_iteration} tokens, AdamW, cosine schedule.\n"
            f"  {self.at_a_time} runs at a time, {self.threads} thread(s) each; same seed, data order and sizes; "
            f"for SwiGLU:\n  $ {first}"
        )
        try:
            return self.run_arms(calibrate=True)
        except TooSlow as slow:
            self.shorten(slow)
            return self.run_arms(calibrate=False)

    def run_arms(self, calibrate: bool) -> list[Result]:
        """Keeps ``self.at_a_time`` runs going; with ``calibrate`` it may raise :class:`TooSlow` early on."""
        waiting = list(FIRST_ARMS)
        second = list(SECOND_ARMS) if self.settings.second_rate else []
        results: list[Result] = []
        running: dict[Future[None], Result] = {}
        shown_until: dict[Arm, int] = {}
        self.stop.clear()
        with ThreadPoolExecutor(self.at_a_time) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.at_a_time:
                        results.append(Result(waiting[0], self.settings.learning_rate * waiting.pop(0).factor))
                        running[pool.submit(self.train, results[-1])] = results[-1]
                    done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    self.show(list(running.values()), shown_until)
                    for future in done:
                        result = running.pop(future)
                        future.result()
                        self.screen.line(
                            f"  {result.title}   validation loss {result.log.final_validation:.4f}, "
                            f"{result.log.milliseconds:.0f} ms an iteration, {elapsed(result.seconds)}"
                        )
                    if calibrate:
                        calibrate = self.check_speed(results[0])
                    if done and second and not waiting:
                        waiting, second = self.with_time_for(second, list(running.values()), results), []
            except BaseException:
                self.stop.set()
                raise
        return results

    def show(self, running: list[Result], shown_until: dict[Arm, int]) -> None:
        """The state of the runs: a line that is rewritten, or (not on a terminal) a line every quarter of a run."""
        total = self.settings.iterations
        states = []
        left = 0.0
        for result in running:
            state = f"{result.arm.label} {result.learning_rate:g}"
            if not result.log.iterations:
                states.append(f"{state} starting")
                continue
            step = result.log.iterations[-1]
            loss = math.nan if step.loss is None else step.loss
            states.append(f"{state} {step.iteration}/{total} loss {loss:.2f}")
            left = max(left, (total - step.iteration) * result.log.milliseconds / 1000)
            if not self.screen.live and step.iteration - shown_until.get(result.arm, 0) >= total / 4:
                shown_until[result.arm] = step.iteration
                self.screen.line(
                    f"  {result.title}   iteration {step.iteration}/{total}, loss {loss:.3f}, "
                    f"{elapsed(self.spent())} since the start"
                )
        estimate = f", {elapsed(left)} left for" if left else ""
        self.screen.update(f"  {elapsed(self.spent())}{estimate}: {'; '.join(states)}")

    def check_speed(self, first: Result) -> bool:
        """Whether the speed is still unknown; raises :class:`TooSlow` once it is known to be too low."""
        total = self.settings.iterations
        if not first.log.iterations or first.log.iterations[-1].iteration < max(20, total // 10):
            return True
        rounds = math.ceil(len(FIRST_ARMS) / self.at_a_time)
        run = first.startup + MIXTURE_EXTRA + total * first.log.milliseconds / 1000 * MIXTURE_FACTOR
        if self.spent() - first.startup + rounds * run > self.budget:
            raise TooSlow(first.startup, first.log.milliseconds / 1000)
        return False

    def with_time_for(self, second: list[Arm], running: list[Result], results: list[Result]) -> list[Arm]:
        """``second`` if all of it fits the time that is left, else nothing: then each arm had the same tries."""
        longest = max(result.seconds for result in results) * 1.1
        needed = math.ceil((len(running) + len(second)) / self.at_a_time) * longest + 15
        left = self.budget - self.spent()
        if needed <= left:
            return second
        self.screen.line(
            f"  The runs at 1.5 times the learning rate are left out: they need about {elapsed(needed)}, and "
            f"{elapsed(left)} of --minutes {self.budget / 60:g} are left."
        )
        return []

    def shorten(self, slow: TooSlow) -> None:
        """Fewer iterations, so that the first arms fit; the schedule is cut as well, so they start anew."""
        rounds = math.ceil(len(FIRST_ARMS) / self.at_a_time)
        seconds = (self.budget - self.spent()) / rounds - slow.startup - MIXTURE_EXTRA
        fewer = int(seconds / (slow.seconds_per_iteration * MIXTURE_FACTOR)) // 10 * 10
        fewer = max(40, min(fewer, self.settings.iterations))
        self.screen.line(
            f"  This machine needs {slow.seconds_per_iteration * 1000:.0f} ms an iteration at present, so that "
            f"{self.settings.iterations} do not fit into --minutes {self.budget / 60:g}: starting anew with {fewer}."
        )
        for arm in FIRST_ARMS:
            shutil.rmtree(self.out / arm.name, ignore_errors=True)
        self.settings = replace(self.settings, iterations=fewer, second_rate=False)

    def generate(self, results: list[Result]) -> str:
        """Text from the better MoA model."""
        best = best_of(results, "moa")
        command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--load", str(self.checkpoint(best.arm))]
        command += [*self.tokenizer(), "--prompt", "def ", "--num-tokens", str(self.settings.tokens_to_generate)]
        command += ["--temperature", "0.8", "--seed", "1"]
        title, log = "[4/4] Text that the MoA model writes", self.out / "generate.log"
        return "\n".join(self.step(title, command, log, only_stdout=True))


def best_of(results: list[Result], mixing: str) -> Result:
    """The run of one arm with the lowest validation loss; one that diverged to NaN counts as the worst."""

    def order(result: Result) -> float:
        return math.inf if math.isnan(result.log.final_validation) else result.log.final_validation

    return min((r for r in results if r.arm.mixing == mixing), key=order)


def table(results: list[Result]) -> str:
    """The runs as a text table; the last column compares with SwiGLU at the same learning rate."""
    swiglu = {r.arm.factor: r.log.final_validation for r in results if r.arm.mixing == "none"}
    rows = [("arm", "learning rate", "parameters", "validation loss", "ms per iteration", "to SwiGLU, same rate")]
    for r in results:
        same_rate = swiglu.get(r.arm.factor)
        difference = "" if r.arm.mixing == "none" or same_rate is None else f"{r.log.final_validation - same_rate:+.4f}"
        parameters = "?" if r.log.parameters is None else f"{r.log.parameters:,}"
        rows.append(
            (
                r.arm.label,
                f"{r.learning_rate:.1e}",
                parameters,
                f"{r.log.final_validation:.4f}",
                f"{r.log.milliseconds:.0f}",
                difference,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def verdict(results: list[Result]) -> str:
    """The best run of each arm and the distance to SwiGLU's best, whoever is ahead."""
    best = {mixing: best_of(results, mixing) for mixing in ("none", "la", "moa")}
    reference = best["none"].log.final_validation
    lines = ["Best of each (nats per token, lower is better):"]
    for run in best.values():
        text = f"  {run.arm.label:<6} {run.log.final_validation:.4f} at learning rate {run.learning_rate:.1e}"
        if run.arm.mixing != "none":
            difference = run.log.final_validation - reference
            side = "lower" if difference < 0 else "higher"
            time_ratio = run.log.milliseconds / best["none"].log.milliseconds
            text += f", {abs(difference):.4f} {side} than SwiGLU's, {time_ratio:.2f}x its time per iteration"
        lines.append(text)
    tries = len({r.arm.factor for r in results})
    lines.append(
        f"One seed, {'two learning rates' if tries == 2 else 'one learning rate'}, a tiny model and a short run: "
        "a hint and no more. Times move with whatever else the machine does."
    )
    return "\n".join(lines)


def save_results(results: list[Result], settings: Settings, seed: int, target: Path) -> None:
    """All figures as JSON."""
    runs = [
        {
            "arm": r.arm.label,
            "learning_rate": r.learning_rate,
            "parameters": r.log.parameters,
            "validation_loss": r.log.final_validation,
            "ms_per_iteration": r.log.milliseconds,
            "seconds": round(r.seconds, 1),
            "curve": [[step.iteration, step.loss] for step in r.log.iterations],
        }
        for r in results
    ]
    content = {"seed": seed, "settings": asdict(settings), "runs": runs}
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def smooth(values: list[float], window: int = 5) -> list[float]:
    """Mean of each value and up to ``window - 1`` before it."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def plot(results: list[Result], settings: Settings, target: Path) -> None:
    """Two panels: the training loss of every run, and its distance to SwiGLU at the same rate and iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"none": "#555555", "la": "#d9731a", "moa": "#1f5fb4"}
    curves = {
        r.arm: [(step.iteration, step.loss) for step in r.log.iterations if step.loss is not None] for r in results
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    lowest = math.inf
    for r in results:
        points = curves[r.arm]
        if not points:
            continue
        style = {"color": colours[r.arm.mixing], "linestyle": "-" if r.arm.factor == 1 else "--", "linewidth": 1.5}
        iterations, losses = [p[0] for p in points], smooth([p[1] for p in points])
        label = f"{r.arm.label}, learning rate {r.learning_rate:.1e}"
        left.plot(iterations, losses, label=label, **style)
        left.plot(iterations[-1], r.log.final_validation, marker="o", color=style["color"], markersize=5)
        lowest = min(lowest, *losses, r.log.final_validation)
        baseline = dict(curves.get(Arm("none", r.arm.factor), []))
        shared = [(i, loss - baseline[i]) for i, loss in points if i in baseline]
        if r.arm.mixing != "none" and shared:
            right.plot([i for i, _ in shared], smooth([d for _, d in shared]), label=label, **style)
    step = f"iteration (of {settings.tokens_per_iteration:,} tokens)"
    left.plot([], [], marker="o", color="black", linestyle="", label="validation loss at the end")
    left.set(xlabel=step, ylabel="training loss (nats per token)", title="Training loss, mean of 5 log lines")
    if math.isfinite(lowest):
        left.set_ylim(lowest - 0.1, lowest + 2.5)
    right.axhline(0, color=colours["none"], linewidth=1)
    right.set(
        xlabel=step,
        ylabel="difference (nats per token), below 0: lower than SwiGLU",
        title="Training loss minus SwiGLU's at the same learning rate",
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, help=f"length of each run (default {Settings().iterations})")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for everything (default 7)")
    parser.add_argument("--seed", type=int, default=1234, help="of the model's start and the data order (default 1234)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="folder, emptied first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not what it shows")
    options = parser.parse_args(arguments)
    if options.iterations is not None and options.iterations < 1:
        parser.error(f"--iterations {options.iterations} must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    settings = QUICK if options.quick else Settings()
    if options.iterations is not None:
        settings = replace(settings, iterations=options.iterations)
    demo = Demo(settings, options.out.resolve(), options.seed, options.minutes)
    try:
        demo.screen.line(
            "SwiGLU, LA and MoA in the same small GPT, on real text.\n"
            f"Takes up to {options.minutes:g} minutes; everything is written to {shown_path(demo.out)}\n"
        )
        demo.prepare_folder()
        demo.make_data()
        results = demo.train_all()
        save_results(results, demo.settings, options.seed, demo.out / "results.json")
        plot(results, demo.settings, demo.out / "loss.png")
        demo.screen.line(f"\n{table(results)}\n\n{verdict(results)}\n")
        demo.screen.line(f"\n{demo.generate(results)}\n")
        demo.screen.line(
            f"Loss curves: {shown_path(demo.out / 'loss.png')}\n"
            f"Logs, checkpoints, results.json: {shown_path(demo.out)}\n"
            f"Done in {elapsed(demo.spent())}."
        )
    except DemoError as error:
        demo.screen.update("")
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        demo.screen.line("\nInterrupted.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
