#!/usr/bin/env python3
"""Trains a small GPT with SwiGLU, LA and MoA on Python's own source text, and compares the three.

Usage: ``make demo`` or ``python tools/demo.py [--iterations N] [--seed S] [--out DIR] [--quick]``.
Hardware: two CPU cores are enough, no GPU. Duration: about 4 minutes; a slow machine takes longer, and says how long.
Result: a table and a verdict on the screen; ``loss.png``, ``results.json``, logs and checkpoints in ``runs/demo``.

Every step is a command that a user could type, and is shown as such. The trainings' flags are those of a study's arms.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.processes import end_processes, start_process
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.runs.training_log import TrainingLog

PROGRAM = "demo.py"
ROOT = Path(__file__).resolve().parents[1]
MARKER = "demo.json"  # in a folder of the demo, which the next demo may empty
ARMS = {"SwiGLU": "swiglu", "LA": "la-bi-sided", "MoA": "moa-bi-sided"}  # see megatron_moa/research/study/arms.py
LEARNING_RATE = 4e-3  # SwiGLU's best of 2e-3, 4e-3 and 8e-3 at 240 iterations
DIVERGED = 17  # exit_codes.EXIT_NOT_FINITE: training has stopped at a NaN
PAUSE = 0.5  # seconds between two looks at the processes
LIVE = sys.stderr.isatty()


@dataclass(frozen=True)
class Settings:
    """Sizes of the text (files of Python's library), the model (a study's Size) and the trainings."""

    files: str
    vocabulary: int
    model: dict[str, int]
    iterations: int


# ffn is 8/3 of hidden, as usual for gated layers, rounded up to a multiple of 32.
SMALL = {"layers": 4, "hidden": 128, "ffn": 352, "heads": 4, "sequence": 128, "batch": 16}
TINY = {"layers": 2, "hidden": 32, "ffn": 96, "heads": 2, "sequence": 64, "batch": 4}
FULL = Settings("**/*.py", 2048, SMALL, iterations=150)
QUICK = Settings("asyncio/*.py", 512, TINY, iterations=12)


@dataclass
class Command:
    """A command, the log of all it prints, and its process once it has been started."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen | None = None
    started: float = 0.0
    ended: float | None = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.ended is None

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def start(self, environment: dict[str, str]) -> None:
        """Starts the command in the project's folder and in a process group of its own."""
        self.log.parent.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        with self.log.open("w") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = start_process(self.command, cwd=ROOT, env=environment, **streams)
        self.started = time.monotonic()

    def check(self) -> None:
        """Notes when the process has ended; leaves with exit code 1 if it failed. To diverge is not to fail."""
        if not self.is_running or (code := self.process.poll()) is None:
            return
        if code not in (0, DIVERGED):
            end = "".join(f"    {line}\n" for line in self.log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(
                f"{PROGRAM}: error: exit code {code} of\n  $ {typed(self.command)}\n{self.log} ends:\n{end}"
            )
        self.ended = time.monotonic()


def run_all(runs: Sequence[Command], at_a_time: int, show: Callable[[], object], **environment: str) -> None:
    """Runs commands, so many at a time, and calls ``show`` now and then; none outlives an error or Ctrl-C."""
    try:
        while any(run.ended is None for run in runs):
            for run in [run for run in runs if run.process is None][: at_a_time - sum(r.is_running for r in runs)]:
                run.start(environment)
            time.sleep(PAUSE)
            for run in runs:
                run.check()
            show()
    finally:
        end_processes([run.process for run in runs if run.is_running])


def step(title: str, tool: str, flags: Sequence[object], log: Path) -> str:
    """Shows and runs a command of tools/; what it printed."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, flags)]
    print(f"\n{title}\n  $ {typed(command)}", flush=True)
    with tqdm(bar_format="  {elapsed}", leave=False, disable=not LIVE) as clock:
        run_all([Command(tool, command, log)], 1, clock.refresh)
    return log.read_text(errors="replace")


def words_by_flag(command: Sequence[str]) -> list[str]:
    """A command as one would type it in the project's folder, each flag with its values."""
    return re.split(r" (?=--)", shlex.join(command).replace(f"{ROOT}{os.sep}", ""))


def typed(command: Sequence[str]) -> str:
    """A command as one would type it, in lines that tear no flag from its values."""
    tied = " ".join(words.replace(" ", "\0") for words in words_by_flag(command))
    lines = textwrap.wrap(tied, 110, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(lines).replace("\0", " ")


def prepare_folder(out: Path) -> None:
    """Empties the demo's folder. Raises UserError for one that has files but is not the demo's."""
    try:
        if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: holds what is not the demo's; name a new or an empty folder")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror}); name another folder") from None


def make_data(settings: Settings, out: Path) -> None:
    """Makes the tokenizer and the dataset.

    Documents are shuffled, or else the validation set would be a corner of the library.
    """
    from megatron_moa.research.study.corpora import LEFT_OUT

    text = ["--input", sysconfig.get_paths()["stdlib"], "--glob", settings.files, "--exclude", *LEFT_OUT]
    flags = [*text, "--vocab-size", settings.vocabulary, "--output", out / "tokenizer"]
    step("[1/6] A tokenizer, from the text of Python's own library", "train_tokenizer.py", flags, out / "tokenizer.log")
    flags = [*text, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", out / "tokenizer.model"]
    flags += ["--shuffle-documents", 0, "--output-prefix", out / "data"]
    step("[2/6] The text as a dataset of token numbers", "preprocess_data.py", flags, out / "dataset.log")


def trainings(settings: Settings, out: Path, seed: int) -> list[Command]:
    """The three trainings; their commands differ in the layer's flags and in folders alone."""
    from megatron_moa.research.study.arms import Size
    from megatron_moa.research.study.corpora import Corpus
    from megatron_moa.research.study.grid import Cell, Study
    from megatron_moa.research.study.runner import command

    size = Size("demo", **settings.model, gate_init_std=0.02)  # as the paper and by default
    study = Study({size.name: size}, corpora={}, grids=(), evaluation=24, warmup=0.1)
    tokens = settings.iterations * size.sequence * size.batch
    runs = []
    for name, arm in ARMS.items():
        folder = out / name.lower()
        words = [sys.executable, str(ROOT / "pretrain_gpt_moa.py")]
        words += command(study, Cell("python", size.name, tokens, "adamw", "cosine", arm, LEARNING_RATE, seed))
        words += Corpus(out / "data", out / "tokenizer.model").flags()
        words += ["--save", str(folder), "--save-interval", str(settings.iterations)]
        words += ["--data-cache-path", str(folder / "cache")]  # one each: runs at a time would write the same files
        runs.append(Command(name, words, folder / "train.log"))
    return runs


def train(runs: Sequence[Command], iterations: int) -> None:
    """Runs the trainings, with a bar on a terminal, elsewhere a line every half minute."""
    # A run has a core of its own: so small a model gains little from a second one, and times can be compared.
    cores = len(os.sched_getaffinity(0))
    at_a_time = min(len(runs), cores)
    # PASSIVE: threads that wait by spinning made steps several times slower when other work kept the cores busy.
    environment = {"OMP_NUM_THREADS": str(max(1, min(4, cores // at_a_time))), "OMP_WAIT_POLICY": "PASSIVE"}
    print(f"\n[3/6] Three trainings of {iterations} iterations, {at_a_time} at a time; {runs[0].name}'s command:")
    print("  $", *(f"{name}={value}" for name, value in environment.items()), f"\\\n      {typed(runs[0].command)}")
    first, *others = (words_by_flag(run.command) for run in runs)
    for run, words in zip(runs[1:], others, strict=True):
        print(f"  {run.name}'s has {' '.join(word for word in words if word not in first)}", flush=True)
    form = "  {bar:10} {elapsed}{postfix}" if LIVE else "  {elapsed}{postfix}\n"
    total, interval = len(runs) * iterations, PAUSE if LIVE else 30
    with tqdm(total=total, bar_format=form, leave=False, mininterval=interval, miniters=0) as bar:

        def show() -> None:
            logs = {run.name: TrainingLog.read(run.log) for run in runs if run.process is not None}
            last = {name: log.iterations[-1] for name, log in logs.items() if log.iterations}
            left = seconds_left(runs, logs, at_a_time)
            state = [] if left is None else [f"about {left / 60:.1f} min left"]
            state += [f"{name} {line.iteration} loss {line.loss or math.nan:.2f}" for name, line in last.items()]
            bar.n = sum(line.iteration for line in last.values())
            bar.set_postfix_str(", ".join(state), refresh=False)
            bar.update(0)

        run_all(runs[::-1], at_a_time, show, **environment)  # the mixtures first: the shortest fills what is left


def seconds_left(runs: Sequence[Command], logs: dict[str, TrainingLog], at_a_time: int) -> float | None:
    """How long the trainings will take; None until as many as run at a time are a tenth through."""
    rest: dict[str, float] = {}
    for run in runs:
        last = logs[run.name].iterations[-1:] if run.process is not None else []
        if last and last[0].iteration >= last[0].total / 10:
            todo = 0 if run.ended else last[0].total - last[0].iteration
            rest[run.name] = todo * logs[run.name].milliseconds / 1000
    if len(rest) < at_a_time:
        return None
    longest = max(run.seconds + rest[run.name] for run in runs if run.name in rest)
    ends = sorted(rest.get(run.name, max(0.0, longest - run.seconds)) for run in runs if run.is_running) or [0.0]
    for _ in [run for run in runs if run.process is None]:
        ends = sorted([*ends[1:], ends[0] + longest])
    return ends[-1]


def verdict(logs: dict[str, TrainingLog]) -> str:
    """LA and MoA beside SwiGLU, whoever is ahead; a run that diverged is beside nothing."""
    base, lines = logs["SwiGLU"], []
    for name, log in list(logs.items())[1:]:
        difference = log.final_validation - base.final_validation
        if math.isfinite(difference):
            text = f"{abs(difference):.4f} nats per token {'lower' if difference < 0 else 'higher'} than SwiGLU, with "
            text += f"{log.parameters / base.parameters - 1:.2%} more parameters and "
            text += f"{log.milliseconds / base.milliseconds:.2f}x the time per iteration"
        else:
            text = f"not compared, since {name if math.isfinite(base.final_validation) else 'SwiGLU'} diverged"
        lines.append(f"{name}: {text}")
    lines.append("One seed, one learning rate, a tiny model and a short run: a hint and no more; see docs/evidence.md.")
    return "\n".join(lines)


def save_results(logs: dict[str, TrainingLog], settings: Settings, seed: int, file: Path) -> None:
    """Writes all figures as JSON; what is NaN or infinite is null there."""
    keys = ("arm", "parameters", "validation_loss", "ms_per_iteration", "curve")
    curves = {name: [(line.iteration, line.loss) for line in log.iterations] for name, log in logs.items()}
    rows = [(n, log.parameters, log.final_validation, log.milliseconds, curves[n]) for n, log in logs.items()]
    runs = [dict(zip(keys, row, strict=True)) for row in rows]
    content = {"seed": seed, "learning_rate": LEARNING_RATE, **asdict(settings), "runs": runs}
    file.write_text(re.sub(r"\bNaN\b|-?\bInfinity\b", "null", json.dumps(content, indent=2)) + "\n")


def report(runs: Sequence[Command], logs: dict[str, TrainingLog], out: Path) -> None:
    """Shows table and verdict, draws the losses, and lets MoA write a text unless it diverged."""
    print(step("[4/6] The table; mixing none is SwiGLU", "tabulate_runs.py", [out], out / "table.log"))
    print(verdict(logs))
    losses = {name: [line.loss for line in log.iterations if line.loss is not None] for name, log in logs.items()}
    drawn = {run.name: run.log.parent for run in runs if any(map(math.isfinite, losses[run.name]))}
    if drawn:
        flags = [*drawn.values(), "--labels", *drawn, "--smooth", 0.05, "--output", out / "plots"]
        flags += ["--baseline", drawn["SwiGLU"]] if "SwiGLU" in drawn and len(drawn) > 1 else []
        step("[5/6] Pictures; loss.png is a copy of plots/loss-tokens.png", "plot_runs.py", flags, out / "plots.log")
        shutil.copy(out / "plots" / "loss-tokens.png", out / "loss.png")
    if math.isfinite(logs["MoA"].final_validation):
        flags = ["--load", out / "moa", "--prompt", "def ", "--num-tokens", 80, "--temperature", 0.8]
        text = step("[6/6] Text that the MoA model writes", "generate.py", flags, out / "text.log")
        print(text.partition("--- sample ---\n")[2])  # behind Megatron's log
    else:
        print("\n[6/6] MoA diverged, and there is no model to write a text.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the steps; exit code 1 if one fails, 2 for a wrong flag, 130 after Ctrl-C or SIGTERM."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=positive, metavar="N", help=f"of a training; default: {FULL.iterations}")
    parser.add_argument("--seed", type=positive, default=1234, metavar="S", help="of weights and data order")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", metavar="DIR", help="is emptied first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it works, not what it shows")
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    settings = replace(settings, iterations=options.iterations or settings.iterations)
    out, start = options.out.resolve(), time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with one_line_errors(PROGRAM, f"all that it started is ended; logs are in {out}"):
        prepare_folder(out)
        print("SwiGLU, LA and MoA in the same small GPT: about 4 minutes on 2 cores.")
        make_data(settings, out)
        runs = trainings(settings, out, options.seed)
        train(runs, settings.iterations)
        logs = {run.name: TrainingLog.read(run.log) for run in runs}
        save_results(logs, settings, options.seed, out / "results.json")
        report(runs, logs, out)
    print(f"\nIn {(time.monotonic() - start) / 60:.1f} min. Pictures, results.json, logs and checkpoints: {out}")


if __name__ == "__main__":
    main()
