"""Tests examples/: every recipe's command, and its training scaled down.

Data, optimizers, schedules, mistakes and sweeps are tested, too.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moa import startup
from megatron_moa.planning import inputs
from megatron_moa.planning.model import Model
from megatron_moa.planning.parameters import Parameters, count
from megatron_moa.runs.recipes import read_recipe, recipe_flags
from megatron_moa.runs.training_log import TrainingLog
from tests.support import launch
from tests.support.training import ROOT, Run
from tools import plan

MODELS = sorted(path.stem for path in (ROOT / "examples" / "models").glob("*.sh"))
MIXINGS = ("none", "la", "moa")
PLANNED = ("# Parameters: ", "# Hardware: ", "# Duration: ", "# Cost: ")
LONG = "9" * 20  # more than bash can reckon with
DATA = {"DATA_PATH": "corpus", "TOKENIZER_MODEL": "tokenizer.model"}

# The paper's models: layers, hidden size, width of the feed-forward layer or shared expert, of a routed one, peak rate.
PAPER = {
    "dense-0.12b": (6, 768, 2048, None, 2e-3),
    "dense-0.25b": (12, 1024, 2730, None, 2e-3),
    "dense-0.5b": (18, 1280, 3413, None, 2e-3),
    "moe-0.25b": (6, 640, 1706, 426, 2e-3),
    "moe-0.5b": (9, 768, 2048, 512, 1e-3),
    "moe-0.8b": (10, 960, 2560, 640, 1e-3),
    "moe-1b": (12, 1024, 2730, 682, 1e-3),
    "moe-2b": (15, 1280, 3413, 853, 6e-4),
}

# A model of the same kind, narrow and shallow.
SHALLOW = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128".split()
NARROW_EXPERTS = "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 64".split()
SHORT = "--mock-data --vocab-size 128 --train-iters 3 --log-interval 1 --eval-iters 0 --num-workers 0".split()
SMALL_BATCH = {"MICRO_BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "4", "SEQ_LENGTH": "32"}


def run_example(
    script: str, *arguments: str, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A script of examples/ with these variables, and none of the recipes' own from outside."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


def dry_run(model: str, mixing: str, *flags: str, **variables: str) -> list[str]:
    """The words of the command."""
    done = run_example("pretrain.sh", model, mixing, "--dry-run", *flags, **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", " "))


def value(words: list[str], flag: str) -> str:
    """The word behind the last of these flags: the one that holds."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def count_of(flags: list[str]) -> Parameters:
    """The planner's count, which tests/planning/test_plan.py compares with built models."""
    startup.prepare()
    args, mixture = inputs.parse(flags, 1)
    return count(Model.from_args(inputs.validated(args), mixture))


def small(model: str, mixing: str) -> list[str]:
    """Flags that scale a recipe down."""
    backend = ["--moa-backend", "eager"] if mixing != "none" else []  # compiling takes longer than training
    return [*SHALLOW, *(NARROW_EXPERTS if model.startswith("moe") else []), *SHORT, *backend]


