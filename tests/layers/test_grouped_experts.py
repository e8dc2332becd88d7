"""Compares grouped experts with sequential ones and with the reference.

Compared are values, gradients, memory, training and checkpoints.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import Tensor

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.errors import UserError
from megatron_moa.layers import grouped_linear
from megatron_moa.layers.grouped_linear import TorchColumnParallelGroupedLinear, stacked
from megatron_moa.megatron_fixes.optimizer_resharding import check_saved_split
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import FORMS, GATES, MixtureConfig
from megatron_moa.research.benchmarks.peak_memory import saved_for_backward
from megatron_moa.research.compare_runs import RunComparison, assemble
from megatron_moa.training.coefficient_monitor import CoefficientMonitor
from tests.support.layers import build_feed_forward, build_model, logits_of, make_config, moe_settings
from tests.support.training import MOE, SWIGLU, recorded, train
from tests.training.test_optimizer import EXPERTS, groups_of

pytestmark = pytest.mark.usefixtures("megatron")

GROUPED = "--moe-grouped-gemm"
MOA = MixtureConfig(gate_bias=True, amplitude="learned", backend="eager")
LA = MixtureConfig(kind="la", backend="eager")
full = pytest.mark.full
SIZES = {"uneven": [3, 0, 5, 2], "one has all": [0, 0, 7, 0], "none": [0, 0, 0, 0]}  # tokens of the four experts


def build(grouped: bool, mixture: MixtureConfig | None, **settings: Any) -> SequentialMLP | TEGroupedMLP:
    """Builds a layer's routed experts, with the same weights at each call.

    Biases and amplitudes are other than they start.
    """
    gated = mixture is None or mixture.gated
    settings = moe_settings(moe_grouped_gemm=grouped) | {"moe_ffn_hidden_size": 24} | settings
    tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    torch.manual_seed(3)
    experts = build_feed_forward(make_config(gated, **settings), mixture).experts
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in sorted(by_expert(experts).items()):
            if "coefficients" in name:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor))
    return experts


def by_expert(experts: SequentialMLP | TEGroupedMLP, gradients: bool = False) -> dict[str, Tensor | None]:
    """Returns parameters (or gradients) by the names they have in a sequential expert.

    Such a name is ``0.linear_fc1.weight``. Of a grouped layer's coefficients the values are views.
    """
    named: dict[str, Tensor | None] = {}
    for name, parameter in experts.named_parameters():
        tensor = parameter.grad if gradients else parameter
        linear, _, rest = name.partition(".weight")
        if rest.isdigit():
            named[f"{rest}.{linear}.weight"] = tensor
        elif name.startswith("local_experts."):
            named[name.removeprefix("local_experts.")] = tensor
        else:
            own = [None] * 4 if tensor is None else tensor.view(4, *parameter.shape[1:], -1).squeeze(-1)
            named |= {f"{expert}.{name}": part for expert, part in enumerate(own)}
    return named


def inputs(sizes: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [t, h], probabilities [t] and an output gradient [t, h], the first two with gradients."""
    generator = torch.Generator().manual_seed(5)
    tokens, gradient = torch.randn(2, sum(sizes), 16, generator=generator, dtype=torch.float64)
    probabilities = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    return tokens.to(dtype).requires_grad_(), probabilities.to(dtype).requires_grad_(), gradient.to(dtype)


