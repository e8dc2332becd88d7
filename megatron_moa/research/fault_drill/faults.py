"""Does one fault to a training, and sees whether it is told and whether the run goes on."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_moa.checkpoints.files import iteration_folder
from megatron_moa.research.fault_drill.damage import cut, flip, in_namespace, write_data
from megatron_moa.research.fault_drill.drill import INTERVAL, Drill, latest
from megatron_moa.research.fault_drill.starts import Start, expect
from megatron_moa.training.exit_codes import EXIT_LOST_RANK, EXIT_NOT_FINITE, EXIT_SAVED_ON_SIGNAL

_POISON = "megatron_moa.research.fault_drill.poison"  # a module that runs a script


def signal_to_launcher(drill: Drill) -> tuple[str, str]:
    """Sends SIGTERM to the launcher while the run computes."""
    save = drill.checkpoints("sigterm")
    with drill.start(save) as run:
        run.until_iteration()
        run.launcher.send_signal(signal.SIGTERM)
        return _saved_on_signal(drill, run, save, "SIGTERM")


def signal_to_rank(drill: Drill) -> tuple[str, str]:
    """Sends SIGUSR2 to one rank of several that were started without a launcher."""
    save = drill.checkpoints("sigusr2")
    with drill.start(save, launcher=False) as run:
        run.until_iteration()
        run.processes[-1].send_signal(signal.SIGUSR2)
        seen = _saved_on_signal(drill, run, save, "SIGUSR2")
        codes = [process.returncode for process in run.processes]
        expect(set(codes) == {EXIT_SAVED_ON_SIGNAL}, f"exit codes {codes}")
        return seen


def _saved_on_signal(drill: Drill, run: Start, save: Path, name: str) -> tuple[str, str]:
    code = run.wait()
    run.log.line(f"{name} received")
    at = latest(save)
    expect(code == EXIT_SAVED_ON_SIGNAL, f"exit code {code}: {run.log.path}")
    expect(at == run.log.iterations[-1], f"iteration {run.log.iterations[-1]} is not saved, {at} is")
    return f"exit code {code}, iteration {at} saved", drill.goes_on(save, at)


def full_disk(drill: Drill) -> tuple[str, str]:
    """Saves onto a file system that has room for half of a checkpoint."""
    save = drill.checkpoints("full-disk")
    size = sum(file.stat().st_size for file in iteration_folder(save, INTERVAL).iterdir())
    small = drill.folder / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size={(5 * size // 2) // 1024}k tmpfs {small} && cp -a {save}/. {small}"
    after = f"rm -r {save}; cp -a {small}/. {save} 2>/dev/null || cp -a {small} {save}"
    with drill.start(small, within=in_namespace(mount, after)) as run:
        code = run.wait()
        expect(code != 0, "a save without room ended with exit code 0")
        line = run.log.line("error: .*could not be written")
    return f"exit code {code}: {shortened(line)}", drill.goes_on(save, 2 * INTERVAL)


def read_only(drill: Drill) -> tuple[str, str]:
    """Makes the folder of checkpoints read-only."""
    save = drill.checkpoints("read-only")
    mount = f"mount --bind {save} {save} && mount -o remount,ro,bind {save}"
    with drill.start(save, within=in_namespace(mount)) as run:
        code = run.wait()
        expect(code != 0, "a run that cannot save ended with exit code 0")
        line = run.log.line("error: .*cannot be written")
    return f"exit code {code}: {shortened(line)}", drill.goes_on(save, 2 * INTERVAL)


def damaged(drill: Drill, name: str, damage: Callable[[Path], None]) -> tuple[str, str]:
    """Damages a file of the latest checkpoint: it must be refused, and the one before it must serve."""
    save = drill.checkpoints(name)
    shards = sorted(iteration_folder(save, 2 * INTERVAL).glob("*.distcp"))
    shard = max(shards, key=lambda file: file.stat().st_size)
    damage(shard)
    with drill.start(save, "--exit-interval", str(3 * INTERVAL)) as run:
        code = run.wait()
        line = run.log.line(re.escape(shard.name))
        if code == 0:
            expect(run.log.resumed_at == INTERVAL, f"the damaged checkpoint was taken: {run.log.path}")
            drill.same_losses(run.log)
            return f"{shortened(line)}", f"went on from {INTERVAL} by itself, same losses"
        expect(not run.log.iterations, f"trained before it noticed: {run.log.path}")
    seen = f"exit code {code}: {shortened(line)}"
    return seen, drill.goes_on(save, INTERVAL, "--ckpt-step", str(INTERVAL))


def cut_index_cache(drill: Drill) -> tuple[str, str]:
    """Cuts in the middle the cache that Megatron keeps of a dataset's order."""
    data, cache = drill.folder / "data", drill.folder / "cache"
    write_data(data)
    flags = ("--data-path", str(data), "--data-cache-path", str(cache), "--exit-interval", str(INTERVAL))
    with drill.start(drill.folder / "cache-1", *flags) as run:
        expect(run.wait() == 0, f"failed before the fault: {run.end()}, {run.log.path}")
        expected = run.log.losses
    indices = sorted(cache.rglob("*.npy"))
    expect(len(indices) > 0, f"no index cache in {cache}")
    for index in indices:
        cut(index)
    seen = ""
    with drill.start(drill.folder / "cache-2", *flags) as run:
        code = run.wait()
        if code == 0:
            expect(run.log.losses == expected, f"other losses from a cut cache: {run.log.path}")
            return "read anew", "same losses"
        seen = f"exit code {code}: {shortened(run.log.line('cache'))}"
    shutil.rmtree(cache)
    with drill.start(drill.folder / "cache-3", *flags) as run:
        expect(run.wait() == 0, f"without the cache: {run.end()}, {run.log.path}")
        expect(run.log.losses == expected, f"other losses without the cache: {run.log.path}")
    return seen, "without the cache the same losses"


