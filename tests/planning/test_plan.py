"""Compares the planner with the truth.

The truth is built models' parameters, measured memory, and worlds that the planner's splits can build.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moa import startup
from megatron_moa.errors import UserError
from megatron_moa.planning import inputs, memory, parameters, search
from megatron_moa.planning.communication import gpus_of_a_node, recomputed_flops, step_time
from megatron_moa.planning.model import Model, Split
from megatron_moa.planning.printing import brief, describe, full, record
from megatron_moa.planning.report import Report, command, make_report
from megatron_moa.runs.recipes import model_files, recipe_flags
from megatron_moa.training.gpus import GPUS
from tests.support import launch
from tests.support.training import ROOT, run_script
from tests.support.worlds import Job, visit
from tools import plan

# Parameters, against models as they are built, of shapes alone.


ONE = Split(gpus=1)


@dataclass(frozen=True)
class Built:
    """A recipe with further flags, split over ranks."""

    recipe: str
    mixing: str
    flags: str = ""
    split: Split = ONE

    def __str__(self) -> str:
        return f"{self.recipe} {self.mixing} {self.flags} {describe(self.split)}"

    def all_flags(self) -> list[str]:
        """As pretrain_gpt_moa.py gets them."""
        flags = ["--mock-data", *self.flags.split(), "--moa-log-interval", "0"]  # a fake world has nobody to sum over
        return recipe_flags(self.recipe, self.mixing, flags, inputs.split_environment(self.split))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The first of each pipeline stage."""
        return tuple(stage * (self.split.gpus // self.split.pp) for stage in range(self.split.pp))


VARIANTS = (
    Built("dense-0.12b", "moa", "--moa-gate-bias --moa-amplitude learned"),
    Built("dense-0.12b", "quadratic", "--moa-activations silu tanh one"),
    Built("dense-0.12b", "la-one-sided"),
    Built("dense-0.12b", "la", "--group-query-attention --num-query-groups 4 --qk-layernorm --add-qkv-bias"),
    Built("gpt2-124m", "moa", "--moa-gate-bias --untie-embeddings-and-output-weights"),
    Built("gpt2-124m", "moa", "", Split(gpus=8, tp=4, pp=2)),
    Built("dense-0.12b", "la", "--vocab-size 50001", Split(gpus=8, tp=4)),
    Built("dense-0.12b", "moa", "", Split(gpus=12, tp=2, pp=3)),
    Built("dense-0.12b", "none"),
    Built("moe-0.25b", "none"),
    Built("moe-0.25b", "quadratic", "--moe-shared-expert-gate"),
    Built("moe-0.25b", "la", "--moe-layer-freq 2"),
    Built("moe-0.25b", "moa", "--moa-gate-bias --moa-amplitude learned", Split(gpus=16, tp=2, pp=2, ep=8)),
)


def elements(report: Any) -> int:
    """What a rank holds."""
    return sum(math.prod(info.shape) for info in report.parameters.values())


def model_of(flags: list[str], gpus: int = 1) -> Model:
    """The planner's view of these flags."""
    startup.prepare()
    args, mixture = inputs.parse(flags, gpus)
    return Model.from_args(inputs.validated(args), mixture)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["moa", "none", "la"])
def test_every_recipes_parameters_are_the_built_models(mixing: str, tmp_path: Path) -> None:
    builds = [Built(name, mixing) for name in model_files()]
    reports = visit([Job(tuple(built.all_flags()), 1, (0,)) for built in builds], tmp_path / "built.json")
    for built, (report,) in zip(builds, reports, strict=True):
        counted = parameters.count(model_of(built.all_flags()))
        assert counted.total == elements(report), built
        mixture = {name: info for name, info in report.parameters.items() if ".coefficients." in name}
        assert counted.mixture == sum(math.prod(info.shape) for info in mixture.values()), built


# Of the paper's shapes: all, and those that a token meets; without a mixture (arithmetic, not the planner's).
PAPER = {
    "dense-0.12b": (119_744_256, 119_744_256),
    "dense-0.25b": (254_018_560, 254_018_560),
    "dense-0.5b": (482_696_960, 482_696_960),
    "moe-0.25b": (251_044_480, 113_633_920),
    "moe-0.5b": (480_942_336, 183_671_040),
    "moe-0.8b": (797_327_040, 281_231_040),
    "moe-1b": (1_058_931_712, 354_976_768),
    "moe-2b": (1_996_574_720, 620_856_320),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_its_parameters(name: str) -> None:
    model = model_of(recipe_flags(name, "none", ["--mock-data"]))
    counted = parameters.count(model)
    assert model.padded_vocabulary(1) == 50304
    assert (counted.total, counted.active) == PAPER[name]


@pytest.mark.parametrize(
    ("recipe", "mixing", "n", "layers"),
    [
        ("dense-0.12b", "moa", 14, 6),
        ("dense-0.12b", "one-sided", 7, 6),
        ("dense-0.12b", "quadratic", 10, 6),
        ("moe-0.25b", "moa", 7, 6 * 33),
        ("moe-0.25b", "quadratic", 10, 6 * 33),
        ("gpt2-124m", "moa", 5, 12),
    ],
)
def test_gate_vectors_are_counted_by_form(recipe: str, mixing: str, n: int, layers: int) -> None:
    """Checks that forms have K, 2K or K(K + 1)/2 gate vectors of h a layer or expert.

    ``moa`` is bi-sided in dense models, one-sided with experts.
    """
    model = model_of(recipe_flags(recipe, mixing, ["--mock-data"]))
    assert parameters.count(model).mixture == layers * n * model.hidden
    assert model.coefficients == n


@pytest.mark.slow
def test_what_a_rank_holds_is_what_is_built_there(tmp_path: Path) -> None:
    jobs = [Job(tuple(built.all_flags()), built.split.gpus, built.ranks) for built in VARIANTS]
    for built, reports in zip(VARIANTS, visit(jobs, tmp_path / "built.json"), strict=True):
        model = model_of(built.all_flags(), built.split.gpus)
        assert model.padded_vocabulary(built.split.tp) == reports[0].padded_vocab_size, built
        for stage, report in enumerate(reports):
            weights = parameters.stage_weights(model, built.split, stage)
            held = sum(number * weight.on_rank(built.split) for weight, number in weights.items())
            assert held == elements(report), (str(built), stage)


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet() -> None:
    model = model_of(recipe_flags("moe-2b", "moa", ["--mock-data"]))
    experts, h = model.experts, model.hidden
    assert (experts.number, experts.topk) == (32, 4)
    own = 3 * h * experts.ffn + model.mixture.num_coefficients * h  # fc1, fc2 and gates of one expert
    counted = parameters.count(model)
    assert counted.total - counted.active == model.layers * (32 - 4) * own
    assert counted.mixture - counted.active_mixture == model.layers * (32 - 4) * model.mixture.num_coefficients * h


# Memory, against trainings on a CPU, every allocation counted.

SHAPE = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--ffn-hidden-size 704 --swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --vocab-size 2048 "
    "--micro-batch-size 4 --global-batch-size 8"
)
EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall --moe-ffn-hidden-size 352 --moe-grouped-gemm "
    "--moe-shared-expert-intermediate-size 352 --moe-shared-expert-gate"
)
TRAININGS = {
    "dense, SwiGLU": ("--moa-mixing none", "none"),
    "dense, MoA, bf16": ("--moa-activations identity silu relu --bf16", "none"),
    "dense, MoA": ("--moa-activations identity silu relu", "none"),
    "dense, large vocabulary": ("--moa-mixing none --vocab-size 16384 --bf16", "none"),
    "dense, all recomputed": (
        "--moa-mixing none --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "full",
    ),
    "dense, dropout": ("--moa-mixing none --hidden-dropout 0.1", "none"),
    "MoE, SwiGLU, bf16": (f"--moa-mixing none --bf16 {EXPERTS}", "none"),
    "MoE, MoA": (f"--moa-form one-sided --moa-activations identity silu relu {EXPERTS}", "none"),
}
TOLERANCE = 0.1  # they differ by 4 % at most; small tensors and the sizes of kernels' scratch memory are not planned