def step(experts: SequentialMLP | TEGroupedMLP, sizes: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and every gradient."""
    x, probabilities, gradient = inputs(sizes, dtype)
    output, bias = experts(x, torch.tensor(sizes), probabilities)
    assert bias is None
    output.backward(gradient)
    return {
        "output": output.detach(),
        "x": x.grad,
        "probabilities": probabilities.grad,
        **by_expert(experts, gradients=True),
    }


def reference_step(experts: SequentialMLP, mixture: MixtureConfig, sizes: list[int]) -> dict[str, Tensor]:
    """What :func:`step` gives, by the reference feed-forward layer, in float64."""
    x, probabilities, gradient = inputs(sizes, torch.float64)
    copies = {name: p.detach().double().requires_grad_() for name, p in by_expert(experts).items()}
    outputs = []
    for expert, rows in enumerate(x.split(sizes)):
        own = {name.removeprefix(f"{expert}."): p for name, p in copies.items() if name.startswith(f"{expert}.")}
        coefficients = {
            "gate_weight": own.get("coefficients.weight"),
            "gate_bias": own.get("coefficients.bias"),
            "amplitude": own.get("coefficients.amplitude"),
            "coefficients": own.get("coefficients.value"),
        }
        fc1, fc2 = own["linear_fc1.weight"], own["linear_fc2.weight"]
        outputs.append(reference.feed_forward(rows, fc1, fc2, mixture, **coefficients))
    output = probabilities.unsqueeze(-1) * torch.cat(outputs)
    output.backward(gradient)
    gradients = {name: copy.grad for name, copy in copies.items()}
    return {"output": output.detach(), "x": x.grad, "probabilities": probabilities.grad, **gradients}


def mixtures() -> list[MixtureConfig]:
    """Every form as LA and MoA, every gate with bias and amplitude and without."""
    result = [MixtureConfig(kind=m, form=f, backend="eager") for m in ("la", "moa") for f in FORMS]
    for gate in GATES:
        result.append(MixtureConfig(gate=gate, gate_bias=True, amplitude="learned", backend="eager"))
        result.append(MixtureConfig(form="one-sided", gate=gate, activations=("silu", "tanh"), backend="eager"))
    return result


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mixture", mixtures(), ids=MixtureConfig.describe)
def test_equal_the_reference_and_sequential_experts(mixture: MixtureConfig, sizes: list[int]) -> None:
    sequential = build(False, mixture).double()
    expected = reference_step(sequential, mixture, sizes)
    actual = step(build(True, mixture).double(), sizes, torch.float64)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12, msg=name)
    for name, value in step(sequential, sizes, torch.float64).items():
        torch.testing.assert_close(actual[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixture", [MOA, LA, MixtureConfig(form="type1", backend="eager")], ids=MixtureConfig.describe)
def test_are_as_exact_as_sequential_experts(mixture: MixtureConfig, dtype: torch.dtype, sizes: list[int]) -> None:
    """Checks that errors against float64 are at most twice those of the sequential path.

    A rounding of the largest entry is allowed beside that.
    """
    sequential = build(False, mixture, params_dtype=dtype)
    expected = reference_step(sequential, mixture, sizes)
    usual = step(sequential, sizes, dtype)
    grouped = step(build(True, mixture, params_dtype=dtype), sizes, dtype)
    for name, value in grouped.items():
        assert value.dtype == usual[name].dtype == dtype
        if value.numel():
            error, usual_error = ((v[name].double() - expected[name]).abs().max() for v in (grouped, usual))
            rounding = torch.finfo(dtype).eps * expected[name].abs().max()
            assert error <= 2 * usual_error + rounding, (name, error, usual_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_experts_are_grouped_too(dtype: torch.dtype) -> None:
    """--moa-mixing none: the baseline's SwiGLU, through Megatron's own TEGroupedMLP."""
    usual = step(build(False, None, params_dtype=dtype), SIZES["uneven"], dtype)
    grouped = step(build(True, None, params_dtype=dtype), SIZES["uneven"], dtype)
    for name, value in usual.items():
        scale = value.abs().max().clamp_min(1e-30)  # an expert without tokens has a gradient of 0
        torch.testing.assert_close(grouped[name] / scale, value / scale, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("initialization", ["device", "cpu"])
@pytest.mark.parametrize("mixture", [None, LA, MOA], ids=["none", "la", "moa"])
def test_start_as_sequential_experts_do(mixture: MixtureConfig | None, initialization: str) -> None:
    settings = {"use_cpu_initialization": initialization == "cpu"}
    sequential, grouped = (by_expert(build(grouped, mixture, **settings)) for grouped in (False, True))
    after = []
    for kind in (False, True):  # and leave the random streams where those do
        build(kind, mixture, **settings)
        with tensor_parallel.get_cuda_rng_tracker().fork(tensor_parallel.get_expert_parallel_rng_tracker_name()):
            after.append(torch.rand(3))
    assert sequential.keys() == grouped.keys()
    for name, parameter in sequential.items():
        assert torch.equal(grouped[name], parameter), name
        if "coefficients" in name:
            continue  # one parameter of all experts
        marks = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
        assert [getattr(grouped[name], m, None) for m in marks] == [getattr(parameter, m, None) for m in marks], name
    assert torch.equal(*after)


def test_probabilities_on_the_input() -> None:
    settings = {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True}
    usual, grouped = (step(build(g, MOA, **settings).double(), SIZES["uneven"], torch.float64) for g in (False, True))
    plain = step(build(True, MOA).double(), SIZES["uneven"], torch.float64)
    assert not torch.allclose(grouped["output"], plain["output"])
    for name, value in usual.items():
        torch.testing.assert_close(grouped[name], value, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("hidden", "width"), [(12, 7), (16, 24)], ids=["odd sizes", "even sizes"])
def test_what_the_grouped_product_refuses(hidden: int, width: int, sizes: list[int]) -> None:
    """Rows that do not start at multiples of 16 bytes, and the gradient of a sum, which has no strides."""
    settings = {"hidden_size": hidden, "moe_ffn_hidden_size": width, "params_dtype": torch.bfloat16}
    results = {}
    for grouped in (False, True):
        experts = build(grouped, MOA, **settings)
        x = torch.ones(sum(sizes), hidden, dtype=torch.bfloat16, requires_grad=True)
        output, _ = experts(x, torch.tensor(sizes), torch.ones(sum(sizes)))
        output.sum().backward()
        results[grouped] = {"output": output, "x": x.grad} | by_expert(experts, gradients=True)
    for name, value in results[False].items():
        scale = value.abs().max().clamp_min(1e-30) if value.numel() else 1.0
        # Four roundings to bf16 lie between a token and its output, or back.
        close = {"rtol": 0, "atol": 4 * torch.finfo(torch.bfloat16).eps}
        torch.testing.assert_close(results[True][name] / scale, value / scale, msg=name, **close)


def test_frozen_coefficients_take_no_gradient() -> None:
    experts = build(True, MixtureConfig(gate_bias=True, freeze=True, backend="eager"))
    gradients = step(experts, SIZES["uneven"], torch.float32)
    assert all((grad is None) == ("coefficients" in name) for name, grad in gradients.items())


def test_coefficients_are_observed() -> None:
    """The monitor sees what it sees of sequential experts, and costs nothing while it does not look."""
    sums = {}
    for grouped in (False, True):
        tensor_parallel.model_parallel_cuda_manual_seed(3, force_reset_rng=True)
        torch.manual_seed(3)
        model = build_model(make_config(**moe_settings(moe_grouped_gemm=grouped)), MOA)
        monitor = CoefficientMonitor(MOA, interval=1)
        monitor.attach([model])
        monitor.begin_microbatch(0)
        logits_of(model)
        sums[grouped] = monitor._sums.clone()
        monitor.end_iteration()
        logits_of(model)
        assert torch.equal(monitor._sums, sums[grouped])
    assert sums[True][:, 0, 0, 0].unique().tolist() == [32]  # 16 tokens, two experts each
    torch.testing.assert_close(sums[True], sums[False], rtol=1e-6, atol=1e-6)


def kept_bytes(experts: SequentialMLP | TEGroupedMLP) -> int:
    """Bytes that a forward keeps beside the parameters."""
    x, probabilities, _ = inputs(SIZES["uneven"], torch.float32)
    sizes = torch.tensor(SIZES["uneven"])
    return saved_for_backward(lambda: experts(x, sizes, probabilities)[0], leave_out=experts.parameters()).bytes


def test_linears_keep_their_input_and_nothing_else() -> None:
    linear = build(True, MOA).linear_fc1
    x = torch.randn(10, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        linear(x, SIZES["uneven"])
    floats = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.is_floating_point()}
    assert floats == {x.untyped_storage().data_ptr(), linear.weight0.untyped_storage().data_ptr()}
    assert [tensor.numel() for tensor in kept if not tensor.is_floating_point()] == [4]  # where each group ends


@pytest.mark.parametrize("mixture", [MOA, LA, None], ids=["moa", "la", "none"])
def test_keep_no_more_for_backward_than_sequential_experts(mixture: MixtureConfig | None) -> None:
    sequential, grouped = build(False, mixture), build(True, mixture)
    # The eager backend gives every token its expert's coefficients.
    copies = 10 * 14 * 4 if mixture is LA else 0
    integers = 10 * 8 + 4 * 8  # which expert a token is of, and where experts end
    assert kept_bytes(grouped) <= kept_bytes(sequential) + copies + integers


@pytest.mark.parametrize("mixture", [MOA, pytest.param(LA, marks=full), None], ids=["moa", "la", "none"])
def test_recomputing_the_activation_step(mixture: MixtureConfig | None) -> None:
    kept: list[Tensor] = []
    results = []
    for recompute in (False, True):
        settings = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]} if recompute else {}
        experts = build(True, mixture, **settings)
        if recompute:
            experts.linear_fc2.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
        x, probabilities, gradient = inputs(SIZES["uneven"], torch.float32)
        output, _ = experts(x, torch.tensor(SIZES["uneven"]), probabilities)
        if recompute:
            assert kept[0].untyped_storage().size() == 0
        output.backward(gradient)
        results.append({"x": x.grad, "p": probabilities.grad} | by_expert(experts, gradients=True))
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


# Where the weights lie.


def linears(module: torch.nn.Module) -> list[grouped_linear.TorchGroupedLinear]:
    return [m for m in module.modules() if isinstance(m, grouped_linear.TorchGroupedLinear)]


def is_view(linear: grouped_linear.TorchGroupedLinear) -> bool:
    """Whether the grouped product takes the weights where they are; they are the right ones either way."""
    together = stacked(linear.weights)
    assert torch.equal(together, torch.stack(linear.weights))
    return together.data_ptr() == linear.weight0.data_ptr()


def wrapped(model: torch.nn.Module, distributed: bool, bucket_size: int | None = None) -> DistributedDataParallel:
    """As a training wraps it: with the distributed optimizer, parameters move into its buffer."""
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    layout = None
    if distributed:
        layout = DistributedOptimizer.compute_full_param_layout(list(model.parameters()), bucket_size, 1, config)
    return DistributedDataParallel(model.config, config, model, full_param_layout=layout)


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [24, 9], ids=["width 24", "width 9, padded"])
def test_weights_are_taken_where_they_lie(dtype: torch.dtype, width: int, distributed: bool) -> None:
    config = make_config(**moe_settings(moe_grouped_gemm=True, moe_ffn_hidden_size=width, params_dtype=dtype))
    model = build_model(config, MOA)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    data_parallel = wrapped(model, distributed)
    moved = [name for name, parameter in model.named_parameters() if parameter.data_ptr() != places[name]]
    assert len(moved) == (len(places) if distributed else 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert len(linears(model)) == 4
    assert all(map(is_view, linears(data_parallel)))


def test_weights_apart_are_copied_and_are_right(caplog: pytest.LogCaptureFixture) -> None:
    """Checks that weights which do not lie side by side are copied, and that the model still computes.

    A bucket ends between two experts, padded, where logits stay the same; and ``.to(dtype)`` moves every parameter by
    itself.
    """
    grouped_linear._log_copy.cache_clear()
    caplog.set_level("INFO", logger="megatron_moa.layers.grouped_linear")
    config = make_config(**moe_settings(moe_grouped_gemm=True, moe_ffn_hidden_size=9))
    model = build_model(config, MOA)
    expected = logits_of(model)
    assert "side by side" not in caplog.text
    wrapped(model, distributed=True, bucket_size=500)
    assert not all(map(is_view, linears(model)))
    assert "do not lie side by side" in caplog.text
    assert torch.equal(logits_of(model), expected)
    model.double()
    assert not any(map(is_view, linears(model)))
    torch.testing.assert_close(logits_of(model).float(), expected, rtol=1e-4, atol=1e-5)


def test_other_orders_and_overlaps_are_no_view() -> None:
    storage = torch.arange(48.0)
    first, second = storage[:12].view(3, 4), storage[12:24].view(3, 4)
    overlapping, transposed = storage[6:18].view(3, 4), storage[24:36].view(4, 3).t()
    assert stacked([first, second]).data_ptr() == storage.data_ptr()
    assert stacked([first]).data_ptr() == storage.data_ptr()
    for weights in ([second, first], [first, overlapping], [first, second, transposed], [first, second.clone()]):
        together = stacked(weights)
        assert torch.equal(together, torch.stack(weights))
        assert together.data_ptr() not in {weight.data_ptr() for weight in weights}


def test_a_weight_that_was_not_drawn_is_nan() -> None:
    config = make_config(**moe_settings())
    linear = TorchColumnParallelGroupedLinear(
        2, 8, 6, config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=True
    )
    assert all(weight.isnan().all() for weight in linear.weights)
    linear.draw(1)
    assert [weight.isnan().any().item() for weight in linear.weights] == [True, False]


# Trainings.

STEPS = 10
TOLERANCE = 1e-5  # relative: of a loss to itself, of a gradient to its own largest entry
_MOA = "--moa-mixing moa --moa-gate-bias --moa-amplitude learned"
_LA = "--moa-mixing la --moa-form quadratic"
_NONE = "--moa-mixing none"
_EP2 = "--expert-model-parallel-size 2"
_DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


def arm(flags: str) -> list[str]:
    backend = [] if flags.startswith(_NONE) else ["--moa-backend", "eager"]
    return [*SWIGLU, *MOE, *flags.split(), *backend, "--micro-batch-size", "1"]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "splits"),
    [
        pytest.param(_MOA, [(1, ""), (2, f"{_EP2} {_DISTRIBUTED}")], id="moa"),
        pytest.param(_LA, [(1, ""), (2, _EP2)], id="la"),
        pytest.param(_NONE, [(1, ""), (2, _EP2)], id="none"),
        pytest.param(_MOA, [(4, f"{_EP2} --expert-tensor-parallel-size 2")], id="moa-etp"),
        pytest.param(_LA, [(4, f"{_EP2} --expert-tensor-parallel-size 2")], id="la-etp"),
        pytest.param(_MOA, [(2, "--tensor-model-parallel-size 2 --sequence-parallel")], id="moa-tp"),
    ],
)
def test_train_as_sequential_experts_do(tmp_path: Path, flags: str, splits: list[tuple[int, str]]) -> None:
    start = tmp_path / "sequential"
    expected = recorded(start, *arm(flags), "--train-iters", str(STEPS))
    for index, (processes, split) in enumerate(splits):
        grouped = [*arm(flags), GROUPED, *split.split(), "--train-iters", str(STEPS)]
        run = recorded(tmp_path / str(index), *grouped, processes=processes, start_from=start)
        if processes == 1:  # from the same seed it starts from the same weights by itself
            alone = recorded(tmp_path / "alone", *grouped)
            assert all(torch.equal(a.data, b.data) for a, b in zip(alone.start, run.start, strict=True))
        comparison = RunComparison.of(expected, run)
        assert len(comparison.losses) == STEPS
        assert not comparison.missing
        assert comparison.within(TOLERANCE), (split, comparison)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("flags", "legs"),
    [
        pytest.param(_MOA, [(1, ""), (2, f"{GROUPED} {_EP2}"), (1, "")], id="moa"),
        pytest.param(_MOA, [(1, GROUPED), (2, _EP2), (2, f"{GROUPED} {_EP2}"), (1, "")], id="moa-ep", marks=full),
        pytest.param(
            f"{_MOA} {_DISTRIBUTED}", [(1, ""), (2, f"{GROUPED} {_EP2}"), (2, _EP2), (1, GROUPED)],
            id="moa-distributed", marks=full,
        ),
        pytest.param(f"{_LA} {_DISTRIBUTED} --bf16", [(1, GROUPED), (2, _EP2), (1, GROUPED)], id="la-bf16", marks=full),
        pytest.param(_NONE, [(1, GROUPED), (2, _EP2), (2, f"{GROUPED} {_EP2}")], id="none", marks=full),
    ],
)  # fmt: skip
def test_checkpoints_are_those_of_sequential_experts(tmp_path: Path, flags: str, legs: list[tuple[int, str]]) -> None:
    """Checks that every leg goes on from the last one's checkpoint, optimizer and all.

    Parameters are the same bit for bit, and the losses are those of sequential experts that were never stopped.
    """
    steps = 2 * len(legs)
    base = [*arm(flags), "--ckpt-format", "torch_dist", "--save-interval", "100", "--train-iters", str(steps)]
    whole = recorded(tmp_path / "whole", *base)
    expected = {step.iteration: step.losses["lm loss"] for step in whole.steps}
    tolerance = 2e-3 if "--bf16" in flags else TOLERANCE
    saved = None
    for leg, (processes, own) in enumerate(legs):
        load = [] if saved is None else ["--load", tmp_path / f"saved{leg - 1}"]
        files = [*load, "--save", tmp_path / f"saved{leg}", "--exit-interval", "2"]
        run = recorded(tmp_path / str(leg), *base, *own.split(), *files, processes=processes)
        assert [step.iteration for step in run.steps] == [2 * leg + 1, 2 * leg + 2]
        for step in run.steps:
            assert step.losses["lm loss"] == pytest.approx(expected[step.iteration], rel=tolerance), (leg, own, step)
        if saved is not None:
            assert {piece.key for piece in run.start} == saved.keys()
            for piece in run.start:
                assert torch.equal(piece.data, piece.of(saved[piece.key])), (leg, own, piece.key)
        saved = assemble(run.end)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("--optimizer muon --moa-gate-weight-decay 0.3 --moa-gate-lr-scale 0.5", 1),
        pytest.param(f"{_EP2} --use-distributed-optimizer --moa-gate-weight-decay 0.3", 2, marks=full),
        pytest.param(f"--optimizer muon --bf16 {_EP2} --use-distributed-optimizer", 2, marks=full),
        pytest.param("--moa-mixing la", 1, marks=full),
    ],
)
def test_parameters_are_trained_as_sequential_ones(tmp_path: Path, flags: str, processes: int) -> None:
    trained = []
    for kind in ("", GROUPED):
        folder = tmp_path / f"optimizer{kind}"
        folder.mkdir()
        gates = "" if "la" in flags.split() else "--moa-gate-bias --moa-amplitude learned"
        trained.append(groups_of(folder, f"{gates} {EXPERTS} {flags} {kind}", processes))
    sequential, grouped = trained
    renamed = {}
    for name, values in grouped.items():
        layer, _, rest = name.partition(".experts.linear_fc")
        number, _, expert = rest.partition(".weight")
        if rest:
            renamed[f"{layer}.experts.local_experts.{expert}.linear_fc{number}.weight"] = values
        elif ".experts.coefficients." in name:  # one parameter of all local experts
            experts = 2 if processes > 1 else 4
            for expert in range(experts):
                renamed[name.replace(".coefficients.", f".local_experts.{expert}.coefficients.")] = values
        else:
            renamed[name] = values
    assert renamed == sequential


@pytest.mark.slow
def test_a_refusal_is_one_line() -> None:
    run = train(*arm(_MOA), GROUPED, "--moe-mlp-glu-interleave-size", "16", "--train-iters", "1", check=False)
    assert run.returncode == 2
    (line,) = [line for line in run.log.splitlines() if "error:" in line]
    assert "--moe-mlp-glu-interleave-size 16: not supported by these grouped experts; drop it, or --moe-g" in line


def test_a_buffer_of_parameters_in_another_order_is_refused(tmp_path: Path) -> None:
    """A distributed optimizer's default checkpoint holds Megatron's buffer as it lies."""
    split = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    split |= {"expert_tensor_parallel_size": 1, "use_distributed_optimizer": True, "num_experts": 4}

    def args(grouped: bool, **changes: Any) -> argparse.Namespace:
        own = {"finetune": False, "no_load_optim": False, "moe_grouped_gemm": grouped, "transformer_impl": "local"}
        return argparse.Namespace(**{**split, **own, **changes})

    checkpoint = Checkpoint("--load", tmp_path, 3)
    check_saved_split(args(True), args(True), checkpoint)
    check_saved_split(args(True, num_experts=None), args(False, num_experts=None), checkpoint)
    check_saved_split(args(True), args(False, dist_ckpt_optim_fully_reshardable=True), checkpoint)
    with pytest.raises(UserError, match=r"the optimizer's state for .*, not --moe-grouped-gemm; go on under that, or"):
        check_saved_split(args(True), args(False), checkpoint)
    shared = {"moa_mixing": "moa", "moa_experts_share_parameters": True}
    check_saved_split(args(True, moa_mixing="moa"), args(True, **shared), checkpoint)
    check_saved_split(args(False, moa_mixing="moa"), args(False, moa_mixing="moa"), checkpoint)
    old = args(True, moa_mixing="moa", dist_ckpt_optim_fully_reshardable=True)
    check_saved_split(args(True, moa_mixing="moa"), old, checkpoint)
    with pytest.raises(UserError, match="for one parameter an expert, where grouped experts now share theirs; go on "):
        check_saved_split(args(True, moa_mixing="moa"), args(True, moa_mixing="moa"), checkpoint)
    engine = {"transformer_impl": "transformer_engine"}  # its norms have other places among the parameters
    check_saved_split(args(True), args(True, dist_ckpt_optim_fully_reshardable=True, **engine), checkpoint)
    with pytest.raises(UserError, match=r"--transformer-impl transformer_engine, not local; go on under that, or"):
        check_saved_split(args(True), args(True, **engine), checkpoint)
