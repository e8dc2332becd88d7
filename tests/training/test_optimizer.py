"""Tests how the mixture's parameters are trained.

That is read off the optimizer that a run builds, and off what the run leaves.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moa import startup
from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.command_line.flags import mixture_from_args
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.compare_runs import Record, TensorPiece
from megatron_moa.training.arguments import restore_model_flags
from megatron_moa.training.optimizer import check_saved_optimizer, check_saved_schedule
from megatron_moa.training.parser import parser_defaults
from tests.support import launch
from tests.support.layers import build_model, make_config
from tests.support.training import MOE, ROOT, SWIGLU, TINY, Run, record, train
from tests.training.test_arguments import parse

BASE = [*SWIGLU, "--moa-backend", "eager"]
MOA = "--moa-gate-bias --moa-amplitude learned"
LA = "--moa-mixing la"
EXPERTS = " ".join([*MOE, "--moe-shared-expert-intermediate-size 32"])
STEPS = 12  # of the schedule, where it is read out
LR, DECAY = 2e-3, 0.1  # TINY's


@dataclass(frozen=True)
class Trained:
    """How a run trains one parameter: torch's optimizer, and both rates at each step of the schedule."""

    optimizer: str
    learning_rates: list[float]
    decays: list[float]


def groups_of(folder: Path, flags: str, processes: int = 1) -> dict[str, Trained]:
    """Returns what a run with these flags would train, and how, by parameter name.

    An expert's name has its number on its rank.

    The real script builds model, optimizer and schedule, and ends before the first step.
    """
    arguments = [*TINY, *BASE, "--train-iters", str(STEPS), *flags.split()]
    returncode, log = launch.launch(_write_groups, (arguments, folder), processes, ROOT)
    assert returncode == 0, log[-6000:]
    trained: dict[str, Trained] = {}
    for file in sorted(folder.glob("groups*.json")):
        for name, values in json.loads(file.read_text()).items():
            assert trained.setdefault(name, Trained(*values)) == Trained(*values), name
    return trained


def _write_groups(arguments: list[str], folder: Path) -> None:
    startup.prepare()
    from megatron.training import get_args, training

    setup = training.setup_model_and_optimizer

    def setup_and_write(*args: Any, **kwargs: Any) -> None:
        models, optimizer, scheduler = setup(*args, **kwargs)
        groups = list(_groups(optimizer, models))
        rates = [[(group["lr"], group["weight_decay"]) for _, group, _ in groups]]
        for _ in range(STEPS - 1):
            scheduler.step(get_args().global_batch_size)
            rates.append([(group["lr"], group["weight_decay"]) for _, group, _ in groups])
        trained = {}
        for (by, _, names), history in zip(groups, zip(*rates, strict=True), strict=True):
            trained |= dict.fromkeys(names, (by, *zip(*history, strict=True)))
        (folder / f"groups{torch.distributed.get_rank()}.json").write_text(json.dumps(trained))
        torch.distributed.barrier()
        raise SystemExit(0)

    training.setup_model_and_optimizer = setup_and_write
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), arguments)


def _groups(optimizer: Any, models: list[torch.nn.Module]) -> Iterator[tuple[str, dict, list[str]]]:
    """The class of torch's optimizer, the group, and the names of its parameters on this rank."""
    if hasattr(optimizer, "chained_optimizers"):
        for part in optimizer.chained_optimizers:
            yield from _groups(part, models)
        return
    named = [(name.replace("module.", ""), p) for model in models for name, p in model.named_parameters()]
    for index, group in enumerate(optimizer.optimizer.param_groups):
        if hasattr(optimizer, "model_param_group_index_map"):  # the distributed one has shards in its groups
            places = optimizer.model_param_group_index_map
            names = [name for name, p in named if p in places and places[p][0] == index]
        else:  # bf16: the float32 copies
            members = set(map(id, group["params"]))
            names = [name for name, p in named if id(getattr(p, "main_param", p)) in members]
        yield type(optimizer.optimizer).__name__, group, names


