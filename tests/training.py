"""Runs pretrain_gpt_moa.py as a user would, on one or more gloo processes, and reads its log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A model small enough that a run is mostly start-up; mock data, the same for every run with the same seed.
TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 7 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 16 --split 90,5,5 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0"
).split()
SWIGLU = "--swiglu --ffn-hidden-size 48".split()
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall"
).split()


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


def run_script(script: str | Path, arguments: list[str], processes: int = 1, check: bool = True) -> Run:
    """Runs a script of the project, under torchrun for more than one process; fails the test if it fails."""
    command = [sys.executable]
    if processes > 1:
        command += torchrun(processes)
    command += [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
    )
    run = Run(result.returncode, result.stdout)
    assert not check or run.returncode == 0, f"{' '.join(command)}\n{run.log[-6000:]}"
    return run


def train(*arguments: str, processes: int = 1, check: bool = True) -> Run:
    """Runs pretrain_gpt_moa.py with the tiny model and these further flags."""
    return run_script("pretrain_gpt_moa.py", [*TINY, *arguments], processes, check)