def measure(flags: list[str], recompute: str, results: str) -> None:
    """In a process of its own: peak of building a model and of two training steps, and the plan for it."""
    import torch

    startup.prepare()
    from megatron.training.initialize import initialize_megatron

    from megatron_moa.research.benchmarks import peak_memory, timing, train_step
    from megatron_moa.training.arguments import parse_arguments
    from tools import benchmark_step

    sys.argv = ["pretrain_gpt_moa.py", *benchmark_step.RUN, *flags]
    args, mixture = parse_arguments()
    initialize_megatron()
    batches = train_step.random_batches(args)
    arms = []

    def train(lap: timing.Lap) -> None:
        arms.append(train_step.build("plan", args, mixture, batches))
        arms[0].run(lap)

    device = torch.device("cpu")
    whole = peak_memory.peak_bytes(train, device)
    step = peak_memory.peak_bytes(arms[0].run, device)
    split = Split(gpus=1, micro_batch=args.micro_batch_size, recompute=recompute)
    planned = memory.peak(replace(Model.from_args(args, mixture), gpu_kernels=False), split)
    at_rest = planned.weights + planned.gradients + planned.optimizer
    found = {"whole": whole, "step": step, "planned": planned.tensors, "planned step": planned.tensors - at_rest}
    Path(results).write_text(json.dumps(found))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_memory_is_that_of_a_training(name: str, tmp_path: Path) -> None:
    flags, recompute = TRAININGS[name]
    results = tmp_path / "peaks.json"
    arguments = ([*SHAPE.split(), *flags.split()], recompute, str(results))
    code, log = launch.launch(measure, arguments, 1, ROOT)
    assert code == 0, log[-4000:]
    found = json.loads(results.read_text())
    whole, step = found["planned"] / found["whole"], found["planned step"] / found["step"]
    print(f"{name}: {found['whole'] / 1e6:.1f} MB, planned {whole:.3f} of it; {found['step'] / 1e6:.1f}, {step:.3f}")
    assert found["planned"] == pytest.approx(found["whole"], rel=TOLERANCE), found
    assert found["planned step"] == pytest.approx(found["step"], rel=TOLERANCE), found