def kinds_of(trained: dict[str, Trained]) -> dict[str, set[str]]:
    """The names of the mixture's parameters by their last part."""
    kinds: dict[str, set[str]] = {}
    for name in trained:
        if ".coefficients." in name:
            owner, kind = name.split(".coefficients.")
            kinds.setdefault(kind, set()).add(owner)
    return kinds


def owners(flags: str, processes: int) -> set[str]:
    """The layers and experts that have coefficients, by their names on their rank."""
    experts = 4 // (processes if "--expert-model-parallel-size" in flags else 1)
    parts = [""]
    if EXPERTS in flags:
        parts = [".shared_experts", *(f".experts.local_experts.{index}" for index in range(experts))]
    return {f"decoder.layers.{layer}.mlp{part}" for layer in range(2) for part in parts}


_DISTRIBUTED = "--use-distributed-optimizer"
_TP = "--tensor-model-parallel-size 2"
_EP = "--expert-model-parallel-size 2"


def case(name: str, matrices: str, flags: str, processes: int = 1, full: bool = False) -> object:
    """A run, and the class of the optimizer that has fc1."""
    marks = [pytest.mark.distributed] if processes > 1 else []
    return pytest.param(flags, processes, matrices, id=name, marks=[*marks, pytest.mark.full] if full else marks)


@pytest.mark.parametrize(
    ("flags", "processes", "matrices"),
    [
        case("adam", "AdamW", MOA),
        case("adam-la", "AdamW", LA),
        case("adam-dp2-distributed", "AdamW", f"{MOA} {_DISTRIBUTED}", 2, full=True),
        case("adam-tp2-distributed", "AdamW", f"{MOA} {_DISTRIBUTED} {_TP}", 2, full=True),
        case("adam-moe-ep2-distributed", "AdamW", f"{MOA} {EXPERTS} {_EP} {_DISTRIBUTED}", 2),
        case("adam-moe-la", "AdamW", f"{LA} {EXPERTS}", full=True),
        case("muon", "TensorParallelMuon", f"{MOA} --optimizer muon"),
        case("muon-la", "TensorParallelMuon", f"{LA} --optimizer muon"),
        case("muon-tp2", "TensorParallelMuon", f"{MOA} --optimizer muon {_TP}", 2),
        case("muon-tp2-distributed", "TensorParallelMuon", f"{MOA} --optimizer muon {_TP} {_DISTRIBUTED} --bf16", 2),
        case("muon-dp2-distributed", "TensorParallelMuon", f"{MOA} --optimizer muon {_DISTRIBUTED} --bf16", 2),
        case("dist_muon-dp2", "TensorParallelMuon", f"{MOA} --optimizer dist_muon --bf16", 2, full=True),
        case("muon-moe", "TensorParallelMuon", f"{MOA} {EXPERTS} --optimizer muon"),
        case("muon-moe-la", "TensorParallelMuon", f"{LA} {EXPERTS} --optimizer muon", full=True),
        case("muon-moe-ep2", "TensorParallelMuon", f"{MOA} {EXPERTS} {_EP} --optimizer muon", 2, full=True),
        case(
            "muon-moe-ep2-distributed",
            "TensorParallelMuon",
            f"{MOA} {EXPERTS} {_EP} --optimizer muon {_DISTRIBUTED} --bf16",
            2,
        ),
        case("soap", "SOAP", f"{MOA} --optimizer soap"),
        case("lion", "Lion", f"{MOA} --optimizer lion", full=True),
    ],
)
def test_adam_trains_the_mixture_and_decays_its_matrices_only(
    tmp_path: Path, flags: str, processes: int, matrices: str
) -> None:
    trained = groups_of(tmp_path, flags, processes)
    kinds = kinds_of(trained)
    assert set(kinds) == ({"value"} if LA in flags else {"weight", "bias", "amplitude"})
    for kind, found in kinds.items():
        assert found == owners(flags, processes)
        for owner in found:
            values = trained[f"{owner}.coefficients.{kind}"]
            assert values.optimizer == "AdamW"
            assert set(values.decays) == {DECAY if kind == "weight" else 0.0}
            assert values.learning_rates == trained["embedding.word_embeddings.weight"].learning_rates
    feed_forward = [values for name, values in trained.items() if name.endswith("linear_fc1.weight")]
    assert len(feed_forward) == len(owners(flags, processes))
    assert {values.optimizer for values in feed_forward} == {matrices}


