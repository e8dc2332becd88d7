"""Trains the same small model under two settings and prints how far the second is from the first.

    python tools/compare_parallel.py --b '--tensor-model-parallel-size 2 --sequence-parallel'
    python tools/compare_parallel.py --a '--moa-backend eager' --b '--moa-backend compile'
    python tools/compare_parallel.py --records A B    # your own: python -m megatron_moa.research.compare_runs --help
    python tools/compare_parallel.py --processes-b 2 --b '--use-distributed-optimizer' -- --moa-mixing la --num-layers 4

Both settings are flags of pretrain_gpt_moa.py; flags after ``--`` hold for both and come after a tiny model's
(megatron_moa/runs/tiny_model.py). b starts from a's weights. Printed are the losses of the first ten steps, every
parameter's gradient at the first step, relative to its largest entry, and whether all copies of replicated parameters
are equal at the end.
Exit code 0: within the tolerance; 1: not; 2: a mistake in the flags.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_moa.command_line.numbers import positive, within
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.research.compare_runs import Record, RunComparison
from megatron_moa.runs.tiny_model import MOE, SWIGLU, TINY

ROOT = Path(__file__).resolve().parents[1]
_LOSS_STEPS = 10  # whose losses are compared, from the first on
_SIZES = {
    "tp": ("--tensor-model-parallel-size",),
    "pp": ("--pipeline-model-parallel-size",),
    "cp": ("--context-parallel-size",),
    "ep": ("--expert-model-parallel-size",),
    "etp": ("--expert-tensor-parallel-size",),
}


def fewest_processes(flags: list[str]) -> int:
    """Returns the smallest number of processes that serves these flags.

    A pipeline stage has a whole number of dense and of expert groups.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, flag in _SIZES.items():
        parser.add_argument(*flag, dest=name, type=int)
    sizes, _ = parser.parse_known_args(flags)
    tp, pp, cp, ep = (getattr(sizes, name) or 1 for name in ("tp", "pp", "cp", "ep"))
    return math.lcm(tp * cp, ep * (sizes.etp or tp)) * pp


def train(flags: list[str], processes: int, folder: Path, start_from: Path | None) -> Record:
    """Runs one setting, recorded.

    Raises:
        UserError: the run failed; what it printed is on stderr.
    """
    record = ["-m", "megatron_moa.research.compare_runs", "--to", str(folder)]
    if start_from is not None:
        record += ["--start-from", str(start_from)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *record, str(ROOT / "pretrain_gpt_moa.py"), *flags]
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1", **os.environ}
    result = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        print(result.stdout[-4000:], file=sys.stderr)
        raise UserError(f"{shlex.join(flags)}: this run failed with exit code {result.returncode}; its end is above")
    return Record.read(folder)


def _train_both(options: argparse.Namespace, common: list[str]) -> list[Record]:
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("a", "b"):
            own = shlex.split(getattr(options, name))
            flags = [*TINY, *SWIGLU, *(MOE if options.moe else []), "--train-iters", str(options.steps), *common, *own]
            processes = getattr(options, f"processes_{name}") or fewest_processes(flags)
            setting = shlex.join([*common, *own]) or "(as it comes)"
            print(f"setting {name}, {processes} process{'es' * (processes > 1)}: {setting}", flush=True)
            records.append(train(flags, processes, Path(scratch) / name, Path(scratch) / "a" if records else None))
    return records


def print_table(comparison: RunComparison) -> None:
    """Losses, gradients, copies: a markdown table each."""
    losses = [(step, f"{a:.7f}", f"{b:.7f}", f"{apart:.1e}") for step, (a, b, apart) in comparison.losses.items()]
    print("\n" + markdown_table(["step", "loss a", "loss b", "relative difference"], losses))
    gradients = [(key, f"{top:.3e}", f"{apart:.1e}") for key, (top, apart) in sorted(comparison.gradients.items())]
    gradients += [(key, "only in one of the two", "") for key in comparison.missing]
    header = ["gradient at step 1", "largest entry in a", "largest difference, relative to it"]
    print("\n" + markdown_table(header, gradients))
    equal = comparison.replicated - len(comparison.differing)
    print(f"\ncopies of replicated parameters in b after the last step: {equal} of {comparison.replicated} bit-equal")
    for key in comparison.differing:
        print(f"  not equal: {key}")


def _with_values_attached(arguments: list[str]) -> list[str]:
    """Joins ``--a '--swiglu'`` to ``--a=--swiglu``, and ``--b`` likewise.

    argparse takes a word that begins with a dash for a flag of its own.
    """
    attached: list[str] = []
    for word in arguments:
        if attached and attached[-1] in ("--a", "--b"):
            attached[-1] += f"={word}"
        else:
            attached.append(word)
    return attached


@one_line_errors("compare_parallel.py")
def main() -> None:
    """Trains twice and compares."""
    arguments = sys.argv[1:]
    common: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, common = arguments[:split], arguments[split + 1 :]
    parser = OneLineParser(
        prog="compare_parallel.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, nargs=2, metavar="FOLDER", help="compare these instead of training")
    for name in ("a", "b"):
        parser.add_argument(f"--{name}", default="", metavar="FLAGS", help=f"setting {name}, quoted as one word")
        parser.add_argument(f"--processes-{name}", type=positive, metavar="N", help="default: the fewest that serve it")
    parser.add_argument("--steps", type=positive, default=30, metavar="N", help="training steps (default: 30)")
    parser.add_argument(
        "--tolerance", type=within(float, 0), default=1e-5, metavar="X", help="relative (default: 1e-5)"
    )
    parser.add_argument("--moe", action="store_true", help="a tiny MoE model instead of the tiny dense one")
    options = parser.parse_args(_with_values_attached(arguments))
    records = [Record.read(folder) for folder in options.records] if options.records else _train_both(options, common)
    comparison = RunComparison.of(*records, steps=_LOSS_STEPS)
    print_table(comparison)
    good = comparison.within(options.tolerance)
    print(f"\n{'within' if good else 'NOT within'} {options.tolerance:g}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
