"""Half precision and dropout: what is float32 stays so, and random numbers fit every split."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.research.compare_runs import RunComparison
from tests.support.layers import build_feed_forward, build_model, logits_of, make_config, moe_settings
from tests.support.training import MOE, SWIGLU, Run, recorded, train

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_config(name: str, gated: bool = True, **settings: object) -> object:
    """A config of a half-precision model."""
    return make_config(gated, params_dtype=HALF[name], **{name: True}, **settings)


# The arithmetic.


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("gate", GATES)
def test_gates_are_float32_within_its_rounding(gate: str, precision: str) -> None:
    for form in FORMS:
        mixture = MixtureConfig(form=form, gate=gate, gate_bias=True, amplitude="learned", backend="eager")
        layer = build_feed_forward(half_config(precision, mixture.gated, hidden_size=64), mixture)
        gates = layer.coefficients
        with torch.no_grad():
            gates.bias.normal_()
        x = torch.randn(7, 2, 64).to(HALF[precision])
        coefficients = gates(x)
        assert coefficients.dtype == torch.float32
        logits = x.double() @ gates.weight.double().t() + gates.bias.double()
        expected = reference.gate(logits, mixture, gates.amplitude.double())
        # A sum of 64 products in float32, then psi: a half-precision step anywhere is 2^-9 or 2^-12 off.
        torch.testing.assert_close(coefficients.double(), expected, rtol=64 * 2**-24, atol=64 * 2**-24)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("mixing_name", ["la", "moa"])
def test_a_half_precision_layer_is_the_float64_one_within_its_own_rounding(mixing_name: str, precision: str) -> None:
    mixture = MixtureConfig(kind=mixing_name, backend="eager")
    layer = build_feed_forward(half_config(precision), mixture)
    x = torch.randn(9, 2, 16).to(HALF[precision])
    preactivation, _ = layer.linear_fc1(x)
    activated = layer.fc1_and_mixture(x)
    assert activated.dtype == HALF[precision]
    coefficients = layer.coefficients(x).double()
    exact = reference.mix(preactivation.double(), coefficients, mixture)
    # One rounding to nearest of the exact value, of half an eps: nothing in between is in half precision.
    rounding = torch.finfo(HALF[precision]).eps / 2
    torch.testing.assert_close(activated.double(), exact, rtol=1.01 * rounding, atol=1e-5)


# The optimizer.


def trainer(precision: str, mixing_name: str, distributed: bool, lr: float) -> tuple[torch.nn.Module, object]:
    """A model wrapped as training wraps it, and Megatron's optimizer."""
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    # All four experts a token, so that each has gradients.
    config = half_config(precision, **moe_settings(moe_router_topk=4, moe_shared_expert_intermediate_size=12))
    model = Float16Module(config, build_model(config, MixtureConfig(kind=mixing_name, backend="eager")))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=False
    )
    wrapped = DistributedDataParallel(config, ddp_config, model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=0.0,
        params_dtype=HALF[precision],
        use_distributed_optimizer=distributed,
        loss_scale=16.0 if precision == "fp16" else None,
        **{precision: True},
    )
    return wrapped, get_megatron_optimizer(settings, [wrapped])