_SCHEDULES = {
    "cosine": "--lr-decay-style cosine --lr-warmup-iters 3",
    "wsd": "--lr-decay-style WSD --lr-wsd-decay-iters 5 --lr-wsd-decay-style exponential --lr-warmup-iters 3",
    "inverse-square-root": "--lr-decay-style inverse-square-root --lr-warmup-iters 3 --lr-warmup-init 1e-4",
}


@pytest.mark.parametrize("style", ["cosine", "wsd", pytest.param("inverse-square-root", marks=pytest.mark.full)])
def test_learning_rate_is_scaled_at_every_step(tmp_path: Path, style: str) -> None:
    flags = f"{MOA} --optimizer muon --moa-gate-lr-scale 0.25 {_SCHEDULES[style]}"
    trained = groups_of(tmp_path, flags)
    base = trained["decoder.layers.0.mlp.linear_fc1.weight"].learning_rates
    assert len(set(base)) > STEPS / 2
    for name, values in trained.items():
        factor = 0.25 if ".coefficients." in name else 1
        assert values.learning_rates == pytest.approx([factor * rate for rate in base], rel=1e-12), name


def test_coefficients_of_la_are_scaled_too(tmp_path: Path) -> None:
    trained = groups_of(tmp_path, f"{LA} --moa-gate-lr-scale 3")
    assert trained["decoder.layers.1.mlp.coefficients.value"].learning_rates[0] == pytest.approx(3 * LR)


_RISING = "--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1"


@pytest.mark.parametrize("decay", [None, 0.3, 0.0])
def test_decay_of_gates_follows_the_schedule_unless_it_has_its_own(tmp_path: Path, decay: float | None) -> None:
    flag = "" if decay is None else f"--moa-gate-weight-decay {decay}"
    trained = groups_of(tmp_path, f"{MOA} {_RISING} {flag}")
    rising = trained["decoder.layers.0.mlp.linear_fc1.weight"].decays
    assert rising[0] < rising[1] < rising[-1]
    mlp = "decoder.layers.1.mlp.coefficients"
    assert trained[f"{mlp}.weight"].decays == (rising if decay is None else [decay] * STEPS)
    assert set(trained[f"{mlp}.bias"].decays) == set(trained[f"{mlp}.amplitude"].decays) == {0.0}


def test_no_flag_of_megatrons_decays_the_vectors(tmp_path: Path) -> None:
    trained = groups_of(tmp_path, f"{MOA} --qk-layernorm --apply-wd-to-qk-layernorm")
    assert set(trained["decoder.layers.0.self_attention.q_layernorm.weight"].decays) == {DECAY}
    assert {d for n, v in trained.items() if n.endswith((".bias", ".amplitude")) for d in v.decays} == {0.0}


def test_decoupled_learning_rate_is_not_the_gates(tmp_path: Path) -> None:
    trained = groups_of(tmp_path, f"{MOA} --optimizer muon --decoupled-lr 1e-2 --decoupled-min-lr 1e-3")
    assert trained["embedding.word_embeddings.weight"].learning_rates[0] == pytest.approx(1e-2)
    assert trained["decoder.layers.0.mlp.coefficients.weight"].learning_rates[0] == pytest.approx(LR)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_width_scaling_takes_gates_as_adams_matrices(tmp_path: Path, optimizer: str) -> None:
    flags = f"{MOA} --optimizer {optimizer} --use-mup --mup-base-hidden-size 16 --moa-gate-lr-scale 0.5"
    trained = groups_of(tmp_path, flags)
    mlp = "decoder.layers.0.mlp.coefficients"
    assert trained[f"{mlp}.weight"].learning_rates[0] == pytest.approx(0.5 * LR / 2)  # twice as wide as the base
    assert trained[f"{mlp}.bias"].learning_rates[0] == pytest.approx(0.5 * LR)


