"""Kills one long run again and again, until it has ended."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from megatron_moa.launch import children
from megatron_moa.research.fault_drill.drill import INTERVAL, Drill, latest
from megatron_moa.research.fault_drill.starts import expect

_PHASES = {"save": "in a save", "start": "while starting", "step": "while computing"}


def kill_repeatedly(drill: Drill) -> None:
    """Does kill -9 at random moments of one long run, until it has ended."""
    save = drill.folder / "killed"
    # Half of them in saves, the rest over start-up and computing; in a random order.
    phases = [("save", "start", "save", "step")[index % 4] for index in range(drill.kills)]
    drill.draw.shuffle(phases)
    for number, phase in enumerate(phases, 1):
        whom = drill.draw.choice(("one rank", "all ranks"))
        fault = f"kill -9 {number}: {whom}, {_PHASES[phase]}"
        drill.record(fault, lambda phase=phase, whom=whom: _kill_once(drill, save, phase, whom))
    drill.record("the killed run's end", lambda: _finish(drill, save))


def _kill_once(drill: Drill, save: Path, phase: str, whom: str) -> tuple[str, str]:
    """Starts the long run where it was, and kills it in a phase; what it printed and left must be right."""
    before = latest(save)
    folders = {folder: changed(folder) for folder in save.glob("iter_*")}  # some left by a save that was cut short
    with drill.start(save) as run:
        if phase == "start":
            moment = drill.draw.uniform(0, 0.9 * drill.start_seconds)
            run.until(lambda: run.seconds > moment or bool(run.log.iterations), "started")
        elif phase == "step":
            run.until_iteration(drill.draw.randint(1, 2 * INTERVAL))
            time.sleep(drill.draw.uniform(0, 0.1))
        else:
            run.until(lambda: bool(touched(save, folders)), "a save")
            time.sleep(drill.draw.uniform(0, 0.9 * drill.save_seconds))
        expect(run.launcher.poll() is None, f"ended by itself: {run.end()}")
        victims = children(run.launcher.pid)
        if whom == "all ranks" or not victims:
            run.kill()
        else:
            os.kill(drill.draw.choice(victims), signal.SIGKILL)
            killed = time.monotonic()
            code = run.wait()
            expect(code != 0, "the others ended with exit code 0")
            whom = f"the others left within {time.monotonic() - killed:.0f} s, exit code {code}"
        reached = max([before, *run.log.iterations])
        if run.log.iterations:
            expect(run.log.resumed_at == before, f"began at {run.log.resumed_at}, not at {before}: {run.log.path}")
        drill.same_losses(run.log)
    kept = latest(save)
    cut = any(int(folder.name.removeprefix("iter_")) > kept for folder in touched(save, folders))
    expect(reached - kept <= INTERVAL, f"at iteration {reached} the last checkpoint was of {kept}: {run.log.path}")
    seen = f"died at iteration {reached}{', a save cut short' if cut else ''}; {whom}"
    return seen, f"{kept} is complete, {reached - kept} iterations to repeat"


def _finish(drill: Drill, save: Path) -> tuple[str, str]:
    """Lets the killed run end; its last losses must be those of the undisturbed run."""
    before = latest(save)
    with drill.start(save) as run:
        expect(run.wait() == 0, f"failed: {run.end()}, {run.log.path}")
        expect(run.log.resumed_at == before, f"began at {run.log.resumed_at}, not at {before}")
        drill.same_losses(run.log)
        final, expected = run.log.losses[drill.iterations], drill.undisturbed.losses[drill.iterations]
        expect(final == expected, f"final loss {final} instead of {expected}")
        validation, undisturbed = run.log.validation_losses[-1], drill.undisturbed.validation_losses[-1]
        expect(validation == undisturbed, f"validation loss {validation} instead of {undisturbed}")
    return f"final loss {final}, validation loss {validation}", "both equal the undisturbed run's"


def changed(folder: Path) -> int:
    """Returns when a checkpoint's folder last got or lost a file, in ns; 0 if it is gone."""
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def touched(save: Path, before: dict[Path, int]) -> list[Path]:
    """Returns the checkpoints' folders that are new, or have changed since."""
    return [folder for folder in save.glob("iter_*") if before.get(folder) != changed(folder)]