def test_in_flight_are_megatrons_schedules() -> None:
    model = model_of(recipe_flags("dense-1.3b", "none", ["--mock-data"]))  # 18 layers, 512 samples a step
    one_to_one = Split(gpus=6, pp=6, micro_batch=8)
    assert [memory.in_flight(model, one_to_one, stage) for stage in range(6)] == [6, 5, 4, 3, 2, 1]
    interleaved = Split(gpus=6, pp=6, vpp=3, micro_batch=8)
    assert memory.in_flight(model, interleaved, 0) == (2 * 5 + 2 * 6 + 1) / 3
    assert memory.in_flight(model, interleaved, 5) == (2 * 6 + 1) / 3
    few = Split(gpus=6, pp=6, micro_batch=256)
    assert memory.in_flight(model, few, 0) == 2  # all there are


def test_recomputing_keeps_less_and_the_mixtures_coefficients_are_counted() -> None:
    flags = ["--mock-data"]
    stock, mixed = (model_of(recipe_flags("dense-2b", mixing, flags)) for mixing in ("none", "moa"))
    split = Split(gpus=8, tp=2, micro_batch=4)
    tokens = 4 * stock.sequence
    added = memory.kept(mixed, split, False) - memory.kept(stock, split, False)
    assert added == 4 * 14 * (tokens + tokens / 2)  # whole, and as gates gave them for their half of the sequence
    kept = {
        kind: memory.kept(mixed, Split(gpus=8, tp=2, micro_batch=4, recompute=kind), False)
        for kind in ("none", "mixture", "feed-forward", "full")
    }
    f, h = mixed.ffn, mixed.hidden
    assert kept["none"] - kept["mixture"] == 2 * tokens * f / 2
    assert kept["mixture"] - kept["feed-forward"] == 2 * tokens * 2 * f / 2 + added
    assert kept["full"] == 2 * tokens / 2 * h


