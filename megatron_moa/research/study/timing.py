"""Times every arm's training step, in alternation in one process.

Nothing else of the study is running. Times in a study's results are taken while other runs go on beside it; comparisons
at equal time use the times from here. runner.py runs this module as a process of its own: arms come in on stdin,
medians go out on stdout, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_moa.errors import UserError

TIMING = "timing.jsonl"
_WARM_UP = 2  # rounds; the first compiles
WIDER = "swiglu, wider"  # SwiGLU once more, to know what a wider layer costs


def step_times(
    arms: Mapping[str, Sequence[str]], rounds: int, environment: Mapping[str, str], log: Any
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, by arm: ``median``, ``low`` and ``high`` quartile.

    Args:
        arms: all flags of pretrain_gpt_moa.py for each; they share data and tokenizer.
        rounds: steps of each that are timed.
        environment: of the process.
        log: a file for what Megatron prints.

    Raises:
        UserError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({"arms": {name: list(flags) for name, flags in arms.items()}, "rounds": rounds}),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=dict(environment),
    )
    if done.returncode:
        raise UserError(f"timing the arms' steps ended with exit code {done.returncode}; see {log.name}")
    return json.loads(done.stdout.splitlines()[-1])


def width_of_equal_time(times: Mapping[str, float], width: int, wider: int, target: float) -> int:
    """f at which SwiGLU's step takes ``target``: on the line through its times at ``width`` and ``wider``.

    Args:
        times: milliseconds under the names ``swiglu`` and :data:`WIDER`.
    """
    slope = (times[WIDER] - times["swiglu"]) / (wider - width)
    if slope <= 0:
        raise UserError(
            f"timing: SwiGLU of f {wider} is no slower than of f {width}: the machine is too busy to measure a step; "
            "try again when nothing else runs, or set timing higher"
        )
    return max(1, round(width + (target - times["swiglu"]) / slope))


def main() -> None:
    """Reads arms from stdin, times their steps, prints JSON as the last line."""
    import torch

    from megatron_moa import startup
    from megatron_moa.research.benchmarks import timing

    request = json.load(sys.stdin)
    warnings.filterwarnings("ignore", module="megatron")
    startup.prepare()
    from megatron.training.initialize import initialize_megatron

    from megatron_moa.research.benchmarks.train_step import build, random_batches
    from megatron_moa.training.arguments import parse_arguments

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = []
    with contextlib.redirect_stdout(sys.stderr):  # Megatron's own report
        first = None
        for name, flags in request["arms"].items():
            sys.argv = ["timing", *flags]
            args, mixture = parse_arguments(as_global=first is None)
            if first is None:
                initialize_megatron()
                first = args
                batches = random_batches(args)
            args.padded_vocab_size = first.padded_vocab_size
            steps.append(build(name, args, mixture, batches))
        timings = timing.time_alternately(
            {step.name: step.run for step in steps}, device, request["rounds"], warmup=_WARM_UP
        )
    times = {}
    for step in steps:
        low, high = timings.quartiles(step.name)
        times[step.name] = {"median": round(timings.median(step.name), 3), "low": round(low, 3), "high": round(high, 3)}
    print(json.dumps(times))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
