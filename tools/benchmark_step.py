"""Times the whole training step of a recipe's model with a mixture and without.

    python tools/benchmark_step.py dense-0.5b --arms moa compiled --micro-batch-size 4
    python tools/benchmark_step.py dense-0.5b --type1 --arms moa compiled --micro-batch-size 4
    python tools/benchmark_step.py moe-2b --layers 4 -- --moe-grouped-gemm --moa-backend compile
    torchrun --nproc-per-node 2 tools/benchmark_step.py dense-2b -- --tensor-model-parallel-size 2

The arms take turns in one process. A step is Megatron's own train_step: forward, backward, reduction of gradients by
its DDP, clipping, Adam, schedule. Tokens are random and on the device already. RECIPE is a model of examples/models, or
a bash file with an array MODEL_ARGS; flags after ``--`` are pretrain_gpt_moa.py's and hold for all arms. The stock arm,
to which all are compared, has the recipe's baseline: SwiGLU, with --type1 squared ReLU. The arm "compiled" is MoA's
equations by plain torch.compile, as the paper timed them (megatron_moa/research/benchmarks/plain_compile.py). Every
arm's model and optimizer are held at once: where two do not fit, --layers cuts the depth, and the output says so. bf16
on a GPU, float32 on a CPU, unless --dtype says otherwise.

Results of the mixture are compared with float64 first; a wrong one ends the program, exit code 1. TFLOP/s are the
model's, as Megatron counts them for the stock model; "state" is what model, gradients and optimizer hold, "peak"
what a step needs above that, MB of 10^6.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_moa import startup
from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.words import flag_groups
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import resolve_backend
from megatron_moa.research.benchmarks import conditions, peak_memory, tables, timing
from megatron_moa.research.benchmarks.plain_compile import compiled_reference
from megatron_moa.research.benchmarks.train_step import build, random_batches
from megatron_moa.runs.recipes import read_recipe

PROGRAM = "benchmark_step.py"
LABELS = {"la": "LA", "moa": "MoA", "compiled": "MoA by plain torch.compile"}

# What a recipe's shape leaves to a run; the vocabulary is the one that examples/pretrain.sh gives without a tokenizer.
RUN = (
    "--train-iters 1000000 --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 50257 --eval-iters 0 --num-workers 0"
).split()


def stock_arguments(options: argparse.Namespace, megatron: list[str]) -> list[str]:
    """All flags of the stock arm; ``megatron`` are those of the command line, without the mixture's."""
    flags = [*RUN, *read_recipe(options.recipe, baseline=True), "--micro-batch-size", options.micro_batch_size]
    if options.global_batch_size:
        flags += ["--global-batch-size", options.global_batch_size]
    if options.layers:
        flags += ["--num-layers", options.layers]
    flags += {"bf16": ["--bf16"], "fp16": ["--fp16"], "fp32": []}[options.dtype]
    return [str(flag) for flag in (*flags, *megatron, "--moa-mixing", "none")]


def split_moa_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    """Megatron's flags, and the mixture's with their values: the stock arm has none of those."""
    others: list[str] = []
    moa_flags: list[str] = []
    for words in flag_groups(flags):
        (moa_flags if words[0].startswith("--moa-") else others).extend(words)
    return others, moa_flags


def parse_arms(options: argparse.Namespace) -> dict[str, tuple[argparse.Namespace, MixtureConfig | None]]:
    """Megatron's arguments and the mixture of every arm.

    Megatron's globals are set once, by the stock arm's flags; a mixture differs from it in what its own flags decide.
    """
    from megatron_moa.command_line.flags import add_flags, mixture_from_args
    from megatron_moa.training.arguments import parse_arguments

    others, moa_flags = split_moa_flags(options.megatron)
    sys.argv = [PROGRAM, *stock_arguments(options, others)]
    stock, _ = parse_arguments()
    found: dict[str, tuple[argparse.Namespace, MixtureConfig | None]] = {"none": (stock, None)}
    for name in options.arms:
        kind = ["moa", "--moa-backend", "eager"] if name == "compiled" else [name]
        own = add_flags(OneLineParser(prog=PROGRAM, allow_abbrev=False)).parse_args([*moa_flags, "--moa-mixing", *kind])
        args = copy.deepcopy(stock)
        args.squared_relu = False
        vars(args).update({key: value for key, value in vars(own).items() if key.startswith("moa_")})
        mixture = mixture_from_args(args)
        resolve_backend(mixture.backend, "cuda" if torch.cuda.is_available() else "cpu")
        args.bias_swiglu_fusion = args.bias_gelu_fusion = False  # as parse_arguments does for a mixture
        found[name] = (args, mixture)
    return found


