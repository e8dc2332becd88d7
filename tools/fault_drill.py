"""Does to small training runs what clusters do to large ones, and sees whether anything is lost.

    python tools/fault_drill.py --kills 20                 # everything, about a quarter of an hour on two cores
    python tools/fault_drill.py --kills 2 --only kill,sigterm

A tiny model (megatron_moa/runs/tiny_model.py) is trained undisturbed once.  The same run is then killed with SIGKILL,
one rank or all, while it starts, computes and saves, and started again each time until it ends; every loss it prints
must be that of the undisturbed run.  Then come single faults: each must be told in the log, end with the expected exit
code, and leave a checkpoint from which the run goes on with the undisturbed run's losses.  The last line says how many
faults did not end so: exit code 0 if it is 'lost 0', 1 if not, 2 for a mistake in the flags.  On GPUs where there are
some.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_moa import startup
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.launch import children
from megatron_moa.megatron_fixes.single_process import free_port
from megatron_moa.runs.tiny_model import SWIGLU, TINY
from megatron_moa.training.exit_codes import EXIT_LOST_RANK, EXIT_NOT_FINITE, EXIT_SAVED_ON_SIGNAL

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "pretrain_gpt_moa.py"
INTERVAL = 4  # iterations between saves
LIMIT = 240  # seconds that anything may take; the timeout of the ranks, one minute, is well within
TRACKER = "latest_checkpointed_iteration.txt"
_POLL = 0.005  # seconds between two looks: a save of the tiny model takes about 100 ms


@dataclass
class Outcome:
    """A row of the table."""

    fault: str
    seen: str
    recovered: str
    lost: bool = False


class NotAsExpected(Exception):
    """What was seen instead; the fault counts as lost."""


def expect(condition: bool, otherwise: str) -> None:
    """Raises NotAsExpected unless the condition holds."""
    if not condition:
        raise NotAsExpected(otherwise)


class Log:
    """What a start of the training has printed so far.

    Args:
        path: the file that all of its processes write to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(errors="replace")

    @property
    def losses(self) -> dict[int, str]:
        """lm loss by iteration as printed, without the second one: Megatron prints the mean of the first two there."""
        lines = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", self.text)
        return {int(iteration): loss for index, (iteration, loss) in enumerate(lines) if index != 1}

    @property
    def iterations(self) -> list[int]:
        """The iterations printed, in their order."""
        return [int(iteration) for iteration in re.findall(r"iteration +(\d+)/", self.text)]

    @property
    def validation_losses(self) -> list[str]:
        """As printed."""
        return re.findall(r"validation loss at .*? lm loss value: (\S+)", self.text)

    @property
    def resumed_at(self) -> int:
        """The iteration of the checkpoint that was loaded; 0 for none."""
        found = re.search(r"successfully loaded checkpoint from .*? at iteration (\d+)", self.text)
        return int(found.group(1)) if found else 0

    def line(self, pattern: str) -> str:
        """The first line that has the pattern.

        Raises:
            NotAsExpected: there is none.
        """
        found = re.search(f"^.*(?:{pattern}).*$", self.text, re.MULTILINE | re.IGNORECASE)
        if found is None:
            raise NotAsExpected(f"no line with '{pattern}' in {self.path}")
        return found.group(0)