@pytest.mark.usefixtures("megatron")
def test_layer_wise_buffers_leave_gates_out() -> None:
    """Checks that buffers which Megatron lays out itself agree with the groups of parameters.

    Megatron lays them out where its own script is run with --spec.
    """
    from megatron.training.training import tag_params_for_buffer_routing

    model = build_model(make_config(), MixtureConfig())
    tag_params_for_buffer_routing([model])
    mlp = model.decoder.layers[0].mlp
    assert mlp.linear_fc1.weight.is_managed_by_layer_wise_optimizer
    assert not mlp.coefficients.weight.is_managed_by_layer_wise_optimizer


# What a run leaves.


def _is_mixture(piece: TensorPiece) -> bool:
    return ".coefficients." in piece.key


@pytest.mark.parametrize(
    ("flags", "processes", "matrices"),
    [
        case("adam", "AdamW", MOA),
        case("adam-la-dp2-distributed", "AdamW", f"{LA} {_DISTRIBUTED}", 2, full=True),
        case("adam-moe-ep2-distributed", "AdamW", f"{MOA} {EXPERTS} {_EP} {_DISTRIBUTED}", 2, full=True),
        case("muon-tp2-sp", "TensorParallelMuon", f"{MOA} --optimizer muon {_TP} --sequence-parallel", 2, full=True),
        case("muon-la", "TensorParallelMuon", f"{LA} --optimizer muon", full=True),
        case(
            "muon-moe-ep2-distributed",
            "TensorParallelMuon",
            f"{MOA} {EXPERTS} {_EP} --optimizer muon {_DISTRIBUTED} --bf16",
            2,
        ),
    ],
)
def test_frozen_is_frozen(tmp_path: Path, flags: str, processes: int, matrices: str) -> None:
    flags = f"{flags} --moa-freeze-gates"
    trained = groups_of(tmp_path, flags, processes)
    assert not kinds_of(trained)  # so that there is no state for them either
    assert matrices in {values.optimizer for values in trained.values()}
    record(tmp_path / "run", *BASE, "--train-iters", "3", *flags.split(), processes=processes)
    run = Record.read(tmp_path / "run")
    moved = {_is_mixture(start): 0 for start in run.start}
    assert moved.keys() == {True, False}
    for start, end in zip(run.start, run.end, strict=True):
        assert (start.key, start.offset) == (end.key, end.offset)
        moved[_is_mixture(start)] += not torch.equal(start.data, end.data)
    others = [piece for piece in run.start if not _is_mixture(piece)]
    assert moved[True] == 0
    assert moved[False] == len(others)


