"""Plans the training of a recipe on so many GPUs: memory, time, cost, and the split.

    python tools/plan.py moe-2b --gpus 64 --gpu h200                 # the mixture's plan: searches splits, ranks them
    python tools/plan.py dense-2b none --gpus 8 --gpu h100 --tp 2    # the baseline's, TP given
    python tools/plan.py dense-1.3b --gpus 8 --gpu h100 --brief      # four lines, for a recipe's header
    SEQ_LENGTH=4096 TOKENS=100000000000 python tools/plan.py dense-2b --gpus 128 --gpu b200

A plan also has parameters, FLOPs and communication. RECIPE is a file of examples/models/ without its .sh, or the path
of one; MIXING as in examples/pretrain.sh (default moa); its variables hold, and flags of pretrain_gpt_moa.py may follow
``--``. What is not given is searched. Formulas, and what was checked: docs/planning.md. Seconds are estimates: kernels
are taken to reach --mfu of the GPU's peak while it computes, in every split; messages to run at the wires' full
bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from megatron_moa.command_line.numbers import positive, share
from megatron_moa.errors import OneLineParser, one_line_errors
from megatron_moa.planning import inputs
from megatron_moa.planning.model import RECOMPUTE
from megatron_moa.planning.printing import brief, full, record
from megatron_moa.planning.report import Request, make_report
from megatron_moa.planning.search import FLAGS
from megatron_moa.runs.recipes import RECIPE_MIXINGS
from megatron_moa.training.gpus import GPUS

PROGRAM = "plan.py"


def parse(argv: Sequence[str]) -> tuple[Request, argparse.Namespace]:
    """Returns what is to be planned, with the training's flags after ``--``, and all of our flags."""
    argv, further = list(argv), []
    if "--" in argv:
        mark = argv.index("--")
        argv, further = argv[:mark], argv[mark + 1 :]
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("mixing", metavar="MIXING", nargs="?", default="moa", help=", ".join(RECIPE_MIXINGS))
    parser.add_argument("--gpus", **size, required=True, help="of all nodes")
    parser.add_argument("--gpu", required=True, choices=tuple(GPUS))
    parser.add_argument("--tp", **size, help="tensor-parallel ranks; with 2 or more, sequence parallelism too")
    parser.add_argument("--pp", **size, help="pipeline stages")
    parser.add_argument("--vpp", **size, help="virtual stages on each pipeline stage")
    parser.add_argument("--ep", **size, help="expert-parallel ranks")
    parser.add_argument("--cp", **size, help="context-parallel ranks; never searched: needs Transformer Engine")
    parser.add_argument("--micro-batch-size", **size, help="samples; the search takes the recipe's, or halves of it")
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        help="mixture: --moa-recompute; feed-forward: --recompute-modules mlp or moe; full: whole layers",
    )
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="X",
        help="share of the peak that kernels reach while a GPU computes (default: %(default)s, an assumption)",
    )
    parser.add_argument(
        "--dollars-per-gpu-hour", type=price, metavar="X", help="default: megatron_moa/training/gpus.py's"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--brief", action="store_true", help="parameters, hardware, duration, cost: for a recipe's header"
    )
    output.add_argument("--json", action="store_true", help="everything as one JSON object")
    options = parser.parse_args(argv)
    split = {name: getattr(options, flag.removeprefix("--").replace("-", "_")) for name, flag in FLAGS.items()}
    request = Request(
        options.recipe,
        options.mixing,
        options.gpus,
        options.gpu,
        options.mfu,
        fixed={name: value for name, value in split.items() if value is not None},
        flags=further,
        dollars_per_gpu_hour=options.dollars_per_gpu_hour,
    )
    return request, options


def price(text: str) -> float:
    """For argparse: dollars."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is no price")
    return value


@one_line_errors(PROGRAM)
def main(argv: Sequence[str] | None = None) -> None:
    """Plans, prints."""
    request, options = parse(sys.argv[1:] if argv is None else argv)
    inputs.prepare()
    report = make_report(request)
    if options.json:
        print(json.dumps(record(report)))
    else:
        print(brief(report) if options.brief else full(report))


if __name__ == "__main__":
    main()