def test_a_distributed_optimizer_shares_its_state_out() -> None:
    model = model_of(recipe_flags("dense-2b", "none", ["--mock-data"]))
    one = memory.stage_memory(model, Split(gpus=1), 0)
    eight = memory.stage_memory(model, Split(gpus=8), 0)
    total = parameters.count(model).total
    assert one.optimizer == 12 * total
    assert eight.optimizer == pytest.approx(one.optimizer / 8)
    assert (eight.weights, eight.gradients) == (2 * total, 4 * total)


def test_muons_optimizer_deals_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares the deal with Megatron's, and looks at the rank that gets the embedding."""
    startup.prepare()
    import torch
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    sizes = [30, 1, 2, 2, 9, 40, 7, 7, 100, 12, 3]
    group = {"params": [torch.empty(size, device="meta") for size in sizes]}
    optimizer = SimpleNamespace(dp_cp=None, expt_dp=None)
    LayerWiseDistributedOptimizer._shard_params_ping_pong(optimizer, [SimpleNamespace(param_groups=[group])], 4, 1)
    theirs = [[tensor.numel() for tensor in share] for share in optimizer.dp_cp_params_list]
    assert [[size for (size,) in share] for share in memory._dealt([(size,) for size in sizes], 4)] == theirs

    monkeypatch.setenv("OPTIMIZER", "muon")
    flags = recipe_flags("dense-0.12b", "none", ["--mock-data"])
    model = model_of(flags)
    largest = memory.stage_memory(model, Split(gpus=512), 0).optimizer
    assert largest == 12 * 50304 * model.hidden  # the embedding's, or the output layer's, and nothing else


def test_muon_keeps_one_moment_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZER", "muon")
    model = model_of(recipe_flags("dense-0.12b", "moa", ["--mock-data"]))
    matrices = model.layers * (4 * model.hidden**2 + 3 * model.hidden * model.ffn)
    others = parameters.count(model).total - matrices
    assert memory.stage_memory(model, Split(gpus=1), 0).optimizer == 8 * matrices + 12 * others


# Messages, against those of one rank of a large world.


@pytest.mark.slow
def test_tensor_parallel_messages_are_those_of_a_rank(tmp_path: Path) -> None:
    split = Split(gpus=64, tp=4, micro_batch=1)
    shape = "--num-layers 2 --seq-length 64 --max-position-embeddings 64 --vocab-size 1024 --global-batch-size 16"
    built = Built("dense-0.12b", "moa", f"{shape} --moa-backend eager", split)
    ((report,),) = visit([Job(tuple(built.all_flags()), 64, (5,), messages=True)], tmp_path / "messages.json")
    moved = [message for message in report.messages if message.phase != "finalize" and message.group == "tp"]
    moved = [message for message in moved if message.operation in ("allgather_base", "reduce_scatter_base")]
    model = model_of(built.all_flags(), 64)
    flops = search.flops_by_tp(inputs.validated(inputs.parse(built.all_flags(), 64)[0]), model.mixture)(4)
    traffic = {kind.kind: kind for kind in step_time(model, split, flops, GPUS["h100"], 0.4).traffic}
    assert sum(message.bytes for message in moved) * 3 / 4 == pytest.approx(traffic["TP"].bytes)
    assert sum(message.number for message in moved) == traffic["TP"].messages


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("feed-forward", 2), ("full", 2)])
@pytest.mark.parametrize("shared", [0, 1706])
def test_tensor_parallel_messages_are_counted_layer_by_layer(recompute: str, again: int, shared: int) -> None:
    """Around attention in every layer, around its other part where that is dense or has a shared expert."""
    flags = recipe_flags("moe-0.25b", "moa", ["--mock-data", "--moe-layer-freq", "[0,0,1,1,1,1]"])
    model = model_of(flags)
    model = replace(model, experts=replace(model.experts, shared_ffn=shared))
    flops = search.flops_by_tp(inputs.validated(inputs.parse(flags, 1)[0]), model.mixture)(2)
    split = Split(gpus=2, tp=2, recompute=recompute)
    (found,) = (kind for kind in step_time(model, split, flops, GPUS["h100"], 0.4).traffic if kind.kind == "TP")
    attention, parts = 6, 6 if shared else 2
    number = (5 + (again if recompute == "full" else 0)) * attention + (5 + again) * parts + 5
    gates = (3 if again else 2) * parts
    assert found.messages == (number + gates) * split.micro_batches(model)