def learning_rates(run: Run) -> dict[int, str]:
    """The logged learning rate by iteration."""
    return {int(i): rate for i, rate in re.findall(r"iteration +(\d+)/.*?learning rate: ([0-9.E+-]+)", run.log)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        pytest.param(f"{MOA} {_SCHEDULES['cosine']} --moa-gate-lr-scale 0.5", 1, id="cosine-adam"),
        pytest.param(
            f"{MOA} --optimizer muon {_SCHEDULES['wsd']} --moa-gate-lr-scale 2 --moa-gate-weight-decay 0.3",
            1,
            id="wsd-exponential-muon",
        ),
        pytest.param(
            f"{LA} {_DISTRIBUTED} --lr-decay-style WSD --lr-wsd-decay-iters 6 --lr-wsd-decay-style minus_sqrt",
            2,
            id="wsd-minus_sqrt-adam-distributed",
            marks=[pytest.mark.distributed, pytest.mark.full],
        ),
        pytest.param(
            f"{MOA} {EXPERTS} {_EP} --optimizer muon {_DISTRIBUTED} --bf16 {_SCHEDULES['cosine']}",
            2,
            id="cosine-muon-moe-distributed",
            marks=[pytest.mark.distributed, pytest.mark.full],
        ),
    ],
)
def test_training_goes_on_in_the_middle_of_the_decay(tmp_path: Path, flags: str, processes: int) -> None:
    stop, last = 9, STEPS
    arguments = [*BASE, *flags.split(), "--train-iters", str(last)]
    save = ["--save", tmp_path / "checkpoint", "--save-interval", str(stop), "--exit-interval", str(stop)]
    whole = record(tmp_path / "whole", *arguments, processes=processes)
    first = record(tmp_path / "first", *arguments, *save, processes=processes)
    rest = record(tmp_path / "rest", *arguments, "--load", tmp_path / "checkpoint", processes=processes)
    rates = learning_rates(whole)
    assert len({rates[step] for step in range(stop - 1, last + 1)}) == last - stop + 2  # it falls at each of these
    assert learning_rates(first) | learning_rates(rest) == rates
    assert max(learning_rates(first)) == stop
    steps = Record.read(tmp_path / "whole").steps
    assert Record.read(tmp_path / "rest").steps == steps[stop:]


def test_flags_travel_with_the_checkpoint(tmp_path: Path) -> None:
    flags = "--train-iters 1 --moa-gate-lr-scale 0.5 --moa-gate-weight-decay 0.3 --save-interval 1 --save"
    train(*BASE, *flags.split(), tmp_path / "c")
    trained = groups_of(tmp_path, f"--load {tmp_path / 'c'} --use-checkpoint-args --override-opt-param-scheduler")
    gate, fc1 = (trained[f"decoder.layers.0.mlp.{name}.weight"] for name in ("coefficients", "linear_fc1"))
    assert gate.learning_rates == pytest.approx([0.5 * rate for rate in fc1.learning_rates])
    assert set(gate.decays) == {0.3}


