"""Trains a tiny mixture for five steps, to show that a training can run here."""

from __future__ import annotations

import os
import sys
import tempfile
import time

from megatron_moa.doctor.finding import MISSING, OK, Finding
from megatron_moa.doctor.processes import LAUNCHER_VARIABLES, ROOT, run
from megatron_moa.megatron_fixes.single_process import TASK_COUNTS

_SMOKE_SECONDS = 600


def smoke() -> Finding:
    """Trains a tiny mixture for five steps, as a user would, on one GPU or the CPU."""
    from megatron_moa.runs.tiny_model import SWIGLU, TINY
    from megatron_moa.runs.training_log import parse_iteration

    script = ROOT / "pretrain_gpt_moa.py"
    name = "five steps"
    if not script.is_file():
        text = f"pretrain_gpt_moa.py is not at {ROOT}"
        return Finding(name, MISSING, text, "install the whole package: pip install -c constraints.txt -e .")
    environment = {k: value for k, value in os.environ.items() if k not in (*LAUNCHER_VARIABLES, *TASK_COUNTS)}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*TINY, *SWIGLU, "--moa-mixing", "moa", "--train-iters", "5"]
        code, log = run([sys.executable, str(script), *flags], _SMOKE_SECONDS, environment, folder)
    seconds = time.monotonic() - start
    steps = [step for step in map(parse_iteration, log.splitlines()) if step is not None]
    losses = [step.loss for step in steps if step.loss is not None]
    if code == 0 and len(losses) == 5 and losses[-1] < losses[0]:
        return Finding(name, OK, f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {seconds:.0f} s with the start")
    why = f"no end within {_SMOKE_SECONDS} s" if code is None else f"exit code {code}"
    if code == 0:
        why = f"losses {' '.join(f'{loss:.4f}' for loss in losses) or 'none'}: not five that go down"
    last = "\n".join(log.strip().splitlines()[-12:])
    return Finding(name, MISSING, f"failed: {why}; the log's last lines:\n{last}")