def step(model: torch.nn.Module, optimizer: object) -> None:
    """One step on fixed tokens, with a gradient in every coefficient."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    logits = logits_of(model)
    loss = (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()
    optimizer.scale_loss(loss).backward()
    model.finish_grad_sync()
    success, _, _ = optimizer.step()
    assert success


def coefficient_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those of gates and LA coefficients."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if isinstance(module, Coefficients)
        for leaf, parameter in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("precision", "distributed"),
    [
        pytest.param("bf16", False, marks=pytest.mark.full),
        ("bf16", True),
        ("fp16", False),
        pytest.param("fp16", True, marks=pytest.mark.full),
    ],
    ids=["bf16", "bf16-distributed optimizer", "fp16", "fp16-distributed optimizer"],
)
@pytest.mark.parametrize("mixing_name", [pytest.param("la", marks=pytest.mark.full), "moa"])
def test_steps_below_half_precision_add_up_in_the_master_copy(
    mixing_name: str, precision: str, distributed: bool
) -> None:
    lr = 2.0**-14  # LA starts at 1, below which bf16 steps by 2^-8 and fp16 by 2^-11: Adam's first steps are lr each
    model, optimizer = trainer(precision, mixing_name, distributed, lr)
    parameters = coefficient_parameters(model)
    assert len(parameters) == 2 * 5  # layers; four experts and the shared one
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    step(model, optimizer)
    for name, parameter in parameters.items():
        assert parameter.dtype == HALF[precision], name
        assert parameter.main_grad.dtype == torch.float32, name
        master = parameter.main_param
        assert master.dtype == torch.float32, name
        moved = (master.flatten() - start[name].float().flatten()).abs()
        with_gradient = parameter.main_grad.flatten() != 0
        assert with_gradient.any(), name
        assert (moved[with_gradient] > 0).all(), name
        assert moved.max() <= 1.01 * lr, name
        if mixing_name == "la":
            assert torch.equal(parameter, start[name]), name  # too small a step to show
    steps = int(torch.finfo(HALF[precision]).eps / lr)  # four times what a steady direction needs below 1
    for _ in range(steps):
        step(model, optimizer)
    for name, parameter in parameters.items():
        assert not torch.equal(parameter, start[name]), name
        assert torch.equal(parameter.flatten(), parameter.main_param.flatten().to(HALF[precision])), name


# Whole runs.

STEPS = 14


def loss_scales(run: Run) -> dict[int, float]:
    """Loss scale after each iteration."""
    return {int(i): float(s) for i, s in re.findall(r"iteration +(\d+)/.*?loss scale: ([0-9.]+)", run.log)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ([], 1),
        (["--use-distributed-optimizer", "--tensor-model-parallel-size", "2", "--sequence-parallel"], 2),
        pytest.param(["--moa-mixing", "la"], 1, marks=pytest.mark.full),
        pytest.param([*MOE, "--expert-model-parallel-size", "2"], 2, marks=pytest.mark.full),
    ],
    ids=["moa", "moa-tp2-sp-distopt", "la", "moe-ep2"],
)
def test_bf16_trains(flags: list[str], processes: int) -> None:
    run = train(*SWIGLU, "--bf16", "--moa-backend", "eager", "--train-iters", STEPS, *flags, processes=processes)
    assert re.search(r"accumulate_allreduce_grads_in_fp32 \.+ True", run.log)
    assert len(run.losses) == STEPS
    assert run.losses[STEPS] < run.losses[1] - 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], pytest.param(["--use-distributed-optimizer"], marks=pytest.mark.full)], ids=["", "distopt"]
)
def test_fp16_halves_its_scale_until_gradients_are_finite(flags: list[str]) -> None:
    scaling = ["--fp16", "--initial-loss-scale", 2**24, "--hysteresis", "1"]
    run = train(*SWIGLU, *scaling, "--moa-backend", "eager", "--train-iters", STEPS, *flags)
    scales = loss_scales(run)
    assert list(scales) == list(range(1, STEPS + 1))
    skipped = sorted(set(scales) - set(run.losses))  # an iteration with an infinite gradient logs no loss
    assert skipped == list(range(1, len(skipped) + 1))
    assert len(skipped) > 0
    assert [scales[i] for i in skipped] == [2.0 ** (24 - i) for i in skipped]
    last_skipped = scales[len(skipped)]
    trained = [run.losses[i] for i in range(len(skipped) + 1, STEPS + 1)]
    assert len(trained) >= 5
    assert {scales[i] for i in run.losses} == {last_skipped}
    assert trained[-1] < trained[0] - 0.2


# Dropout.

DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 10 --moa-backend eager"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("--tensor-model-parallel-size 2", marks=pytest.mark.full),
        "--tensor-model-parallel-size 2 --sequence-parallel",
        pytest.param("--pipeline-model-parallel-size 2", marks=pytest.mark.full),
        pytest.param("--use-distributed-optimizer", marks=pytest.mark.full),
        f"{' '.join(MOE)} --expert-model-parallel-size 2",
        pytest.param(
            f"{' '.join(MOE)} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2",
            marks=pytest.mark.full,
        ),
    ],
    ids=["tp2", "tp2-sp", "pp2", "dp2-distopt", "ep2", "etp2"],
)
def test_dropout_is_reproducible_and_copies_stay_equal(flags: str, tmp_path: Path) -> None:
    first, second = (
        recorded(tmp_path / name, *SWIGLU, *DROPOUT.split(), *flags.split(), processes=2) for name in ("a", "b")
    )
    comparison = RunComparison.of(first, second)
    assert len(comparison.losses) == 10
    assert comparison.within(0.0), comparison
    assert comparison.replicated > 0 or "pipeline" in flags
    assert first.steps[-1].losses["lm loss"] < first.steps[0].losses["lm loss"] - 0.2


@pytest.mark.slow
def test_dropout_is_on(tmp_path: Path) -> None:
    flags = [*SWIGLU, *DROPOUT.split(), "--train-iters", "1"]
    seen = set()
    for off in ([], ["--hidden-dropout", "0"], ["--attention-dropout", "0"]):
        run = recorded(tmp_path / "-".join(["run", *off]), *flags, *off)
        seen.add(run.steps[0].losses["lm loss"])
    assert len(seen) == 3
