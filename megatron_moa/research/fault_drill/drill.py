"""Trains the undisturbed run, and compares with it what other runs do."""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moa.checkpoints.files import TRACKER, iteration_folder
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.single_process import free_port
from megatron_moa.research.fault_drill.starts import ROOT, Log, NotAsExpected, Start, expect
from megatron_moa.runs.tiny_model import SWIGLU, TINY

SCRIPT = ROOT / "pretrain_gpt_moa.py"
INTERVAL = 4  # iterations between saves


@dataclass
class Outcome:
    """A row of the table."""

    fault: str
    seen: str
    recovered: str
    lost: bool = False


@dataclass
class Drill:
    """Holds what all faults share: the undisturbed run, ways to start others, and the rows of the table.

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
        """Returns the length of the long run: a kill costs at most two saves' worth."""
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
            script: what runs the script instead of Python itself: a file or ``-m`` and a module, and their arguments.
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
        """Trains the run that all others are compared with; single faults begin at its checkpoints."""
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
        """Copies the undisturbed run's first two checkpoints, the second of which is the latest."""
        copy = self.folder / name
        copy.mkdir()
        for iteration in (INTERVAL, 2 * INTERVAL):
            shutil.copytree(iteration_folder(self.folder / "undisturbed", iteration), iteration_folder(copy, iteration))
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
        """Does a fault and prints its row; returns whether it ended as expected."""
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


def latest(save: Path) -> int:
    """Returns the iteration that Megatron would load; 0 for none."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0