def test_the_recipes_are_there() -> None:
    assert sorted([*PAPER, "dense-1.3b", "dense-2b", "gpt2-124m"]) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_baseline_and_mixture_differ_in_the_mixture_alone(model: str) -> None:
    commands = {mixing: dry_run(model, mixing, RUN_DIR="run", **DATA) for mixing in MIXINGS}
    common = {mixing: words[: words.index("--moa-mixing")] for mixing, words in commands.items()}
    assert common["none"] == common["la"] == common["moa"]
    assert "--moa-keep-last" in common["none"]
    rest = {mixing: commands[mixing][len(common[mixing]) :] for mixing in MIXINGS}
    assert rest["none"] == ["--moa-mixing", "none"]
    assert rest["moa"] == ["--moa-mixing", "moa", *rest["la"][2:]]


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_models_are_trained_as_it_says(model: str) -> None:
    words = dry_run(model, "moa", **DATA)
    layers, hidden, width, expert_width, rate = PAPER[model]
    shape = [int(value(words, f"--{name}")) for name in ("num-layers", "hidden-size", "num-attention-heads")]
    assert shape == [layers, hidden, hidden // 64]
    assert int(value(words, "--ffn-hidden-size")) == width
    llama = {"--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "RMSNorm", "rope"}
    assert llama < set(words)
    unmentioned = {"--moe-shared-expert-gate", "--group-query-attention", "--num-query-groups", "--qk-layernorm"}
    assert not unmentioned & set(words)
    assert (value(words, "--seq-length"), value(words, "--global-batch-size")) == ("1024", "512")
    assert float(value(words, "--lr")) == rate
    assert (value(words, "--weight-decay"), value(words, "--clip-grad")) == ("0.1", "1.0")
    assert (value(words, "--adam-beta1"), value(words, "--adam-beta2")) == ("0.9", "0.95")
    iterations = int(value(words, "--train-iters"))
    assert int(value(words, "--lr-warmup-iters")) == pytest.approx(iterations / 50, abs=1)  # ours
    if expert_width is None:
        assert "--num-experts" not in words
        assert (value(words, "--optimizer"), value(words, "--lr-decay-style")) == ("adam", "cosine")
        assert float(value(words, "--min-lr")) == pytest.approx(rate / 20)
        return
    assert (value(words, "--num-experts"), value(words, "--moe-router-topk")) == ("32", "4")
    assert int(value(words, "--moe-ffn-hidden-size")) == expert_width
    assert int(value(words, "--moe-shared-expert-intermediate-size")) == width
    assert (value(words, "--optimizer"), value(words, "--lr-decay-style")) == ("muon", "WSD")
    assert value(words, "--lr-wsd-decay-style") == "linear"
    assert int(value(words, "--lr-wsd-decay-iters")) == pytest.approx(iterations / 5, abs=1)
    assert float(value(words, "--min-lr")) == 0


@pytest.mark.parametrize(
    "model",
    [
        model if model in ("dense-0.12b", "moe-0.25b") else pytest.param(model, marks=pytest.mark.full)
        for model in MODELS
    ],
)
def test_tokens_are_so_many_a_parameter(model: str) -> None:
    """Of a model that Megatron counts: all parameters of a dense one, those that a token meets of a MoE."""
    words = dry_run(model, "la", **DATA)
    counted = count_of(recipe_flags(model, "none", ["--mock-data"])).active
    batch = int(value(words, "--global-batch-size")) * int(value(words, "--seq-length"))
    assert int(value(words, "--train-iters")) == -(-counted * (100 if "--num-experts" in words else 20) // batch)
    assert value(words, "--lr-decay-iters") == value(words, "--train-iters")


@pytest.mark.parametrize("model", ["dense-0.5b", "moe-0.25b"])
@pytest.mark.parametrize("variables", [{"FFN": "type1"}, {"FFN_MULTIPLE": "128"}])
def test_parameters_follow_the_width(model: str, variables: dict[str, str]) -> None:
    one = {"TOKENS_PER_PARAMETER": "1", "GLOBAL_BATCH_SIZE": "1", "SEQ_LENGTH": "1", "WARMUP_TOKENS": "0"}
    counted = count_of(recipe_flags(model, "none", ["--mock-data"], variables)).active
    assert int(value(dry_run(model, "none", **variables, **one, **DATA), "--train-iters")) == counted


def test_type1_models_have_squared_relu_as_their_baseline() -> None:
    baseline, mixed = (dry_run("dense-0.25b", mixing, FFN="type1", **DATA) for mixing in ("none", "moa"))
    assert value(baseline, "--ffn-hidden-size") == value(mixed, "--ffn-hidden-size") == "4096"
    assert "--swiglu" not in {*baseline, *mixed}
    assert ("--squared-relu" in baseline, "--squared-relu" in mixed) == (True, False)
    assert value(baseline, "--save") == "runs/dense-0.25b-type1-none/checkpoints"
    moe = dry_run("moe-0.25b", "la", FFN="type1", **DATA)
    assert value(moe, "--moe-ffn-hidden-size") == "640"
    assert value(moe, "--moe-shared-expert-intermediate-size") == "2560"


def test_widths_are_rounded_up_on_request() -> None:
    words = dry_run("moe-2b", "moa", FFN_MULTIPLE="128", TP="2", **DATA)
    assert value(words, "--moe-shared-expert-intermediate-size") == value(words, "--ffn-hidden-size") == "3456"
    assert value(words, "--moe-ffn-hidden-size") == "896"
    assert value(dry_run("dense-2b", "moa", FFN_MULTIPLE="128", **DATA), "--ffn-hidden-size") == "8192"


@pytest.mark.parametrize("model", MODELS)
def test_the_header_says_what_the_planner_says(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = (ROOT / f"examples/models/{model}.sh").read_text().split("source ")[0].splitlines()
    (command,) = (line for line in header if "tools/plan.py" in line)
    plan.main(shlex.split(command.partition("tools/plan.py")[2]))
    assert capsys.readouterr().out.splitlines() == [line for line in header if line.startswith(PLANNED)]
    (watch,) = (line for line in header if line.startswith("# Watch: "))
    assert "validation loss" in "".join(header[header.index(watch) :])


# `make test` trains a model of each kind with one mixture, in turn; those of a kind differ in size alone.
_KINDS = ("dense-0.12b", "dense-2b", "gpt2-124m", "moe-0.25b")
_TRAINED = [
    pytest.param(model, mixing, marks=() if model in _KINDS and (i + j) % len(MIXINGS) == 0 else pytest.mark.full)
    for i, model in enumerate(MODELS)
    for j, mixing in enumerate(MIXINGS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mixing"), _TRAINED)
def test_every_recipe_trains_scaled_down(model: str, mixing: str, tmp_path: Path) -> None:
    words = dry_run(model, mixing, *small(model, mixing), RUN_DIR=str(tmp_path), **SMALL_BATCH)
    run = Run(*launch.launch(launch.script, (words[1], words[2:]), 1, tmp_path))
    assert run.returncode == 0, run.log[-6000:]
    assert list(run.losses) == [1, 2, 3]
    assert all(3 < loss < 7 for loss in run.losses.values())  # random tokens: about ln 128
    form = {"none": "none, stock"}.get(mixing, mixing)
    assert f"> mixture of activations: {form}" in run.log
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.slow
def test_the_script_itself_trains_and_goes_on(tmp_path: Path) -> None:
    """Trains a MoE with Muon and WSD on two processes by the script, from a checkpoint.

    The checkpoint is that of the same command without its launcher.
    """
    settings = {
        "NPROC_PER_NODE": "2",
        "EP": "2",
        "RUN_DIR": str(tmp_path / "run"),
    }
    settings |= {**SMALL_BATCH, "TOKENS": "1280", "MASTER_PORT": str(launch.free_port())}  # 10 iterations
    flags = [flag for flag in small("moe-0.25b", "moa") if flag not in ("--train-iters", "3")]
    words = dry_run("moe-0.25b", "moa", *flags, "--exit-interval", "6", **settings)
    script = words.index(str(ROOT / "pretrain_gpt_moa.py"))
    code, before = launch.launch(launch.script, (words[script], words[script + 1 :]), 2, tmp_path)
    assert code == 0, before[-3000:]
    done = run_example("pretrain.sh", "moe-0.25b", "moa", *flags, folder=tmp_path, **settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    logs = [TrainingLog(), TrainingLog()]
    for log, text in zip(logs, (before, done.stdout), strict=True):
        for line in text.splitlines():
            log.read_line(line)
    assert [[step.iteration for step in log.iterations] for log in logs] == [list(range(1, 7)), list(range(7, 11))]
    assert log.complete
    assert log.settings["optimizer"] == "muon"
    assert (tmp_path / "run" / "tensorboard").is_dir()


# Muon, on the optimizer that a recipe builds.

# Five Newton-Schulz steps a x + b x^3 + c x^5, as modded-nanogpt has them; the paper does not say which.
_NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def _orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Newton and Schulz's iteration, in float64."""
    x = matrix.double()
    x = x / x.norm()
    for a, b, c in _NEWTON_SCHULZ:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def _muon_update(name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Computes the paper's Muon update, divided by the rate.

    Nesterov momentum is 0.95; each matrix is taken by itself, times 0.2 sqrt(max(m, n)).
    """
    momentum = torch.zeros_like(gradients[0])
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
    direction = 0.05 * gradients[-1] + 0.95 * momentum
    rows, columns = direction.shape
    if "linear_qkv" in name:  # of each head its queries, keys, values
        parts = [part.reshape(-1, columns) for part in direction.view(HEADS, 3, -1, columns).unbind(1)]
    else:
        parts = direction.chunk(2) if "linear_fc1" in name else [direction]
    updates = [0.2 * math.sqrt(max(part.shape)) * _orthogonalised(part) for part in parts]
    if "linear_qkv" in name:
        return torch.stack([update.view(HEADS, -1, columns) for update in updates], 1).reshape(rows, columns)
    return torch.cat(updates)


HEADS = 4


def _take_two_steps(words: list[str], results: str) -> None:
    """In a process of its own: the recipe's model and optimizer, two steps on gradients of this test's."""
    startup.prepare()
    from megatron.training import training

    setup = training.setup_model_and_optimizer

    def setup_and_step(*args: Any, **kwargs: Any) -> None:
        (model,), optimizer, _ = setup(*args, **kwargs)
        named = {name.replace("module.", ""): p for name, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(1)
        found = {name: {"start": p.detach().clone(), "gradients": []} for name, p in named.items()}
        for _ in range(2):
            for name, p in named.items():
                p.main_grad.copy_(1e-5 * torch.randn(p.shape, generator=generator))  # their norm is below --clip-grad
                found[name]["gradients"].append(p.main_grad.clone())
            for group in (group for part in optimizer.chained_optimizers for group in part.optimizer.param_groups):
                group["lr"] = 1e-2
            optimizer.step()
        owners = {
            id(p): type(part.optimizer).__name__
            for part in optimizer.chained_optimizers
            for group in part.optimizer.param_groups
            for p in group["params"]
        }
        for name, p in named.items():
            found[name] |= {"end": p.detach().clone(), "optimizer": owners[id(p)]}
        torch.save(found, results)
        raise SystemExit(0)

    training.setup_model_and_optimizer = setup_and_step
    launch.script(words[1], words[2:])


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.full)])
def test_muon_is_the_papers(grouped: bool, tmp_path: Path) -> None:
    """Compares Muon's scale, momentum and decay with the paper's, and which parameters it trains.

    It trains the matrices of the blocks; gates, embeddings and vectors are AdamW's.
    """
    settings = {"PRECISION": "fp32", "DISTRIBUTED_OPTIMIZER": "0", "RUN_DIR": str(tmp_path), **SMALL_BATCH}
    words = dry_run("moe-0.25b", "moa", *small("moe-0.25b", "moa"), **settings)
    if not grouped:
        words.remove("--moe-grouped-gemm")
    results = tmp_path / "steps.pt"
    code, log = launch.launch(_take_two_steps, (words, str(results)), 1, tmp_path)
    assert code == 0, log[-6000:]
    found = torch.load(results)
    rate, decay = 1e-2, 0.1
    matrices = 0
    for name, values in found.items():
        outside = name.startswith(("embedding", "output_layer"))
        by_muon = values["start"].dim() == 2 and not outside and ".coefficients." not in name
        assert values["optimizer"] == ("TensorParallelMuon" if by_muon else "AdamW"), name
        if by_muon:
            matrices += 1
            first = _muon_update(name, values["gradients"][:1])
            second = _muon_update(name, values["gradients"])
            expected = values["start"].double() * (1 - rate * decay) - rate * first
            expected = expected * (1 - rate * decay) - rate * second
            change = (expected - values["start"]).norm()
            # Newton-Schulz runs in lower precision there. Without Nesterov, the splits or the scale it is far off.
            assert (values["end"] - expected).norm() < 0.02 * change, name
    # A layer: qkv, projection, router, two matrices of each of 32 experts and of the shared one.
    assert matrices == 2 * (3 + 2 * 33)
    gate = next(values for name, values in found.items() if name.endswith("shared_experts.coefficients.weight"))
    first, second = (gradient.double() for gradient in gate["gradients"])
    moments = [
        (first, first**2),
        ((0.09 * first + 0.1 * second) / 0.19, (0.0475 * first**2 + 0.05 * second**2) / 0.0975),
    ]
    expected = gate["start"].double()
    for mean, square in moments:
        expected = expected * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
    assert torch.allclose(gate["end"].double(), expected, rtol=0, atol=1e-6)


def test_variables_and_trailing_flags_override() -> None:
    words = dry_run(
        "dense-0.12b", "moa", "--lr", "5e-3", LR="2e-3", TOKENS="1048576000", PRECISION="fp32", SEED="7", **DATA
    )
    assert value(words, "--lr") == "5e-3"
    assert value(words, "--min-lr") == "0.00025"
    assert value(words, "--train-iters") == "2000"
    assert value(words, "--lr-warmup-iters") == "40"
    assert value(words, "--seed") == "7"
    assert "--bf16" not in words
    words = dry_run("moe-2b", "quadratic", TP="2", EP="4", PP="2", NPROC_PER_NODE="8", SCHEDULE="cosine", **DATA)
    assert (value(words, "--min-lr"), value(words, "--optimizer")) == ("3e-05", "muon")
    assert words[1:5] == ["-m", "megatron_moa.launch", "--nproc-per-node", "8"]
    assert "--sequence-parallel" in words
    assert [value(words, f"--{name}-parallel-size") for name in ("tensor-model", "pipeline-model", "expert-model")] == [
        "2",
        "2",
        "4",
    ]
    assert words[words.index("--moa-mixing") :][:4] == ["--moa-mixing", "moa", "--moa-form", "quadratic"]
    words = dry_run("dense-0.12b", "la-one-sided", **DATA)
    assert words[words.index("--moa-mixing") :][:4] == ["--moa-mixing", "la", "--moa-form", "one-sided"]


@pytest.mark.parametrize(
    ("model", "flag", "variables"),
    [
        ("dense-0.12b", "--lr 5e-3", {"LR": "5e-3"}),
        ("dense-1.3b", "--seq-length 512", {"SEQ_LENGTH": "512"}),
        ("moe-2b", "--global-batch-size 256", {"GLOBAL_BATCH_SIZE": "256"}),
        ("gpt2-124m", "--train-iters 1000", {"TOKENS": str(1000 * 512 * 1024)}),
        ("moe-2b", "--train-iters 1000", {"TOKENS": str(1000 * 512 * 1024)}),
        ("dense-0.12b", "--tensor-model-parallel-size 2", {"TP": "2"}),
        ("dense-0.12b", "--optimizer muon", {"OPTIMIZER": "muon"}),
        ("moe-2b", "--optimizer adam", {"OPTIMIZER": "adamw"}),
        ("moe-2b", "--lr-decay-style cosine", {"SCHEDULE": "cosine"}),
        ("dense-0.12b", "--lr-decay-style WSD", {"SCHEDULE": "wsd"}),
    ],
)
def test_what_is_reckoned_from_a_trailing_flag_follows(model: str, flag: str, variables: dict[str, str]) -> None:
    """A flag behind is the variable that stands for it, whatever that is set to."""
    expected = dry_run(model, "moa", **variables, **DATA)
    for flags in (flag.split(), [flag.replace(" ", "=")]):
        assert dry_run(model, "moa", *flags, LR="5e-3" if "LR" in variables else "", **DATA) == [*expected, *flags]


def test_a_trailing_flag_wins_over_a_models_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text((ROOT / "examples/models/dense-0.12b.sh").read_text() + "LR=1e-3\n")
    assert value(dry_run(str(mine), "moa", LR="2e-2"), "--min-lr") == "5e-05"
    assert value(dry_run(str(mine), "moa", "--lr", "2e-2"), "--min-lr") == "0.001"


def test_what_no_recipe_has_is_the_flags_alone() -> None:
    expected = dry_run("moe-2b", "moa", **DATA)
    flags = ["--optimizer", "sgd", "--lr-decay-style", "constant"]
    assert dry_run("moe-2b", "moa", *flags, **DATA) == [*expected, *flags]


@pytest.mark.parametrize(
    ("model", "flags", "variables"),
    [
        ("moe-0.25b", [], {}),
        ("dense-0.12b", [], {"OPTIMIZER": "muon", "DISTRIBUTED_OPTIMIZER": "0"}),
        ("dense-0.12b", ["--optimizer=lion"], {}),
    ],
)
def test_an_optimizer_without_a_distributed_one_takes_none(
    model: str, flags: list[str], variables: dict[str, str]
) -> None:
    assert "--use-distributed-optimizer" not in dry_run(model, "moa", *flags, PRECISION="fp32", **variables, **DATA)
    variables = {"DISTRIBUTED_OPTIMIZER": "1"}
    assert "--use-distributed-optimizer" in dry_run(model, "moa", *flags, **variables, **DATA)
    assert "--use-distributed-optimizer" in dry_run("dense-0.12b", "moa", PRECISION="fp32", **variables, **DATA)


def test_a_short_schedule_still_decays() -> None:
    words = dry_run("moe-2b", "moa", "--train-iters", "4", **DATA)
    assert (value(words, "--lr-wsd-decay-iters"), value(words, "--lr-decay-iters")) == ("1", "4")


@pytest.mark.parametrize(
    ("visible", "processes"), [("0,1", "2"), ("0,1,2,-1,3", "3"), ("3", None), ("", None), ("-1", None)]
)
def test_a_process_for_every_visible_gpu(visible: str, processes: str | None, tmp_path: Path) -> None:
    """nvidia-smi lists all eight, whatever CUDA_VISIBLE_DEVICES says."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/bash\nfor i in {0..7}; do echo GPU $i; done\n")
    listing.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = dry_run("dense-0.12b", "moa", PATH=path, CUDA_VISIBLE_DEVICES=visible, **DATA)
    assert ("--nproc-per-node" in words) == bool(processes)
    assert processes is None or value(words, "--nproc-per-node") == processes
    assert value(dry_run("dense-0.12b", "moa", PATH=path, **DATA), "--nproc-per-node") == "8"
    listing.write_text("#!/bin/bash\nexit 9\n")  # no GPU, whatever a profile sets
    assert "--nproc-per-node" not in dry_run("dense-0.12b", "moa", PATH=path, CUDA_VISIBLE_DEVICES="0,1", **DATA)


def test_several_nodes() -> None:
    where = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node-1", "MASTER_PORT": "1234", "NPROC_PER_NODE": "8"}
    words = dry_run("dense-2b", "moa", LAUNCH_ARGS="--log-dir logs --redirects 3", **where, **DATA)
    launcher = words[: words.index(str(ROOT / "pretrain_gpt_moa.py"))]
    expected = (
        "-m megatron_moa.launch --nproc-per-node 8 --nnodes 4 --node-rank 3 --master-addr node-1 --master-port 1234"
    )
    assert launcher[1:] == [*expected.split(), "--log-dir", "logs", "--redirects", "3"]


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({"DATA_PATH": "0.7 a 0.3 b"}, "--tokenizer-model TOKENIZER_MODEL --data-path 0.7 a 0.3 b --split 99,1,0"),
        ({"TOKENIZER_TYPE": "NullTokenizer"}, "--tokenizer-type NullTokenizer --data-path DATA_PATH"),
        (
            {"DATA_PATH": "a", "SPLIT": "95,5,0", "DATA_CACHE_PATH": "/c"},
            "--data-path a --split 95,5,0 --data-cache-path /c",
        ),
        ({"DATA_ARGS_PATH": "blend.txt"}, "--data-args-path blend.txt --split 99,1,0"),
        ({"TRAIN_DATA_PATH": "1 a 2 b", "VALID_DATA_PATH": "c"}, "--train-data-path 1 a 2 b --valid-data-path c"),
        (
            {"TOKENIZER_TYPE": "HuggingFaceTokenizer", "TOKENIZER_MODEL": "gpt2"},
            "--tokenizer-model gpt2 --data-path DATA_PATH",
        ),
    ],
)
def test_data(variables: dict[str, str], flags: str) -> None:
    assert f" {flags} --" in " ".join(dry_run("gpt2-124m", "type1", **variables))


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["dense-2b"], {}, "needs MODEL and MIXING"),
        (["dense-3b", "moa"], {}, "MODEL dense-3b: there is no such recipe; take one of: dense-0.12b "),
        (["dense-2b", "mao"], {}, "MIXING mao: unknown; take none, la, moa"),
        (["dense-2b", "moa"], {}, "DATA_PATH is not set"),
        (["dense-2b", "moa"], {"DATA_PATH": "a"}, "TOKENIZER_MODEL is not set: set it to the file of tools/train_tok"),
        (["dense-2b", "moa", "--mock-data"], {"OPTIMIZER": "sgdd"}, "OPTIMIZER sgdd: unknown; take one of: adamw muon"),
        (["dense-2b", "moa", "--mock-data"], {"SCHEDULE": "x"}, "SCHEDULE x: unknown; take one of: cosine wsd"),
        (["dense-2b", "moa", "--mock-data"], {"PRECISION": "fp8"}, "PRECISION fp8: unknown; take bf16 or fp32"),
        (["dense-2b", "moa", "--mock-data"], {"TOKENS": "10B"}, "TOKENS 10B: not a whole number"),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"TOKENS": "1" + "0" * 20},
            f"TOKENS 1{'0' * 20}: not a whole number above 0 and below 10^15; write",
        ),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"TOKENS_PER_PARAMETER": "x"},
            "TOKENS_PER_PARAMETER x: not",
        ),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"FFN": "relu2"},
            "FFN relu2: unknown; take type2 ",
        ),
        (["gpt2-124m", "moa", "--mock-data"], {"FFN": "type2"}, "FFN type2: GPT-2-like models have Type I layers"),
        (["moe-2b", "moa", "--mock-data"], {"FFN_MULTIPLE": "0"}, "FFN_MULTIPLE 0: not a whole number"),
        (["dense-2b", "moa", "--mock-data"], {"LR": "fast"}, "LR fast: not a number"),
        (["dense-2b", "moa", "--mock-data"], {"EP": "4"}, "EP 4: dense-2b has no experts"),
        (["dense-2b", "moa", "--mock-data"], {"NNODES": "2"}, "MASTER_ADDR is not set"),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"TOKENS": "9", "WARMUP_TOKENS": "9999999999"},
            "WARMUP_TOKENS 9999999999: ",
        ),
        (["dense-2b", "moa", "--mock-data"], {"WARMUP_TOKENS": "08"}, "WARMUP_TOKENS 08: not a whole number"),
        (["moe-2b", "moa", "--mock-data"], {"DECAY_PERCENT": "half"}, "DECAY_PERCENT half: not a whole number"),
        (["dense-2b", "moa", "--mock-data"], {"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE all: not a whole number"),
        (["dense-2b", "moa", "--mock-data"], {"NNODES": "0"}, "NNODES 0: not a whole number above 0"),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"DISTRIBUTED_OPTIMIZER": "true"},
            "DISTRIBUTED_OPTIMIZER true: neither 0 nor 1",
        ),
        (["dense-2b", "moa"], {"DATA_PATH": "a", "VALID_DATA_PATH": "b"}, "VALID_DATA_PATH, TEST_DATA_PATH: read with"),
        (
            ["dense-2b", "moa"],
            {"DATA_PATH": "a", "TRAIN_DATA_PATH": "b"},
            "DATA_PATH, TRAIN_DATA_PATH: both are set, and one alone is read; leave one out",
        ),
        (
            ["dense-2b", "moa"],
            {"TRAIN_DATA_PATH": "a", "DATA_ARGS_PATH": "b"},
            "TRAIN_DATA_PATH, DATA_ARGS_PATH: both are set",
        ),
        (["dense-2b", "moa"], {"DATA_ARGS_PATH": "a", "TEST_DATA_PATH": "b"}, "VALID_DATA_PATH, TEST_DATA_PATH: read"),
        (["dense-2b", "moa"], {"TRAIN_DATA_PATH": "a", "SPLIT": "9,1,0"}, "SPLIT 9,1,0: nothing is split with TRAIN_"),
        (
            ["moe-2b", "moa", "--mock-data"],
            {"PRECISION": "fp32", "DISTRIBUTED_OPTIMIZER": "1"},
            "DISTRIBUTED_OPTIMIZER 1: muon has none in PRECISION=fp32; leave it out",
        ),
        (["dense-2b", "moa", "--mock-data", "--lr"], {}, "--lr: has no value"),
        (["dense-2b", "moa", "--lr", "--mock-data"], {}, "--lr --mock-data: not a number; write it as 1e-3"),
        (["dense-2b", "moa", "--mock-data", "--train-iters=0"], {}, "--train-iters 0: not a whole number above 0"),
        (
            ["dense-2b", "moa", "--mock-data", "--train-iters", "999999999999"],
            {},
            "--train-iters 999999999999: of 1048576 tokens are not below 10^15 tokens; take fewer",
        ),
        *(
            (
                ["dense-2b", "moa", "--mock-data"],
                {name: LONG},
                f"{name} {LONG}: not a whole number above 0 and below 10^",
            )
            for name in (
                *("TOKENS_PER_PARAMETER", "WARMUP_TOKENS", "SEQ_LENGTH", "GLOBAL_BATCH_SIZE", "MICRO_BATCH_SIZE"),
                *("FFN_MULTIPLE", "NPROC_PER_NODE", "NNODES", "SEED", "TP", "PP", "CP", "EP"),
            )
        ),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"TOKENS_PER_PARAMETER": "1000000"},
            "TOKENS_PER_PARAMETER 1000000: for 2085210112 parameters not below 10^15 tokens; take fewer",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = run_example("pretrain.sh", *arguments, folder=tmp_path, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.sh: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "split"),
    [
        (["--data-path=corpus"], ["99,1,0"]),
        (["--data-args-path", "blend"], ["99,1,0"]),
        (["--train-data-path", "corpus"], []),
        (["--mock-data"], []),
    ],
)
@pytest.mark.parametrize("variables", [{}, DATA, {"TRAIN_DATA_PATH": "a"}, {"DATA_ARGS_PATH": "a", "DATA_PATH": "b"}])
def test_flags_of_data_are_all_the_data(flags: list[str], split: list[str], variables: dict[str, str]) -> None:
    words = dry_run("dense-0.12b", "moa", *flags, **variables)
    assert [word for word in words if "data-path" in word or "data-args-path" in word] == [
        flag for flag in flags if flag.startswith("--") and flag != "--mock-data"
    ]
    assert [word for flag, word in itertools.pairwise(words) if flag == "--split"] == split