def lose_rank(drill: Drill, number: signal.Signals) -> tuple[str, str]:
    """Kills or stops one rank of several without a launcher: the others must leave by themselves."""
    save = drill.checkpoints(f"lost-{number.name.lower()}")
    with drill.start(save, launcher=False) as run:
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
    return f"{seen}: {line}" if not torch.cuda.is_available() else seen, drill.goes_on(save, at)


def not_finite(drill: Drill, what: str, parameter: str) -> tuple[str, str]:
    """Puts NaN into a parameter (hence into the loss) or into its gradient."""
    save = drill.checkpoints(f"nan-{what}")
    at = 2 * INTERVAL
    with drill.start(save, script=("-m", _POISON, what, parameter, str(at + 2))) as run:
        code = run.wait()
        line = run.log.line("is not finite")
        expect(code == EXIT_NOT_FINITE, f"exit code {code}: {run.log.path}")
        expect(parameter in line and f"iteration {at + 2}" in line, f"without step or layer: {line}")
    return f"exit code {code}: {shortened(line)}", drill.goes_on(save, at)


def shortened(line: str) -> str:
    """Shortens a log line for a cell of the table."""
    line = re.sub(r"/\S*/", "", line.strip()).replace("|", "/")
    return line if len(line) <= 200 else f"{line[:197]}..."


_GATES = "decoder.layers.1.mlp.coefficients.weight"
_FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
# The single faults by name: what each is, and what does it.
FAULTS: dict[str, tuple[str, Callable[[Drill], tuple[str, str]]]] = {
    "sigterm": ("SIGTERM to the launcher", signal_to_launcher),
    "sigusr2": ("SIGUSR2 to one rank, no launcher", signal_to_rank),
    "full-disk": ("disk full during a save", full_disk),
    "read-only": ("folder read-only", read_only),
    "truncated": ("a file of the latest checkpoint truncated", lambda drill: damaged(drill, "truncated", cut)),
    "bit-flip": ("a bit of it flipped", lambda drill: damaged(drill, "bit-flip", flip)),
    "missing": ("a shard of it missing", lambda drill: damaged(drill, "missing", Path.unlink)),
    "cut-cache": ("index cache cut", cut_index_cache),
    "dead-rank": ("a rank killed, no launcher", lambda drill: lose_rank(drill, signal.SIGKILL)),
    "hung-rank": ("a rank stopped (SIGSTOP), no launcher", lambda drill: lose_rank(drill, signal.SIGSTOP)),
    "nan-loss": ("NaN in a parameter, hence the loss", lambda drill: not_finite(drill, "parameter", _FC2)),
    "nan-gradient": ("NaN in a gradient", lambda drill: not_finite(drill, "gradient", _GATES)),
}
NEEDS_TWO = ("dead-rank", "hung-rank")
NEEDS_MOUNT = ("full-disk", "read-only")