@pytest.mark.slow
def test_gradients_are_summed_as_a_rank_sums_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's optimizer wants all sums, Adam's distributed one those of its own share."""
    shape = "--num-layers 2 --hidden-size 128 --num-attention-heads 2 --ffn-hidden-size 256 --global-batch-size 16"
    shape += " --seq-length 64 --max-position-embeddings 64 --vocab-size 1024"
    built = Built("dense-0.12b", "none", shape, Split(gpus=8))
    flags = []
    for optimizer in ("adamw", "muon"):
        monkeypatch.setenv("OPTIMIZER", optimizer)
        # Gathers of weights are the optimizer's, which is not built here.
        flags.append([flag for flag in built.all_flags() if flag != "--overlap-param-gather"])
    reports = visit([Job(tuple(own), 8, (5,), messages=True) for own in flags], tmp_path / "messages.json")
    rounds = {"reduce_scatter_tensor_coalesced": 1, "allreduce_coalesced": 2}  # times (r - 1)/r of its bytes are sent
    for own, (report,), operation in zip(flags, reports, rounds, strict=True):
        (moved,) = (message for message in report.messages if message.group == "dp")
        assert moved.operation == operation
        model = model_of(own, 8)
        flops = search.flops_by_tp(inputs.validated(inputs.parse(own, 8)[0]), None)(1)
        traffic = {kind.kind: kind for kind in step_time(model, built.split, flops, GPUS["h100"], 0.4).traffic}
        assert traffic["DP, gradients"].bytes == rounds[operation] * moved.bytes * 7 / 8


def test_what_a_training_does_not_overlap_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> Any:
        step = make("dense-0.5b", "none", "--gpus", "8", "--gpu", "h100", "--tp", "1").best.step
        return next(kind for kind in step.traffic if kind.kind == "DP, gradients")

    assert gradients().exposed < gradients().seconds
    monkeypatch.setenv("DISTRIBUTED_OPTIMIZER", "0")
    assert gradients().exposed == gradients().seconds


def test_gates_are_recomputed_with_their_layers() -> None:
    flags = recipe_flags("dense-0.12b", "moa", ["--mock-data"])
    model = model_of(flags)
    flops = search.flops_by_tp(inputs.validated(inputs.parse(flags, 1)[0]), model.mixture)(1)
    again = recomputed_flops(model, Split(gpus=1, recompute="feed-forward"), flops)
    assert again == pytest.approx((flops.mixture + flops.gates) / 3 + 2 * model.layers * 3 * model.hidden * model.ffn)


# Splits.


def make(*arguments: str) -> Report:
    """What the program finds."""
    startup.prepare()
    return make_report(plan.parse(arguments)[0])


PLANS = (
    ("moe-2b", "moa", "--gpus", "64", "--gpu", "h200"),
    ("moe-1b", "moa", "--gpus", "64", "--gpu", "h100", "--tp", "2", "--pp", "4", "--vpp", "3"),
    ("moe-0.5b", "la", "--gpus", "24", "--gpu", "a100-80"),
    ("dense-2b", "moa", "--gpus", "64", "--gpu", "h100", "--pp", "2", "--recompute", "feed-forward"),
    ("dense-2b", "none", "--gpus", "16", "--gpu", "h100", "--recompute", "full"),
    ("gpt2-124m", "moa", "--gpus", "8", "--gpu", "b200", "--recompute", "mixture"),
)


@pytest.mark.full
def test_the_best_splits_can_be_built(tmp_path: Path) -> None:
    jobs, planned = [], []
    for arguments in PLANS:
        report = make(*arguments)
        assert report.plans == sorted(report.plans, key=lambda found: float(f"{found.step.seconds:.3g}"))
        for found in report.plans[:2]:
            split = found.split
            flags = ["--mock-data", "--moa-log-interval", "0", *inputs.split_flags(split, report.model)]
            flags = recipe_flags(*arguments[:2], flags, inputs.split_environment(split))
            ranks = tuple(stage * (split.gpus // split.pp) for stage in range(split.pp))
            jobs.append(Job(tuple(flags), split.gpus, ranks))
            planned.append((report.model, split))
    for (model, split), reports in zip(planned, visit(jobs, tmp_path / "built.json"), strict=True):
        for stage, report in enumerate(reports):
            weights = parameters.stage_weights(model, split, stage)
            assert elements(report) == sum(number * weight.on_rank(split) for weight, number in weights.items()), split


def test_a_given_split_is_kept_and_the_command_trains_with_it() -> None:
    report = make(
        "dense-2b", "la", "--gpus", "16", "--gpu", "h100", "--tp", "2", "--pp", "2", "--micro-batch-size", "2"
    )
    assert {(found.split.tp, found.split.pp, found.split.micro_batch) for found in report.plans} == {(2, 2, 2)}
    words = command(report).split()
    assert {"TP=2", "PP=2", "MICRO_BATCH_SIZE=2", "NPROC_PER_NODE=8", "NNODES=2"} < set(words)
    assert words[words.index("examples/pretrain.sh") :][:3] == ["examples/pretrain.sh", "dense-2b", "la"]


def test_the_command_has_as_many_processes_as_gpus() -> None:
    for gpus in (6, 8, 12, 24):
        words = command(make(*f"gpt2-124m --gpus {gpus} --gpu h100".split())).split()
        variables = dict(word.split("=") for word in words if "=" in word)
        assert int(variables["NPROC_PER_NODE"]) * int(variables.get("NNODES", 1)) == gpus


def test_the_command_trains_so_whatever_variables_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TP", "NNODES"):
        monkeypatch.setenv(name, "2")
    words = command(make(*"gpt2-124m --gpus 8 --gpu h100 --tp 1".split())).split()
    assert {"TP=1", "NNODES=1"} < set(words)
    exported = make(*"gpt2-124m --gpus 8 --gpu h100".split())
    assert {found.split.tp for found in exported.plans} == {2}
    monkeypatch.setenv("TP", "0")
    with pytest.raises(UserError, match=r"^TP 0: not a whole number above 0"):
        make(*"gpt2-124m --gpus 8 --gpu h100".split())


def test_a_node_has_whole_groups_of_tensor_parallel_ranks() -> None:
    report = make(*"dense-0.12b la-bi-sided --gpus 12 --gpu h100 --tp 4".split())
    assert {"TP=4", "NPROC_PER_NODE=4", "NNODES=3"} < set(command(report).split())
    sizes = ((12, 1), (12, 2), (8, 8), (6, 2), (32, 16))
    assert [gpus_of_a_node(*size) for size in sizes] == [6, 6, 8, 6, 8]


def test_time_and_cost_follow_from_the_step() -> None:
    report = make("dense-0.5b", "none", "--gpus", "8", "--gpu", "h100", "--mfu", "0.5", "--dollars-per-gpu-hour", "2")
    step, model = report.best.step, report.model
    flops = report.planner.flops(report.best.split.tp)
    assert step.compute == pytest.approx(flops.total * model.tokens_per_step / (8 * 0.5 * 989.4e12))
    assert step.seconds == pytest.approx(step.compute + step.bubble + sum(kind.exposed for kind in step.traffic))
    assert report.hours == pytest.approx(step.seconds * model.iterations / 3600)
    assert report.dollars == pytest.approx(report.hours * 16)
    assert report.overall_mfu == pytest.approx(0.5 * step.compute / step.seconds)


def test_what_is_printed() -> None:
    report = make("moe-0.5b", "moa", "--gpus", "16", "--gpu", "h200")
    text = full(report)
    total = 480_942_336 + 9 * 33 * 7 * 768  # the stock model; gates of 32 routed experts and a shared one, one-sided
    assert f"{total:,}, active for a token" in text
    assert "\nwidths " not in text  # 2048 and 512
    assert "\nvocabulary  50,304, padded; VOCAB_SIZE=N for another\n" in text
    assert "allowance" in text
    assert "unmeasured" in text
    assert command(report) in text
    lines = brief(report).splitlines()
    assert [line.split(":")[0] for line in lines] == ["# Parameters", "# Hardware", "# Duration", "# Cost"]
    assert all(len(line) < 160 for line in lines)
    assert json.loads(json.dumps(record(report)))["parameters"]["total"] == total


def test_odd_widths_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    report = make("dense-0.5b", "none", "--gpus", "8", "--gpu", "h100", "--tp", "1")
    line = "widths      feed-forward width 3413 is odd: slow on tensor cores; FFN_MULTIPLE=128 rounds"
    assert sum(printed.startswith(line) for printed in full(report).splitlines()) == 1
    monkeypatch.setenv("FFN_MULTIPLE", "128")
    report = make("dense-0.5b", "none", "--gpus", "8", "--gpu", "h100", "--tp", "2")
    assert report.model.ffn == 3456
    assert report.widths == ""
    assert "FFN_MULTIPLE=128" in command(report).split()


@pytest.mark.slow
def test_the_program_answers_within_twenty_seconds() -> None:
    def seconds() -> float:
        """Of computation: what else runs on the machine does not count."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    run = run_script("tools/plan.py", ["moe-2b", "--gpus", "64", "--gpu", "h200", "--brief"])
    assert seconds() - before < 20
    assert run.log.count("# Hardware: 64 x H200") == 1