def test_a_given_flag_comes_before_the_checkpoints() -> None:
    saved = parse("--moa-gate-lr-scale", "0.5", "--moa-gate-weight-decay", "0.3")
    mixture_from_args(saved)
    args = parse("--moa-gate-lr-scale", "2")
    restore_model_flags(args, saved)
    assert (args.moa_gate_lr_scale, args.moa_gate_weight_decay) == (2, 0.3)
    args = parse("--moa-gate-lr-scale", "2")
    restore_model_flags(args, argparse.Namespace(moa_mixing="moa"))  # saved before there were these flags
    assert (args.moa_gate_lr_scale, args.moa_gate_weight_decay) == (2, None)


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--moa-gate-lr-scale -1", ["--moa-gate-lr-scale -1.0", "positive"]),
        ("--moa-gate-lr-scale 0", ["--moa-gate-lr-scale 0.0", "--moa-freeze-gates"]),
        ("--moa-gate-lr-scale inf", ["--moa-gate-lr-scale inf", "positive"]),
        ("--moa-gate-lr-scale nan", ["--moa-gate-lr-scale nan", "positive"]),
        ("--moa-gate-weight-decay -0.1", ["--moa-gate-weight-decay -0.1", "0 or more"]),
        ("--moa-gate-weight-decay nan", ["--moa-gate-weight-decay nan", "0 or more"]),
        ("--moa-gate-weight-decay inf", ["--moa-gate-weight-decay inf", "0 or more"]),
        *(
            (f"{flag} 1e300", ["1e+300", "from 1e-30 to 10000"])
            for flag in (
                "--moa-gate-lr-scale",
                "--moa-gate-weight-decay",
                "--moa-gate-init-std",
                "--moa-mixing la --moa-init",
            )
        ),
        ("--moa-gate-lr-scale 2 --moa-freeze-gates", ["--moa-gate-lr-scale 2.0", "--moa-freeze-gates"]),
        ("--moa-gate-weight-decay 0 --moa-freeze-gates", ["--moa-gate-weight-decay 0.0", "--moa-freeze-gates"]),
        ("--moa-gate-weight-decay 0.1 --moa-mixing la", ["--moa-gate-weight-decay 0.1", "--moa-mixing la"]),
        ("--moa-gate-lr-scale 2 --moa-mixing none", ["--moa-gate-lr-scale 2.0", "--moa-mixing none"]),
        ("--moa-gate-weight-decay 0 --moa-mixing none", ["--moa-gate-weight-decay 0.0", "--moa-mixing none"]),
    ],
)
def test_wrong_values_are_named(flags: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        mixture_from_args(parse(*flags.split()))
    assert all(part in str(error.value) for part in parts), error.value


def test_shared_out_matrix_optimizer_needs_bf16() -> None:
    run = train(*BASE, "--train-iters", "1", "--optimizer", "muon", _DISTRIBUTED, check=False)
    assert run.returncode == 2
    assert "error: --optimizer muon --use-distributed-optimizer: " in run.log.splitlines()[-1]
    assert "--bf16" in run.log.splitlines()[-1]


_LOADED = {"finetune": False, "no_load_optim": False, "optimizer": "adam", "lr": 1e-3, "min_lr": 1e-4}
_LOADED |= {"decoupled_lr": None, "decoupled_min_lr": None, "muon_scalar_optimizer": "adam"}
_LOADED |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "muon_momentum": 0.95}
_OURS = {"moa_gate_lr_scale": 1.0, "moa_gate_weight_decay": None, "moa_freeze_gates": False}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"moa_gate_lr_scale": 2.0}, "--moa-gate-lr-scale 2.0: the optimizer to load has --moa-gate-lr-scale 1.0"),
        ({"moa_gate_weight_decay": 0.0}, "--moa-gate-weight-decay 0.0: the optimizer to load has no --moa-gate-weight"),
        ({"moa_freeze_gates": True}, "--moa-freeze-gates: the optimizer to load has no --moa-freeze-gates"),
        ({"lr": 2e-3}, "--lr 0.002: the optimizer to load has --lr 0.001"),
        ({"min_lr": 0.0}, "--min-lr 0.0: the optimizer to load has --min-lr 0.0001"),
        ({"optimizer": "muon"}, "--optimizer muon: the optimizer to load has --optimizer adam"),
        ({"decoupled_lr": 2e-3}, "--decoupled-lr 0.002: the optimizer to load has no --decoupled-lr"),
        ({"decoupled_min_lr": 1e-5}, "--decoupled-min-lr 1e-05: the optimizer to load has no --decoupled-min-lr"),
    ],
)
def test_another_optimizers_state_is_refused(given: dict[str, Any], text: str) -> None:
    saved = argparse.Namespace(**_LOADED)  # before there were our flags
    checkpoint = Checkpoint("--load", Path("folder"), 10)
    check_saved_optimizer(argparse.Namespace(**_LOADED, **_OURS), saved, checkpoint)
    args = {**_LOADED, **_OURS, **given}
    with pytest.raises(UserError, match=re.escape(text)) as error:
        check_saved_optimizer(argparse.Namespace(**args), saved, checkpoint)
    assert "--no-load-optim" in str(error.value)
    assert "--load folder: iteration 10" in str(error.value)
    for anew in ({"no_load_optim": True}, {"finetune": True}):
        check_saved_optimizer(argparse.Namespace(**{**args, **anew}), saved, checkpoint)
    check_saved_optimizer(argparse.Namespace(**args), argparse.Namespace(**_LOADED, no_save_optim=True), checkpoint)
    check_saved_optimizer(argparse.Namespace(**args), saved, Checkpoint("--pretrained-checkpoint", Path("folder"), 10))
    check_saved_optimizer(argparse.Namespace(**args), saved, Checkpoint("--load", Path("folder"), None))