class Start:
    """One start of the training: its processes and its log.

    Args:
        commands: one command a process, and what its environment has beside ours.
        log: where all of them write.
    """

    def __init__(self, commands: list[tuple[list[str], dict[str, str]]], log: Path) -> None:
        self.log = Log(log)
        self.began = time.monotonic()
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", **os.environ}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with log.open("wb") as output:
            self.processes = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | own,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command, own in commands
            ]

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The only process started here; the ranks are its children."""
        (process,) = self.processes
        return process

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits until the condition holds.

        Raises:
            NotAsExpected: all processes ended before, or the time is up.
        """
        while not condition():
            if all(process.poll() is not None for process in self.processes) and not condition():
                raise NotAsExpected(f"ended before {what}: {self.end()}")
            if self.seconds > LIMIT:
                raise NotAsExpected(f"{LIMIT} s and not yet {what}: see {self.log.path}")
            time.sleep(_POLL)

    def until_iteration(self, count: int = 1) -> None:
        """Waits until so many iterations have been printed."""
        self.until(lambda: len(self.log.iterations) >= count, f"{count} iterations")

    def wait(self) -> int:
        """The exit code of the first process that has one other than 0, once all have ended.

        Raises:
            NotAsExpected: the time is up.
        """
        self.until(lambda: all(process.poll() is not None for process in self.processes), "ended")
        return next((process.returncode for process in self.processes if process.returncode), 0)

    def end(self) -> str:
        """Exit codes and the last line of the log, for a message."""
        codes = ", ".join(str(process.returncode) for process in self.processes)
        return f"exit code {codes}, {(self.log.text.strip().splitlines() or ['nothing printed'])[-1][:200]}"

    def kill(self) -> None:
        """SIGKILL for whatever is left, with all that the ranks have started: each leads a process group of its own."""
        leaders = [process.pid for process in self.processes]
        for leader in leaders:
            leaders += children(leader)
        for leader in reversed(leaders):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@dataclass