def test_experts_may_be_given_by_a_flag() -> None:
    for flag in (["--num-experts", "8"], ["--num-experts=8"]):
        words = dry_run("dense-0.12b", "moa", *flag, EP="4", **DATA)
        assert value(words, "--expert-model-parallel-size") == "4"
        assert value(words, "--expert-tensor-parallel-size") == "1"  # as tools/plan.py reckons


def test_a_models_file_is_not_looked_for_in_path(tmp_path: Path) -> None:
    (tmp_path / "mine.sh").write_text("echo another >&2; exit 3\n")
    (tmp_path / "here").mkdir()
    shutil.copy(ROOT / "examples/models/gpt2-124m.sh", tmp_path / "here" / "mine.sh")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run_example("pretrain.sh", "mine.sh", "moa", "--dry-run", folder=tmp_path / "here", PATH=path)
    assert done.returncode == 0, done.stderr


def test_a_models_file_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    shutil.copy(ROOT / "examples/models/gpt2-124m.sh", mine)
    mine.write_text(mine.read_text().replace("--hidden-size 768", "--hidden-size 512"))
    words = dry_run(str(mine), "moa", **DATA)
    assert value(words, "--hidden-size") == "512"
    assert value(words, "--save") == "runs/mine-moa/checkpoints"
    # Random tokens train into a folder that a run on text does not go on with.
    assert value(dry_run(str(mine), "moa", "--mock-data"), "--load") == "runs/mine-moa-mock/checkpoints"
    assert "512" in read_recipe(mine)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("dense-0.12b", name) for name in ("LAYERS", "FFN_WIDTH", "MICRO_BATCH_SIZE", "LR")),
        *(("gpt2-124m", name) for name in ("SEQ_LENGTH", "GLOBAL_BATCH_SIZE", "TOKENS_PER_PARAMETER")),
        ("moe-2b", "EXPERT_WIDTH"),
    ],
)
def test_what_a_models_file_leaves_out_is_named(model: str, name: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    recipe = (ROOT / f"examples/models/{model}.sh").read_text().replace('"$SEQ_LENGTH"', "1024")
    mine.write_text(re.sub(rf"\b{name}=(\$\(\(.*?\)\)|\S+)", "", recipe))
    done = run_example("pretrain.sh", str(mine), "moa", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    message = f"{name} is not set: {mine} has no value for it; add one, or set it before the command"
    assert done.stderr == f"pretrain.sh: {message}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("LR=1e-3", "pretrain.sh: MODEL_ARGS is not set: {} has no flags of a model; "),
        ("exit 0", "pretrain.sh: MODEL {}: {} ends the script; it may only set variables"),
        ("WIDTH=$((2 * HIDDEN))", "{}: line 1: HIDDEN: unbound variable"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text(content)
    done = run_example("pretrain.sh", str(mine), "moa", "--dry-run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message.replace("{}", str(mine)))


@pytest.mark.parametrize(("hidden", "other"), [("1000", "1024"), ("40", "64")])
def test_a_width_that_is_no_multiple_of_a_head(hidden: str, other: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    recipe = (ROOT / "examples/models/dense-0.12b.sh").read_text()
    mine.write_text(recipe.replace("HIDDEN_SIZE=768", f"HIDDEN_SIZE={hidden}"))
    done = run_example("pretrain.sh", str(mine), "moa", "--dry-run")
    assert done.returncode == 2
    message = f"HIDDEN_SIZE {hidden}: not a multiple of 64, the width of a head; take {other}"
    assert done.stderr == f"pretrain.sh: {message}\n"


# Sweeps.

SWEEP = {**SMALL_BATCH, "MIXINGS": "none moa", "LRS": "1e-3 4e-3", "SEEDS": "1", "TOKENS": "1280"}


def sweep(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_example("sweep.sh", *arguments, folder=folder, **{**SWEEP, "SWEEP_DIR": "sweep", **variables})


def test_sweep_lists_its_runs(tmp_path: Path) -> None:
    done = sweep(tmp_path, "--list")
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["0", "sweep/none-lr1e-3-seed1"],
        ["1", "sweep/moa-lr1e-3-seed1"],
        ["2", "sweep/none-lr4e-3-seed1"],
        ["3", "sweep/moa-lr4e-3-seed1"],
    ]
    assert not list(tmp_path.iterdir())
    assert "there are 4 runs, 0 to 3" in sweep(tmp_path, "--run", "4").stderr
    assert sweep(tmp_path, "--run", "x").returncode == 2


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"MIXINGS": "none mao"}, [], "MIXINGS mao: unknown; take none, la, moa"),
        ({"LRS": "1e-3 fast"}, [], "LRS fast: not a number; write it as 1e-3"),
        ({"SEEDS": "1 one"}, [], "SEEDS one: not a whole number above 0"),
        ({"SEEDS": " "}, [], "MIXINGS, LRS, SEEDS: one of them is empty; leave it out for its default"),
        ({"MODEL": "dense-3b"}, [], "MODEL dense-3b: there is no such recipe; take one of: dense-0.12b"),
        ({"PRECISION": "fp8"}, [], "PRECISION fp8: unknown; take bf16 or fp32"),
        ({}, ["--train-iters", "x"], "--train-iters x: not a whole number above 0"),
        ({}, ["--lr=1e-3"], "--lr: is set by LRS here; set that, and leave the flag out"),
        ({}, ["--seed", "2"], "--seed: is set by SEEDS here"),
        ({}, ["--moa-mixing", "la"], "--moa-mixing: is set by MIXINGS here"),
    ],
)
def test_a_sweep_finds_every_mistake_before_its_first_run(
    variables: dict[str, str], flags: list[str], message: str, tmp_path: Path
) -> None:
    for arguments in (["--list"], ["--mock-data"]):
        done = sweep(tmp_path, *arguments, *flags, **variables)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"sweep.sh: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_sweep_goes_on_where_it_was_and_ends_with_a_table(tmp_path: Path) -> None:
    flags = ["--eval-iters", "1", *SHALLOW, "--mock-data", "--vocab-size", "128", "--num-workers", "0"]
    no_data = [flag for flag in flags if flag != "--mock-data"]
    assert "DATA_PATH is not set" in sweep(tmp_path, "--run", "0", *no_data).stderr
    assert not list(tmp_path.iterdir())

    environment = {**os.environ, **SWEEP, "SWEEP_DIR": "sweep", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENS": "12800000", "SAVE_INTERVAL": "1000000"}
    command = ["bash", str(ROOT / "examples/sweep.sh"), "--run", "2", *flags, "--log-interval", "1"]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "sweep/none-lr4e-3-seed1/train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and TrainingLog.read(log).iterations) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)  # saves and leaves
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 75, stderr
    stopped_at = TrainingLog.read(log).iterations[-1].iteration
    assert f"at {stopped_at}/" in sweep(tmp_path, "--list").stdout.splitlines()[2]

    changed = sweep(tmp_path, "--run", "2", *flags, "--log-interval", "1", TOKENS="25600000", SAVE_INTERVAL="1000000")
    assert changed.returncode == 2
    assert "was begun with other flags" in changed.stderr
    shutil.rmtree(log.parent)

    two = {"MIXINGS": "none la", "LRS": "4e-3"}
    for entry, backend in (("0", []), ("1", ["--moa-backend", "eager"])):
        done = sweep(tmp_path, "--run", entry, *flags, "--log-interval", "5", *backend, **two)
        assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in sweep(tmp_path, "--list", **two).stdout.splitlines()] == ["finished"] * 2
    before = log.stat().st_mtime_ns
    assert sweep(tmp_path, "--run", "0", *flags, "--log-interval", "5", **two).returncode == 0
    assert "was begun with other flags" in sweep(tmp_path, "--run", "0", *flags, "--log-interval", "1", **two).stderr
    assert log.stat().st_mtime_ns == before
    table = sweep(tmp_path, "--table").stdout.splitlines()
    assert [row.split(" | ")[:2] for row in table[2:4]] == [["| none", "0.004"], ["| la", "0.004"]]


def test_sweep_does_not_start_what_it_was_told_to_stop(tmp_path: Path) -> None:
    """The signal comes while the run's flags are still being found out."""
    model = (ROOT / "examples/models/gpt2-124m.sh").read_text()
    (tmp_path / "slow.sh").write_text(f"touch begun; sleep 1\n{model}")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntouch ran\n")
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], **SWEEP, "MIXINGS": "moa la", "MODEL": "./slow.sh"}
    environment |= {"SWEEP_DIR": "sweep", "PYTHON": str(python)}
    command = ["bash", str(ROOT / "examples/sweep.sh"), "--mock-data"]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 75
    assert not (tmp_path / "ran").exists()


