"""Runs pretrain_gpt_moa.py as a user would, on one or more gloo processes, and reads its log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moa.doctor.processes import LAUNCHER_VARIABLES
from megatron_moa.research import compare_runs
from megatron_moa.research.compare_runs import Record
from megatron_moa.runs.tiny_model import MOE, SWIGLU, TINY
from tests.support import launch

__all__ = ["FORM_ARMS", "MOE", "SWIGLU", "TINY", "TWO_KINDS"]

ROOT = Path(__file__).resolve().parents[2]

# Dense layers, routed and shared experts in one model, so that one training meets every kind of feed-forward layer.
TWO_KINDS = [*MOE, *"--moe-shared-expert-intermediate-size 32 --moe-layer-freq 2 --num-layers 4".split()]
# The forms in which coefficients belong to one branch or to pairs, each kind of coefficient; gates vary with the token.
_VARIED = "--moa-gate-init-std 0.2"
FORM_ARMS = {
    "one-sided-la": "--moa-mixing la --moa-form one-sided",
    "one-sided-moa": f"--moa-mixing moa --moa-form one-sided --moa-gate-bias {_VARIED}",
    "quadratic-la": "--moa-mixing la --moa-form quadratic",
    "quadratic-moa": f"--moa-mixing moa --moa-form quadratic --moa-gate-bias --moa-amplitude learned {_VARIED}",
}


@dataclass
class Run:
    """One finished run: exit code, everything it printed, and what was read off that."""

    returncode: int
    log: str

    @property
    def losses(self) -> dict[int, float]:
        """lm loss by iteration.

        Megatron's second line holds the mean of the first two iterations (it logs the first one out of turn, without
        starting its sum anew), so that is taken apart here.
        """
        pattern = r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)"
        losses = {int(iteration): float(loss) for iteration, loss in re.findall(pattern, self.log)}
        first, *others = sorted(losses) or [0]
        if others:
            losses[others[0]] = 2 * losses[others[0]] - losses[first]
        return losses

    @property
    def coefficients(self) -> dict[tuple[int, int], list[float]]:
        """What --moa-log-interval logged: means and standard deviations by iteration and layer."""
        lines = re.findall(r"coefficients at iteration (\d+) \| layer (\d+) \|(.*)", self.log)
        numbers = r" (-?\d+\.\d+)"
        return {(int(it), int(layer)): [float(x) for x in re.findall(numbers, text)] for it, layer, text in lines}

    @property
    def validation_losses(self) -> list[float]:
        """Validation losses in the order they were printed."""
        return [float(x) for x in re.findall(r"validation loss at .*? lm loss value: ([0-9.E+-]+)", self.log)]

    @property
    def grad_norms(self) -> dict[int, float]:
        """Gradient norm by iteration."""
        pattern = r"iteration +(\d+)/.*?grad norm: ([0-9.]+)"
        return {int(iteration): float(norm) for iteration, norm in re.findall(pattern, self.log)}


def torchrun(processes: int) -> list[str]:
    """What starts several processes of one script, on a port nobody else takes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def run_script(
    script: str | Path, arguments: list[str | Path], processes: int = 1, check: bool = True, fresh: bool = False
) -> Run:
    """Runs a script of the project, in a forked process or in one that imports all by itself.

    The latter is for ``fresh`` and for several processes, which torchrun starts.
    """
    flags = list(map(str, arguments))
    if processes == 1 and not fresh:
        return _launched(launch.script, (str(ROOT / script), flags), 0, check)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, *(torchrun(processes) if processes > 1 else ()), str(ROOT / script), *flags]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )
    run = Run(result.returncode, result.stdout)
    assert not check or run.returncode == 0, f"{' '.join(command)}\n{run.log[-6000:]}"
    return run


def train(*arguments: str | Path, processes: int = 1, check: bool = True) -> Run:
    """Trains the tiny model with these further flags, in processes forked with Megatron imported."""
    return _launched(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), _flags(arguments)), processes, check)


def record(
    folder: Path,
    *arguments: str | Path,
    model: Sequence[str] = TINY,
    processes: int = 1,
    start_from: Path | None = None,
    check: bool = True,
) -> Run:
    """Trains the tiny model or another as :func:`train` does, and records the run in a folder.

    The record is compare_runs.py's; ``start_from`` is the folder of another record, whose weights the run starts from.
    """
    target = (str(ROOT / "pretrain_gpt_moa.py"), _flags(arguments, model), folder, start_from)
    return _launched(compare_runs.run, target, processes, check)


def recorded(folder: Path, *arguments: str | Path, **settings: Any) -> Record:
    """The record of such a run; settings of :func:`record`."""
    record(folder, *arguments, **settings)
    return Record.read(folder)


def _flags(arguments: tuple[str | Path, ...], model: Sequence[str] = TINY) -> list[str]:
    return [*model, *map(str, arguments)]


def _launched(target: Callable[..., None], arguments: tuple[Any, ...], processes: int, check: bool) -> Run:
    run = Run(*launch.launch(target, arguments, processes, ROOT))
    assert not check or run.returncode == 0, f"{arguments}\n{run.log[-6000:]}"
    return run