def check(options: argparse.Namespace, arms: dict[str, tuple[argparse.Namespace, MixtureConfig | None]]) -> None:
    """Checks the accuracy of our backends at the widths of this model, dense, shared and routed.

    Leaves with exit code 1 where a result is wrong. The reference by plain torch.compile is not checked against itself.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = conditions.DTYPES[options.dtype]
    for name, (args, mixture) in arms.items():
        if mixture is None or name == "compiled":
            continue
        routed = args.num_experts is not None
        shared = args.moe_shared_expert_intermediate_size
        widths = {(args.moe_ffn_hidden_size, True)} if routed else {(args.ffn_hidden_size, False)}
        widths |= {(shared, False)} if routed and shared else set()
        for width, scale in widths:
            width //= args.tensor_model_parallel_size if not scale else args.expert_tensor_parallel_size
            conditions.require_correct(
                PROGRAM, [mixture], dtype, device, width=width, hidden=args.hidden_size, scale=scale
            )


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Builds all arms, times their steps in alternation, measures memory; a record for each arm."""
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import num_floating_point_operations

    with contextlib.redirect_stdout(sys.stderr):  # Megatron's own report
        parsed = parse_arms(options)
        initialize_megatron()
    check(options, parsed)
    stock_args = parsed["none"][0]
    batches = random_batches(stock_args)
    activation = "SwiGLU" if stock_args.swiglu else "ReLU²" if stock_args.squared_relu else "GELU"
    arms = []
    try:
        for name, (args, mixture) in parsed.items():
            context = compiled_reference if name == "compiled" else contextlib.nullcontext
            with contextlib.redirect_stdout(sys.stderr):
                arms.append(build(LABELS.get(name, activation), args, mixture, batches, context))
        barrier = torch.distributed.barrier if torch.distributed.get_world_size() > 1 else lambda: None
        runs = {arm.name: arm.run for arm in arms}
        timings = timing.time_alternately(runs, device, options.rounds, warmup=2, before_each=barrier)
        peaks = {arm.name: peak_memory.peak_bytes(arm.run, device) for arm in arms}
    except torch.OutOfMemoryError:
        raise UserError(
            f"{options.recipe}: {len(parsed)} models and their optimizers do not fit into this GPU's memory; cut the "
            "depth with --layers N, take a smaller --micro-batch-size, or --arms moa alone"
        ) from None
    tokens = stock_args.global_batch_size * stock_args.seq_length
    flop = num_floating_point_operations(stock_args, stock_args.global_batch_size) / stock_args.world_size
    baseline = arms[0]
    records = []
    for arm in arms:
        seconds = timings.median(arm.name, "step") / 1000
        backend = arm.mixture and resolve_backend(arm.mixture.backend, device.type)
        if arm.name == LABELS["compiled"]:
            backend = "none: the reference by torch.compile"
        records.append(
            {
                "arm": arm.name,
                "recipe": recipe_name(options),
                "layers": stock_args.num_layers,
                "cut": bool(options.layers),
                "mixing": arm.mixture and arm.mixture.describe(),
                "backend": backend,
                "dtype": options.dtype,
                "parameters": arm.parameters,
                "micro_batch_size": stock_args.micro_batch_size,
                "global_batch_size": stock_args.global_batch_size,
                "seq_length": stock_args.seq_length,
                "flags": options.megatron,
                **timings.record(arm.name),
                "ratio": timings.ratio(arm.name, baseline.name, "step"),
                "state_bytes": arm.state_bytes,
                "peak_bytes": peaks[arm.name],
                "peak_ratio": peaks[arm.name] / peaks[baseline.name],
                "tokens_per_s": tokens / seconds,
                "tflop_per_s_per_gpu": flop / seconds / 1e12,
            }
        )
    return records


def recipe_name(options: argparse.Namespace) -> str:
    """The model, and whether its layers are of Type I by flag."""
    return options.recipe.name.removesuffix(".sh") + (", Type I" if options.type1 else "")


def parse(argv: list[str]) -> argparse.Namespace:
    """Our flags, and Megatron's after ``--``."""
    megatron: list[str] = []
    if "--" in argv:
        split = argv.index("--")
        argv, megatron = argv[:split], argv[split + 1 :]
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a model of examples/models, or a bash file")
    parser.add_argument("--arms", nargs="+", choices=tuple(LABELS), default=["la", "moa"], help="beside stock")
    parser.add_argument("--type1", action="store_true", help="the recipe with Type I layers (its FFN=type1)")
    parser.add_argument("--layers", **size, help="cut the model to so many layers")
    parser.add_argument("--micro-batch-size", **size, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--global-batch-size", **size, help="default: one micro-batch a data-parallel rank")
    conditions.add_arguments(parser, rounds=15)
    options = parser.parse_args(argv)
    options.megatron = megatron
    for word in megatron:
        if word.partition("=")[0] == "--moa-mixing":
            raise UserError(f"{word}: the arms are chosen with --arms; drop it")
    return options


def main(argv: list[str] | None = None) -> None:
    """Checks, times, reports."""
    with one_line_errors(PROGRAM):
        options = parse(sys.argv[1:] if argv is None else argv)
        read_recipe(options.recipe)
        device, _ = conditions.set_up(options)
        warnings.filterwarnings("ignore", module="megatron")  # what is not installed, at every import
        startup.prepare()
        surroundings = conditions.environment(device)
        if options.type1:
            os.environ["FFN"] = "type1"
        records = measure(options, device)
        if torch.distributed.get_rank() == 0:
            print(conditions.describe(surroundings))
            first = records[0]
            cut = f", CUT TO {first['layers']} LAYERS" if first["cut"] else f", {first['layers']} layers"
            batch = f"{first['micro_batch_size']} sequences of {first['seq_length']} a micro-batch"
            print(f"\n{recipe_name(options)}{cut}, {batch}, {first['global_batch_size']} a step, {options.dtype}\n")
            print(tables.step_table(records), flush=True)
            conditions.append_records(options.json, "step", surroundings, records)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