_SCHEDULE = {
    "train_iters": 100,
    "train_samples": None,
    "lr_decay_iters": None,
    "lr_decay_samples": None,
    "lr_warmup_iters": 10,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "lr_decay_style": "cosine",
    "lr_warmup_init": 0.0,
    "lr_wsd_decay_iters": None,
    "lr_wsd_decay_samples": None,
    "lr_wsd_decay_style": "exponential",
    "weight_decay": 0.1,
    "start_weight_decay": 0.1,
    "end_weight_decay": 0.1,
    "weight_decay_incr_style": "constant",
    "global_batch_size": 4,
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
}
_IN_SAMPLES = {"train_iters": None, "train_samples": 400, "lr_warmup_iters": 0, "lr_warmup_samples": 40}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, None),
        ({"lr_decay_iters": 100}, None),
        (_IN_SAMPLES, None),
        ({"lr_warmup_iters": 0, "lr_warmup_fraction": 0.1}, None),
        ({"train_iters": 120}, "--train-iters 120: the schedule to go on with has --train-iters 100"),
        ({"lr_decay_iters": 90}, "--lr-decay-iters 90: the schedule to go on with has --lr-decay-iters 100"),
        ({"lr_warmup_iters": 5}, "--lr-warmup-iters 5: the schedule to go on with has --lr-warmup-iters 10"),
        ({"lr_decay_style": "WSD"}, "--lr-decay-style WSD: the schedule to go on with has --lr-decay-style cosine"),
        (
            {"weight_decay": 0.2, "start_weight_decay": 0.2, "end_weight_decay": 0.2},
            "--weight-decay 0.2: the schedule to go on with has --weight-decay 0.1",
        ),
        (
            {"weight_decay_incr_style": "linear", "end_weight_decay": 0.2},
            "--weight-decay-incr-style linear: the schedule to go on with has --weight-decay-incr-style constant",
        ),
        ({"global_batch_size": 8}, "--global-batch-size 8: the schedule to go on with has --global-batch-size 4"),
        (
            {**_IN_SAMPLES, "train_samples": 500},
            "--train-samples 500: the schedule to go on with has --train-iters 100",
        ),
    ],
)
def test_another_schedule_is_refused(given: dict[str, Any], text: str | None) -> None:
    saved, checkpoint = argparse.Namespace(**_LOADED, **_SCHEDULE), Checkpoint("--load", Path("folder"), 10)
    args = {**_LOADED, **_SCHEDULE, **given}
    if text is None:
        check_saved_schedule(argparse.Namespace(**args), saved, checkpoint)
        return
    with pytest.raises(UserError, match=re.escape(text)) as error:
        check_saved_schedule(argparse.Namespace(**args), saved, checkpoint)
    assert "--override-opt-param-scheduler" in str(error.value)
    for remedy in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler", "no_load_optim"):
        check_saved_schedule(argparse.Namespace(**{**args, remedy: True}), saved, checkpoint)