class Drill:
    """What all faults share.

    Attributes:
        folder: of everything written.
        processes: ranks of a training.
        kills: how often the long run is killed.
        draw: for the moments.
    """

    folder: Path
    processes: int
    kills: int
    draw: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    undisturbed: Log | None = None
    start_seconds: float = 0.0
    save_seconds: float = 0.0
    _starts: int = 0

    @property
    def iterations(self) -> int:
        """Of the long run: a kill costs at most two saves' worth."""
        return INTERVAL * (2 * self.kills + 8)

    @contextlib.contextmanager
    def start(
        self, save: Path, *flags: str, launcher: bool = True, script: tuple[str, ...] = (), within: tuple[str, ...] = ()
    ) -> Iterator[Start]:
        """Starts the training; what still runs at the end of the block is killed.

        Args:
            save: where checkpoints are read and written.
            flags: beside those of every run.
            launcher: by megatron_moa.launch; otherwise every rank by itself.
            script: what runs instead of the script, given as its first argument.
            within: a command that runs the rest of its arguments.
        """
        tiny = [flag for flag in TINY if flag != "--mock-data" or "--data-path" not in flags]
        flags = (
            *tiny, *SWIGLU, "--train-iters", str(self.iterations), "--moa-backend", "eager",
            "--eval-iters", "1", "--eval-interval", str(4 * INTERVAL),
            "--save", str(save), "--load", str(save), "--save-interval", str(INTERVAL),
            "--exit-signal-handler", "--distributed-timeout-minutes", "1", *flags,
        )  # fmt: skip
        program = [*script, str(SCRIPT), *flags]
        self._starts += 1
        log = self.folder / "logs" / f"{self._starts:03d}.log"
        if launcher:
            arguments = ["--standalone", "--nproc-per-node", str(self.processes), *program]
            commands = [([*within, sys.executable, "-m", "megatron_moa.launch", *arguments], {})]
        else:
            world = {
                "WORLD_SIZE": str(self.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
            commands = [
                ([sys.executable, "-u", *program], {"RANK": str(rank), "LOCAL_RANK": str(rank), **world})
                for rank in range(self.processes)
            ]
        started = Start(commands, log)
        try:
            yield started
        finally:
            started.kill()

    def run_undisturbed(self) -> None:
        """The run that all others are compared with; its checkpoints are those the single faults begin at."""
        save = self.folder / "undisturbed"
        with self.start(save) as run:
            run.until_iteration()
            self.start_seconds = run.seconds
            run.until(lambda: any(save.glob("iter_*")), "a save began")
            began = time.monotonic()
            run.until((save / TRACKER).exists, "a save ended")
            self.save_seconds = time.monotonic() - began
            if run.wait() != 0 or not run.log.validation_losses:
                raise UserError(f"the undisturbed run failed: {run.end()}; its log is {run.log.path}")
            self.undisturbed = run.log

    def checkpoints(self, name: str) -> Path:
        """A copy of the undisturbed run's first two checkpoints, the second of which is the latest."""
        copy = self.folder / name
        copy.mkdir()
        for iteration in (INTERVAL, 2 * INTERVAL):
            shutil.copytree(self.folder / "undisturbed" / folder_name(iteration), copy / folder_name(iteration))
        (copy / TRACKER).write_text(str(2 * INTERVAL))
        return copy

    def same_losses(self, log: Log) -> None:
        """Raises NotAsExpected for a loss that the undisturbed run did not print for that iteration."""
        expected = self.undisturbed.losses
        for iteration, loss in log.losses.items():
            if iteration in expected:
                expect(
                    loss == expected[iteration],
                    f"loss {loss} instead of {expected[iteration]} at iteration {iteration}: {log.path}",
                )

    def goes_on(self, save: Path, at: int, *flags: str) -> str:
        """Starts again, to two saves further on; says from where.

        Raises:
            NotAsExpected: it fails, begins elsewhere, or computes other losses.
        """
        stop = (at // INTERVAL + 2) * INTERVAL
        with self.start(save, "--exit-interval", str(stop), *flags) as run:
            code = run.wait()
            expect(code == 0, f"the start after it failed: {run.end()}, {run.log.path}")
            expect(run.log.resumed_at == at, f"went on from {run.log.resumed_at}, not from {at}: {run.log.path}")
            self.same_losses(run.log)
            expect(latest(save) == stop, f"no checkpoint of iteration {stop} afterwards: {run.log.path}")
        return f"went on from {at}, same losses"

    def record(self, fault: str, act: Callable[[], tuple[str, str]]) -> bool:
        """Does it and prints its row; whether it ended as expected."""
        began = time.monotonic()
        try:
            seen, recovered = act()
            outcome = Outcome(fault, seen, recovered)
        except NotAsExpected as otherwise:
            outcome = Outcome(fault, str(otherwise), "LOST", lost=True)
        outcome.seen += f" ({time.monotonic() - began:.0f} s)"
        self.outcomes.append(outcome)
        print(f"| {outcome.fault} | {outcome.seen} | {outcome.recovered} |", flush=True)
        return not outcome.lost

    def kill_repeatedly(self) -> None:
        """kill -9 at random moments of one long run, until it has ended."""
        save = self.folder / "killed"
        # Half of them in saves, the rest over start-up and computing; in a random order.
        phases = [("save", "start", "save", "step")[index % 4] for index in range(self.kills)]
        self.draw.shuffle(phases)
        for number, phase in enumerate(phases, 1):
            whom = self.draw.choice(("one rank", "all ranks"))
            fault = f"kill -9 {number}: {whom}, {_PHASES[phase]}"
            self.record(fault, lambda phase=phase, whom=whom: self._kill_once(save, phase, whom))
        self.record("the killed run's end", lambda: self._finish(save))

    def _kill_once(self, save: Path, phase: str, whom: str) -> tuple[str, str]:
        before = latest(save)
        folders = {folder: changed(folder) for folder in save.glob("iter_*")}  # some left by a save that was cut short
        with self.start(save) as run:
            if phase == "start":
                moment = self.draw.uniform(0, 0.9 * self.start_seconds)
                run.until(lambda: run.seconds > moment or bool(run.log.iterations), "started")
            elif phase == "step":
                run.until_iteration(self.draw.randint(1, 2 * INTERVAL))
                time.sleep(self.draw.uniform(0, 0.1))
            else:
                run.until(lambda: bool(touched(save, folders)), "a save")
                time.sleep(self.draw.uniform(0, 0.9 * self.save_seconds))
            expect(run.launcher.poll() is None, f"ended by itself: {run.end()}")
            victims = children(run.launcher.pid)
            if whom == "all ranks" or not victims:
                run.kill()
            else:
                os.kill(self.draw.choice(victims), signal.SIGKILL)
                killed = time.monotonic()
                code = run.wait()
                expect(code != 0, "the others ended with exit code 0")
                whom = f"the others left within {time.monotonic() - killed:.0f} s, exit code {code}"
            reached = max([before, *run.log.iterations])
            if run.log.iterations:
                expect(run.log.resumed_at == before, f"began at {run.log.resumed_at}, not at {before}: {run.log.path}")
            self.same_losses(run.log)
        kept = latest(save)
        cut = any(int(folder.name.removeprefix("iter_")) > kept for folder in touched(save, folders))
        expect(reached - kept <= INTERVAL, f"at iteration {reached} the last checkpoint was of {kept}: {run.log.path}")
        seen = f"died at iteration {reached}{', a save cut short' if cut else ''}; {whom}"
        return seen, f"{kept} is complete, {reached - kept} iterations to repeat"

    def _finish(self, save: Path) -> tuple[str, str]:
        before = latest(save)
        with self.start(save) as run:
            expect(run.wait() == 0, f"failed: {run.end()}, {run.log.path}")
            expect(run.log.resumed_at == before, f"began at {run.log.resumed_at}, not at {before}")
            self.same_losses(run.log)
            final, expected = run.log.losses[self.iterations], self.undisturbed.losses[self.iterations]
            expect(final == expected, f"final loss {final} instead of {expected}")
            validation, undisturbed = run.log.validation_losses[-1], self.undisturbed.validation_losses[-1]
            expect(validation == undisturbed, f"validation loss {validation} instead of {undisturbed}")
        return f"final loss {final}, validation loss {validation}", "both equal the undisturbed run's"

    def signal_to_launcher(self) -> tuple[str, str]:
        """SIGTERM to the launcher while the run computes."""
        save = self.checkpoints("sigterm")
        with self.start(save) as run:
            run.until_iteration()
            run.launcher.send_signal(signal.SIGTERM)
            return self._saved_on_signal(run, save, "SIGTERM")

    def signal_to_rank(self) -> tuple[str, str]:
        """SIGUSR2 to one rank, all started without a launcher."""
        save = self.checkpoints("sigusr2")
        with self.start(save, launcher=False) as run:
            run.until_iteration()
            run.processes[-1].send_signal(signal.SIGUSR2)
            seen = self._saved_on_signal(run, save, "SIGUSR2")
            codes = [process.returncode for process in run.processes]
            expect(set(codes) == {EXIT_SAVED_ON_SIGNAL}, f"exit codes {codes}")
            return seen

    def _saved_on_signal(self, run: Start, save: Path, name: str) -> tuple[str, str]:
        code = run.wait()
        run.log.line(f"{name} received")
        at = latest(save)
        expect(code == EXIT_SAVED_ON_SIGNAL, f"exit code {code}: {run.log.path}")
        expect(at == run.log.iterations[-1], f"iteration {run.log.iterations[-1]} is not saved, {at} is")
        return f"exit code {code}, iteration {at} saved", self.goes_on(save, at)

    def full_disk(self) -> tuple[str, str]:
        """A save onto a file system that has room for half of it."""
        save = self.checkpoints("full-disk")
        size = sum(file.stat().st_size for file in (save / folder_name(INTERVAL)).iterdir())
        small = self.folder / "small"
        small.mkdir()
        mount = f"mount -t tmpfs -o size={(5 * size // 2) // 1024}k tmpfs {small} && cp -a {save}/. {small}"
        after = f"rm -r {save}; cp -a {small}/. {save} 2>/dev/null || cp -a {small} {save}"
        with self.start(small, within=in_namespace(mount, after)) as run:
            code = run.wait()
            expect(code != 0, "a save without room ended with exit code 0")
            line = run.log.line("error: .*could not be written")
        return f"exit code {code}: {shortened(line)}", self.goes_on(save, 2 * INTERVAL)

    def read_only(self) -> tuple[str, str]:
        """A folder that cannot be written to."""
        save = self.checkpoints("read-only")
        mount = f"mount --bind {save} {save} && mount -o remount,ro,bind {save}"
        with self.start(save, within=in_namespace(mount)) as run:
            code = run.wait()
            expect(code != 0, "a run that cannot save ended with exit code 0")
            line = run.log.line("error: .*cannot be written")
        return f"exit code {code}: {shortened(line)}", self.goes_on(save, 2 * INTERVAL)

    def damaged(self, name: str, damage: Callable[[Path], None]) -> tuple[str, str]:
        """A file of the latest checkpoint is damaged: refused, and the one before it serves."""
        save = self.checkpoints(name)
        shards = sorted((save / folder_name(2 * INTERVAL)).glob("*.distcp"))
        shard = max(shards, key=lambda file: file.stat().st_size)
        damage(shard)
        with self.start(save, "--exit-interval", str(3 * INTERVAL)) as run:
            code = run.wait()
            line = run.log.line(re.escape(shard.name))
            if code == 0:
                expect(run.log.resumed_at == INTERVAL, f"the damaged checkpoint was taken: {run.log.path}")
                self.same_losses(run.log)
                return f"{shortened(line)}", f"went on from {INTERVAL} by itself, same losses"
            expect(not run.log.iterations, f"trained before it noticed: {run.log.path}")
        seen = f"exit code {code}: {shortened(line)}"
        return seen, self.goes_on(save, INTERVAL, "--ckpt-step", str(INTERVAL))

    def cut_index_cache(self) -> tuple[str, str]:
        """The cache that Megatron keeps of a dataset's order is cut in the middle."""
        data, cache = self.folder / "data", self.folder / "cache"
        write_data(data)
        flags = ("--data-path", str(data), "--data-cache-path", str(cache), "--exit-interval", str(INTERVAL))
        with self.start(self.folder / "cache-1", *flags) as run:
            expect(run.wait() == 0, f"failed before the fault: {run.end()}, {run.log.path}")
            expected = run.log.losses
        indices = sorted(cache.rglob("*.npy"))
        expect(len(indices) > 0, f"no index cache in {cache}")
        for index in indices:
            cut(index)
        seen = ""
        with self.start(self.folder / "cache-2", *flags) as run:
            code = run.wait()
            if code == 0:
                expect(run.log.losses == expected, f"other losses from a cut cache: {run.log.path}")
                return "read anew", "same losses"
            seen = f"exit code {code}: {shortened(run.log.line('cache'))}"
        shutil.rmtree(cache)
        with self.start(self.folder / "cache-3", *flags) as run:
            expect(run.wait() == 0, f"without the cache: {run.end()}, {run.log.path}")
            expect(run.log.losses == expected, f"other losses without the cache: {run.log.path}")
        return seen, "without the cache the same losses"

    def lose_rank(self, number: signal.Signals) -> tuple[str, str]:
        """One of several ranks, started without a launcher, is killed or stopped; the others leave by themselves."""
        save = self.checkpoints(f"lost-{number.name.lower()}")
        with self.start(save, launcher=False) as run:
            run.until_iteration(2)
            *others, victim = run.processes
            victim.send_signal(number)
            since = time.monotonic()
            run.until(lambda: all(process.poll() is not None for process in others), "the other ranks left")
            seconds = time.monotonic() - since
            codes = [process.returncode for process in others]
            expect(0 not in codes, f"exit codes {codes}: {run.log.path}")
            # NCCL ends a process itself, with lines of its own.
            if not torch.cuda.is_available():
                expect(set(codes) == {EXIT_LOST_RANK}, f"exit codes {codes}: {run.log.path}")
                line = shortened(run.log.line("another rank is gone"))
        at = latest(save)
        seen = f"the others left after {seconds:.0f} s, exit codes {codes}"
        return f"{seen}: {line}" if not torch.cuda.is_available() else seen, self.goes_on(save, at)

    def not_finite(self, what: str, parameter: str) -> tuple[str, str]:
        """NaN in a parameter (hence in the loss) or in its gradient."""
        save = self.checkpoints(f"nan-{what}")
        at = 2 * INTERVAL
        poison = (str(Path(__file__).resolve()), "--poison", what, parameter, str(at + 2))
        with self.start(save, script=poison) as run:
            code = run.wait()
            line = run.log.line("is not finite")
            expect(code == EXIT_NOT_FINITE, f"exit code {code}: {run.log.path}")
            expect(parameter in line and f"iteration {at + 2}" in line, f"without step or layer: {line}")
        return f"exit code {code}: {shortened(line)}", self.goes_on(save, at)


def folder_name(iteration: int) -> str:
    """Of a checkpoint."""
    return f"iter_{iteration:07d}"


def latest(save: Path) -> int:
    """The iteration that Megatron would load; 0 for none."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def changed(folder: Path) -> int:
    """When a checkpoint's folder last got or lost a file, in ns; 0 if it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def touched(save: Path, before: dict[Path, int]) -> list[Path]:
    """The checkpoints' folders that are new, or have changed since."""
    return [folder for folder in save.glob("iter_*") if before.get(folder) != changed(folder)]


def in_namespace(before: str, after: str = "true") -> tuple[str, ...]:
    """A command that runs its arguments among mounts of its own, made by a first shell command; a last one follows."""
    script = f'{before} && {{ "$@"; code=$?; {after}; exit $code; }}'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh")


def can_mount() -> bool:
    """Whether this user may mount something in a namespace of its own."""
    try:
        command = [*in_namespace("mount -t tmpfs tmpfs /mnt"), "true"]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def shortened(line: str) -> str:
    """A log line for a cell of the table."""
    line = re.sub(r"/\S*/", "", line.strip()).replace("|", "/")
    return line if len(line) <= 200 else f"{line[:197]}..."


def cut(file: Path) -> None:
    """Takes away the second half."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Turns over one bit, of the sign and exponent of some number in the middle."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2 | 3)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x40]))


def write_data(prefix: Path) -> None:
    """A corpus of random tokens in Megatron's format."""
    with warnings.catch_warnings(action="ignore"):  # of Transformer Engine and Apex, which may not be there
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(200):
        builder.add_document(torch.randint(0, 62, (64,), generator=generator), [64])
    builder.finalize(f"{prefix}.idx")


def poison(what: str, parameter: str, iteration: int) -> None:
    """Makes one value NaN in a training that then begins in this process: of a parameter before an iteration, or of its
    gradient in it.

    Args:
        what: "parameter" or "gradient".
        parameter: its global name (megatron_moa.training.nan_guard).
        iteration: counted from 1, as in the log.
    """
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_moa.training.nan_guard import global_name

    train_step = training.train_step

    def poisoned_step(forward_step, data_iterator, model, *rest, **options):
        if options["iteration"] == iteration - 1:
            for chunk in unwrap_model(model):
                for name, tensor in chunk.named_parameters():
                    if global_name(chunk, name) != parameter:
                        continue
                    if what == "parameter":
                        tensor.data.view(-1)[0] = float("nan")
                    else:
                        tensor.register_hook(lambda gradient: gradient * float("nan"))
        return train_step(forward_step, data_iterator, model, *rest, **options)

    training.train_step = poisoned_step


def run_poisoned(what: str, parameter: str, iteration: str, script: str, *arguments: str) -> None:
    """The script as ``python script arguments...`` runs it, poisoned."""
    startup.prepare()
    poison(what, parameter, int(iteration))
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


_PHASES = {"save": "in a save", "start": "while starting", "step": "while computing"}


_GATES = "decoder.layers.1.mlp.coefficients.weight"
_FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
# The single faults by name: what each is, and what does it.
FAULTS: dict[str, tuple[str, Callable[[Drill], tuple[str, str]]]] = {
    "sigterm": ("SIGTERM to the launcher", Drill.signal_to_launcher),
    "sigusr2": ("SIGUSR2 to one rank, no launcher", Drill.signal_to_rank),
    "full-disk": ("disk full during a save", Drill.full_disk),
    "read-only": ("folder read-only", Drill.read_only),
    "truncated": ("a file of the latest checkpoint truncated", lambda drill: drill.damaged("truncated", cut)),
    "bit-flip": ("a bit of it flipped", lambda drill: drill.damaged("bit-flip", flip)),
    "missing": ("a shard of it missing", lambda drill: drill.damaged("missing", Path.unlink)),
    "cut-cache": ("index cache cut", Drill.cut_index_cache),
    "dead-rank": ("a rank killed, no launcher", lambda drill: drill.lose_rank(signal.SIGKILL)),
    "hung-rank": ("a rank stopped (SIGSTOP), no launcher", lambda drill: drill.lose_rank(signal.SIGSTOP)),
    "nan-loss": ("NaN in a parameter, hence the loss", lambda drill: drill.not_finite("parameter", _FC2)),
    "nan-gradient": ("NaN in a gradient", lambda drill: drill.not_finite("gradient", _GATES)),
}
_NEEDS_TWO = ("dead-rank", "hung-rank")
_NEEDS_MOUNT = ("full-disk", "read-only")


def main() -> None:
    """Trains, hurts, compares, prints the table."""
    if sys.argv[1:2] == ["--poison"]:  # how the drill starts itself for its NaNs
        run_poisoned(*sys.argv[2:])
        return
    parser = OneLineParser(
        prog="fault_drill.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = torch.cuda.device_count()
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often to kill the run (default: 20)")
    parser.add_argument("--only", metavar="NAME,...", help="kill, or single faults by name; default: all")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the moments (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=min(gpus, 2) or 2, metavar="N", help="ranks (default: 2, or 1 on a single GPU)"
    )
    parser.add_argument("--work-dir", type=Path, metavar="FOLDER", help="where to work (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and logs there")
    options = parser.parse_args()
    with one_line_errors("fault_drill.py"):
        if options.kills < 0:
            raise UserError(f"--kills {options.kills}: negative; give how often the run is to be killed")
        if options.processes not in (1, 2, 4):  # the tiny model's batch is 4
            raise UserError(f"--processes {options.processes}: the tiny model trains on 1, 2 or 4")
        chosen = options.only.split(",") if options.only else ["kill", *FAULTS]
        for name in chosen:
            if name not in ("kill", *FAULTS):
                raise UserError(f"--only {name}: unknown; give names of kill, {', '.join(FAULTS)}")
        folder = Path(tempfile.mkdtemp(prefix="fault_drill_", dir=options.work_dir))
        (folder / "logs").mkdir()
        drill = Drill(folder, options.processes, options.kills, random.Random(options.seed))
        print(f"{options.processes} processes, logs in {folder / 'logs'}", flush=True)
        drill.run_undisturbed()
        final = drill.undisturbed.losses[drill.iterations]
        print(
            f"undisturbed: {drill.iterations} iterations, saved every {INTERVAL}, final loss {final}, validation "
            f"loss {drill.undisturbed.validation_losses[-1]}\n\n| fault | seen | recovered |\n| --- | --- | --- |",
            flush=True,
        )
        mounts = can_mount()
        for name in chosen:
            if name == "kill":
                drill.kill_repeatedly()
            elif name in _NEEDS_TWO and options.processes == 1:
                print(f"| {FAULTS[name][0]} | not tried: needs two processes | |")
            elif name in _NEEDS_MOUNT and not mounts:
                print(f"| {FAULTS[name][0]} | not tried: no mounts for this user (unshare --mount) | |")
            else:
                fault, act = FAULTS[name]
                drill.record(fault, lambda act=act: act(drill))
    lost = sum(outcome.lost for outcome in drill.outcomes)
    if options.keep or lost:
        print(f"\ncheckpoints and logs: {folder}")
    else:
        shutil.rmtree(folder)
    print(f"\nlost {lost}")
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