def test_sweep_refuses_a_finished_run_of_other_flags(tmp_path: Path) -> None:
    python = tmp_path / "python"
    # Without a line of the last iteration, which need not have one.
    python.write_text(
        "#!/bin/sh\necho ' iteration        8/      10 | lm loss: 1.0E+00 |'\necho '[after training is done]'\n"
    )
    python.chmod(0o755)
    first = {"PYTHON": str(python), "MIXINGS": "moa", "LRS": "1e-3"}
    assert sweep(tmp_path, "--run", "0", "--mock-data", **first).returncode == 0
    assert sweep(tmp_path, "--list", **first).stdout.split()[-1] == "finished"
    assert sweep(tmp_path, "--run", "0", "--mock-data", **first).returncode == 0
    changed = sweep(tmp_path, "--run", "0", "--mock-data", **first, TOKENS="2560")
    assert (changed.returncode, "was begun with other flags" in changed.stderr) == (2, True)
    (tmp_path / "sweep/moa-lr1e-3-seed1/exit_code").unlink()  # as of one that was killed
    assert sweep(tmp_path, "--list", **first).stderr == ""


# Scripts.

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.sh", "**/*.sh", "**/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith((".venv", "runs", "build"))
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_cd_depends_on_cdpath(script: str) -> None:
    """With CDPATH a path such as examples/.. is looked for elsewhere, and cd prints what it found."""
    words = [line.split("#")[0] for line in (ROOT / script).read_text().splitlines()]
    changes = [index for index, line in enumerate(words) if re.search(r"(^|[(;&|] *)cd ", line.strip())]
    assert not changes or "unset CDPATH " in words[: changes[0]]


def test_scripts_start_where_cdpath_is_set() -> None:
    environment = {**os.environ, "CDPATH": str(ROOT)}
    command = ["bash", "examples/pretrain.sh", "dense-0.12b", "moa", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_least_rate_has_a_point_in_every_language(tmp_path: Path) -> None:
    """Debian's awk prints a comma in German; most machines have no German."""
    awk = tmp_path / "awk"
    awk.write_text(f'#!/bin/sh\n[ "$LC_ALL" = C ] || exec echo 0,0001\nexec {shutil.which("awk")} "$@"\n')
    awk.chmod(0o755)
    words = dry_run("dense-0.12b", "moa", PATH=f"{tmp_path}:{os.environ['PATH']}", LC_ALL="de_DE.UTF-8", **DATA)
    assert value(words, "--min-lr") == "0.0001"


@pytest.mark.parametrize("script", sorted(set(SCRIPTS)))
def test_shellcheck(script: str) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