# Mistakes.

MISTAKES = {
    "moe2b --gpus 8 --gpu h100": "moe2b: there is no such recipe; did you mean moe-2b",
    "moe-2b mao --gpus 8 --gpu h100": "mao: there is no such mixing",
    "moe-2b --gpus 8 --gpu h300": "invalid choice: 'h300'",
    "moe-2b --gpus 0 --gpu h100": "--gpus: a number above 0 is wanted, not 0",
    "moe-2b --gpus 8 --gpu h100 --mfu 40": "--mfu: 40 is not between 0 and 1",
    "dense-2b --gpus 24 --gpu h100 --tp 3": "--tp 3: does not divide the 32 attention heads; take --tp 2 or --tp 4",
    "dense-0.5b --gpus 8 --gpu h100 --tp 2": "--tp 2: does not divide the feed-forward width 3413 (FFN_MULTIPLE=128 "
    "rounds widths up); take --tp 1",
    "dense-0.12b --gpus 8 --gpu h100 --tp 4 -- --seq-length 1022": "--tp 4: does not divide the 1022 tokens of a "
    "sequence (SEQ_LENGTH, CP); take --tp 2",
    "dense-2b --gpus 64 --gpu h100 --pp 8": "--pp 8: does not divide the 28 layers; take --pp 4",
    "dense-2b --gpus 64 --gpu h100 --pp 7": "--pp 7: times 1 ranks (TP, CP) does not divide 64 GPUs; take --pp 4",
    "dense-2b --gpus 8 --gpu h100 --pp 1 --vpp 2": "--vpp 2: virtual stages need --pp 2 or more",
    "dense-2b --gpus 8 --gpu h100 --ep 2": "--ep 2: this model has no experts; take --ep 1",
    "moe-2b --gpus 64 --gpu h100 --ep 64": "--ep 64: there are 32 experts, which it must divide; take --ep 32",
    "moe-2b --gpus 12 --gpu h100 --ep 8": "--ep 8: does not divide the 12 ranks of a stage; take --ep 4",
    "dense-2b --gpus 8 --gpu h100 --micro-batch-size 48": "--micro-batch-size 48: times 8 data-parallel ranks does not "
    "divide the global batch of 512; take --micro-batch-size 32 or --micro-batch-size 64",
    "dense-2b --gpus 1000000000000000003 --gpu h100": "a global batch of 512; take --gpus 114688",  # 8 TP 28 PP 512 DP
    "dense-2b --gpus 100000 --gpu h100 --tp 1 --pp 1": "a global batch of 512; take --gpus 512",
    "dense-2b none --gpus 8 --gpu h100 --recompute mixture": "MIXING none has no mixture",
    "dense-2b --gpus 8 --gpu h100 -- --tensor-model-parallel-size 2": "chosen here by --tp",
    "dense-2b --gpus 8 --gpu h100 -- --recompute-activations": "--recompute-activations: chosen here by --recompute",
    "dense-2b --gpus 8 --gpu h100 -- --help": "--help: behind -- it would end the planner without a word",
    "dense-2b --gpus 8 --gpu h100 -- --fp32-residual-connection": "--fp32-residual-connection: the planner has no",
    "dense-2b --gpus 8 --gpu h100 -- --optimizer sgd": "--optimizer sgd: the planner has no formulas for it; take adam",
    "dense-2b --gpus 8 --gpu h100 -- --mtp-num-layers 1": "--mtp-num-layers: the planner has no formulas",
    "dense-2b --gpus 8 --gpu h100 --vpp 2 -- --no-overlap-p2p-communication": (
        "--pipeline-model-parallel-size 2: When interleaved schedule is used and p2p communication overlap is disabled"
    ),
    "dense-2b --gpus 8 --gpu h100 -- --use-tp-pp-dp-mapping": "--use-tp-pp-dp-mapping: the planner has no formulas",
    "dense-2b --gpus 8 --gpu h100 -- --num-distributed-optimizer-instances 2": (
        "--num-distributed-optimizer-instances: the planner has no formulas"
    ),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        plan.main(line.split())
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert MISTAKES[line] in printed.err


def test_what_a_training_would_refuse_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECISION", "fp32")
    with pytest.raises(UserError, match="Megatron shares it out over ranks only with --bf16"):
        make("moe-0.25b", "none", "--gpus", "8", "--gpu", "h100", "--", "--use-distributed-optimizer")


LARGE = "--num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64".split()


def test_too_little_memory_says_what_fits() -> None:
    with pytest.raises(UserError, match=r"--gpus 4: too little memory, at least .* GiB .*; --gpus \d+ fits") as error:
        make("dense-2b", "moa", "--gpus", "4", "--gpu", "h100", "--", *LARGE)
    number = str(error.value).split("--gpus ")[-1].split()[0]
    assert make("dense-2b", "moa", "--gpus", number, "--gpu", "h100", "--", *LARGE).plans
    # A choice that stands in the way is named before more GPUs are.
    with pytest.raises(UserError, match=r"--micro-batch-size \d+ fits"):
        make("dense-2b", "moa", "--gpus", "1", "--gpu", "h100", "--micro-batch-size", "64", "--recompute", "none")


def test_a_number_of_gpus_that_cannot_be_split_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--gpus 11: no split over them divides .*; take --gpus 8"):
        make("dense-2b", "moa", "--gpus", "11", "--gpu", "h100")
