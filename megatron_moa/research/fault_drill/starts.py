"""Starts the training for the drill, reads what it prints, and ends what is left of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from megatron_moa.launch import children

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 240  # seconds that anything may take; the timeout of the ranks, one minute, is well within
_POLL = 0.005  # seconds between two looks: a save of the tiny model takes about 100 ms


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
        """Returns the lm loss by iteration as printed, without the second one.

        Megatron prints the mean of the first two there.
        """
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
        """Sends SIGKILL to whatever is left, with all that the ranks have started.

        Each rank leads a process group of its own.
        """
        leaders = [process.pid for process in self.processes]
        for leader in leaders:
            leaders += children(leader)
        for leader in reversed(leaders):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        for process in self.processes:
            process.wait()