_WSD = {**_SCHEDULE, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 20}


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [("adam", "adam_beta2"), ("adam", "adam_eps"), ("sgd", "sgd_momentum"), ("muon", "muon_momentum")]
    + [("muon", "adam_beta1"), ("lion", "lion_beta2")],
)
def test_what_the_saved_groups_have_is_not_changed(optimizer: str, name: str) -> None:
    """Megatron takes betas and momentum from the checkpoint without a word."""
    run = argparse.Namespace(**{**parser_defaults(), **_LOADED, "optimizer": optimizer})
    saved = argparse.Namespace(**{**vars(run), name: getattr(run, name) / 2})
    checkpoint = Checkpoint("--load", Path("folder"), 10)
    check_saved_optimizer(run, argparse.Namespace(**vars(run)), checkpoint)
    with pytest.raises(UserError, match=f"^{as_typed(name, getattr(run, name))}: the optimizer to load has ") as error:
        check_saved_optimizer(run, saved, checkpoint)
    assert str(error.value).endswith("give that, or start a new optimizer and schedule with --no-load-optim")
    other = "sgd_momentum" if optimizer != "sgd" else "adam_beta1"
    check_saved_optimizer(run, argparse.Namespace(**{**vars(run), other: 0.1}), checkpoint)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, None),
        ({**_IN_SAMPLES, "lr_wsd_decay_iters": None, "lr_wsd_decay_samples": 80}, None),
        ({"lr_wsd_decay_iters": 30}, "--lr-wsd-decay-iters 30: the schedule to go on with has --lr-wsd-decay-iters 20"),
        ({"lr_wsd_decay_style": "cosine"}, "--lr-wsd-decay-style cosine: the schedule to go on with has --lr-wsd-"),
        ({"lr_warmup_init": 1e-5}, "--lr-warmup-init 1e-05: the schedule to go on with has --lr-warmup-init 0.0"),
        (
            {**_IN_SAMPLES, "lr_wsd_decay_iters": None, "lr_wsd_decay_samples": 100},
            "--lr-wsd-decay-samples 100: the schedule to go on with has --lr-wsd-decay-iters 20",
        ),
    ],
)
def test_another_end_of_a_wsd_schedule_is_refused(given: dict[str, Any], text: str | None) -> None:
    """Megatron's checkpoints do not have it, so the old one cannot be followed by a flag either."""
    saved, checkpoint = argparse.Namespace(**_LOADED, **_WSD), Checkpoint("--load", Path("folder"), 10)
    args = {**_LOADED, **_WSD, **given}
    for follow in ({}, {"use_checkpoint_opt_param_scheduler": True}):
        run = argparse.Namespace(**{**args, **follow})
        if text is None:
            check_saved_schedule(run, saved, checkpoint)
            continue
        with pytest.raises(UserError, match=re.escape(text)) as error:
            check_saved_schedule(run, saved, checkpoint)
        assert str(error.value).endswith("or add --override-opt-param-scheduler to follow the new one")
    check_saved_schedule(argparse.Namespace(**{**args, "override_opt_param_scheduler": True}), saved, checkpoint)


def test_the_saved_wsd_schedule_needs_its_end() -> None:
    """A cosine run that follows it failed in Megatron's first step, for want of a length."""
    saved, checkpoint = argparse.Namespace(**_LOADED, **_WSD), Checkpoint("--load", Path("folder"), 10)
    run = argparse.Namespace(**{**_LOADED, **_SCHEDULE, "use_checkpoint_opt_param_scheduler": True})
    with pytest.raises(UserError, match=r"--lr-wsd-decay-iters 0: the schedule to go on with has .* 20 "):
        check_saved_schedule(run, saved, checkpoint)


def test_another_optimizer_beside_muon_is_refused() -> None:
    checkpoint, muon = Checkpoint("--load", Path("folder"), 10), {**_LOADED, "optimizer": "muon"}
    args = argparse.Namespace(**{**muon, **_OURS, "muon_scalar_optimizer": "lion"})
    with pytest.raises(UserError, match=r"--muon-scalar-optimizer lion: the optimizer to load has .* adam "):
        check_saved_optimizer(args, argparse.Namespace(**muon), checkpoint)
    args.optimizer = "adam"  # then nothing reads the flag
    check_saved_optimizer(args, argparse.Namespace(**_LOADED), checkpoint)


def test_a_refused_checkpoint_is_one_line(tmp_path: Path) -> None:
    save = ["--save", tmp_path, "--save-interval", "1"]
    train(*BASE, "--train-iters", "1", *save)
    flags = "--train-iters 2 --moa-gate-lr-scale 2 --override-opt-param-scheduler --load".split()
    run = train(*BASE, *flags, tmp_path, check=False)
    assert run.returncode == 2
    assert "Traceback" not in run.log
    assert "error: --moa-gate-lr-scale 2.0: the optimizer to load has " in run.log.splitlines()[-1]
    run = train(*BASE, "--train-iters", "2", "--load", tmp_path, check=False)
    assert run.returncode == 2
    assert "error: --train-iters 2: the schedule to go on with has --train-iters 1 " in run.log.splitlines()[-1]
