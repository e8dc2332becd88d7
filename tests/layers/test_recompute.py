"""Checks that recomputed activations give every gradient bit for bit.

The gradients are those of a model that keeps its activations, and the activations are indeed recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from megatron_moa.errors import UserError
from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.layers.norm_and_attention import TorchAttention, TorchRMSNorm
from megatron_moa.mixture import reference
from megatron_moa.mixture.config import FORMS, MixtureConfig
from megatron_moa.research.compare_runs import RunComparison
from megatron_moa.training import recompute
from megatron_moa.training.coefficient_monitor import CoefficientMonitor
from tests.support.layers import build_model, logits_of, make_config, moe_settings
from tests.support.training import MOE, SWIGLU, recorded, train

pytestmark = pytest.mark.usefixtures("megatron")

FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
# The sum of an input's gradients is grouped otherwise there (the norm's or the shared expert's are summed first): equal
# but for rounding, which float64 shows.
REGROUPED = ("layernorm", "shared_experts")

# In two layers: what is recomputed, and how often its forward runs then (the final norm never twice, a dense layer has
# two other norms; of three mixtures in a MoE layer, two experts' and the shared one's, moe_act leaves out the latter).
DENSE = [
    ({**FULL, "recompute_method": "uniform"}, TransformerLayer, 4),
    ({**FULL, "recompute_method": "block"}, TransformerLayer, 3),  # one layer of the two
    ("core_attn", TorchAttention, 4),
    ("mlp", MixedMLP, 4),
    ("layernorm", TorchRMSNorm, 9),
    ("core_attn mlp layernorm", MixedMLP, 4),
]
MOE_LAYERS = [
    ({**FULL, "recompute_method": "uniform"}, TransformerLayer, 4),
    ("core_attn", TorchAttention, 4),
    ("moe", MixedMLP, 12),
    ("shared_experts", MixedMLP, 8),
    ("moe_act", "mixture", 10),
    ("layernorm", TorchRMSNorm, 9),
    ("moe_act shared_experts layernorm", "mixture", 12),
]
MIXTURES = [MixtureConfig(kind=mixing, form=form, backend="eager") for mixing in ("la", "moa") for form in FORMS]
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.2}


def configured(moe: bool, gated: bool, kept: str | dict[str, Any] | None) -> Any:
    """A config that recomputes these modules (or with these settings)."""
    settings: dict[str, Any] = dict(DROPOUT)
    if moe:
        settings |= moe_settings(num_moe_experts=2, moe_router_topk=2, moe_shared_expert_intermediate_size=12)
    if isinstance(kept, dict):
        settings |= kept
    config = make_config(gated, **settings)
    if isinstance(kept, str):
        # Not through the constructor, which refuses moe_act; model_config_from_args goes around it, tested below.
        config.recompute_granularity, config.recompute_modules = "selective", kept.split()
    return config


def build(moe: bool, mixture: MixtureConfig | None, kept: str | dict[str, Any] | None) -> torch.nn.Module:
    """The same model and the same random numbers at each call."""
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    model = build_model(configured(moe, mixture is None or mixture.gated, kept), mixture)
    tensor_parallel.model_parallel_cuda_manual_seed(12)
    return model


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How often each class's forward, and the mixture, ran inside."""
    calls: Counter = Counter()

    def count(module: torch.nn.Module, *_: object) -> None:
        calls.update(
            cls for cls in (TransformerLayer, TorchAttention, TorchRMSNorm, MixedMLP) if isinstance(module, cls)
        )

    def mixed_activation(*args: Any) -> Tensor:
        calls["mixture"] += 1
        return original(*args)

    original = reference.mixed_activation
    hook = register_module_forward_hook(count)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "mixed_activation", mixed_activation)  # all mixtures here are eager
        yield calls
    hook.remove()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's, of one step; the logits among them."""
    logits = logits_of(model)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())
    return {**found, "logits": logits.detach()}


def assert_same(kept: dict[str, Tensor], recomputed: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Equal to the bit, or with the tolerance, relative to each tensor's largest entry."""
    assert kept.keys() == recomputed.keys()
    differences = {name: (recomputed[name] - grad).abs().max() / grad.abs().max() for name, grad in kept.items()}
    assert {name: d.item() for name, d in differences.items() if not d <= tolerance} == {}


def assert_recomputed(
    moe: bool,
    mixture: MixtureConfig,
    modules: str | dict[str, Any],
    counted: object,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    regrouped = isinstance(modules, str) and any(name in REGROUPED for name in modules.split())
    dtype = torch.float64 if regrouped else torch.float32
    expected = gradients(build(moe, mixture, None).to(dtype))
    with counting(monkeypatch) as calls:
        recomputed = gradients(build(moe, mixture, modules).to(dtype))
    assert_same(expected, recomputed, tolerance=1e-13 if regrouped else 0.0)
    assert calls[counted] == times, mixture.describe()


def _name(value: object) -> str:
    if isinstance(value, dict):
        return f"full {value['recompute_method']}"
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("modules", "counted", "times"), DENSE, ids=_name)
def test_dense_gradients_are_bit_equal(
    modules: str | dict[str, Any], counted: object, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mixture in MIXTURES:
        assert_recomputed(False, mixture, modules, counted, times, monkeypatch)


@pytest.mark.parametrize(("modules", "counted", "times"), MOE_LAYERS, ids=_name)
def test_moe_gradients_are_bit_equal(
    modules: str | dict[str, Any], counted: object, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mixture in MIXTURES:
        assert_recomputed(True, mixture, modules, counted, times, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize(
    "modules",
    ["mlp", "moe_act", {**FULL, "recompute_method": "uniform"}],
    ids=_name,
)
@pytest.mark.parametrize("mixing_name", ["moa", "la"])
def test_compiled_gradients_are_bit_equal(mixing_name: str, modules: str | dict[str, Any]) -> None:
    mixture = MixtureConfig(kind=mixing_name, activations=("silu", "tanh"), backend="compile")
    moe = modules == "moe_act"
    assert_same(gradients(build(moe, mixture, None)), gradients(build(moe, mixture, modules)))


def test_moe_act_keeps_no_mixture_and_evaluation_needs_none() -> None:
    model = build(True, MixtureConfig(backend="eager"), "moe_act")
    kept: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MixedMLP) and module.recompute_mixture:
            module.linear_fc2.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    logits_of(model)
    assert len(kept) == 4
    assert all(tensor.numel() > 0 and tensor.untyped_storage().size() == 0 for tensor in kept)
    model.eval()
    with torch.no_grad():
        logits = logits_of(model)
    expected = build(True, MixtureConfig(backend="eager"), None).eval()
    assert torch.equal(logits, logits_of(expected))


@pytest.mark.parametrize("kind", ["dense", "moe", "grouped moe"])
@pytest.mark.parametrize("mixing_name", ["moa", "la"])
def test_moa_recompute_keeps_no_mixture_anywhere(mixing_name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests --moa-recompute on dense layers, routed and shared experts.

    Gradients are the same bit for bit, and every mixture is computed twice.
    """

    def built(recompute: bool) -> torch.nn.Module:
        mixture = MixtureConfig(kind=mixing_name, backend="eager", recompute=recompute)
        tensor_parallel.model_parallel_cuda_manual_seed(11)
        config = configured(kind != "dense", True, None)
        config.moe_grouped_gemm = kind == "grouped moe"
        model = build_model(config, mixture)
        tensor_parallel.model_parallel_cuda_manual_seed(12)
        return model

    with counting(monkeypatch) as calls:
        expected = gradients(built(False))
    mixtures = {"dense": 2, "moe": 6, "grouped moe": 4}[kind]
    assert calls["mixture"] == mixtures
    model = built(True)
    kept: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("linear_fc2"):
            module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    with counting(monkeypatch) as calls:
        logits_of(model)
    assert len(kept) == mixtures
    assert all(tensor.untyped_storage().size() == 0 for tensor in kept)
    with counting(monkeypatch) as calls:
        assert_same(expected, gradients(built(True)))
    assert calls["mixture"] == 2 * mixtures


def test_moa_recompute_beside_what_recomputes_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check = recompute.check_recompute_mixture
    check(configured(False, True, None), None)
    with pytest.raises(UserError, match="--moa-recompute: --recompute-granularity full recomputes the mixture"):
        check(configured(False, True, {**FULL, "recompute_method": "uniform"}), None)
    with pytest.raises(UserError, match="--moa-recompute: --recompute-modules mlp recomputes the mixture"):
        check(configured(False, True, "mlp"), ["mlp"])
    both = configured(True, True, "moe_act")
    both.moe_layer_freq, both.moe_shared_expert_intermediate_size = 2, 16
    for modules, left in (
        (["mlp"], "moe_act shared_experts"),
        (["moe"], "mlp"),
        (["core_attn", "shared_experts"], "mlp moe_act"),
        (["mlp", "moe_act"], "shared_experts"),
    ):
        with pytest.raises(UserError, match=f"{' '.join(modules)} recomputes a part .* for the rest add {left} to"):
            check(both, modules)
    with pytest.raises(UserError, match="--recompute-modules mlp moe recomputes the mixture already"):
        check(both, ["mlp", "moe"])
    overlapping = configured(True, True, None)
    overlapping.moe_shared_expert_overlap = True
    with pytest.raises(UserError, match="--moa-recompute: not with --moe-shared-expert-overlap"):
        check(overlapping, None)
    monkeypatch.setattr(recompute, "is_ninja_available", lambda: False)
    with pytest.raises(UserError, match=r"--moa-recompute: .*pip install ninja"):
        check(configured(False, True, None), None)


@pytest.mark.parametrize("modules", ["mlp", {**FULL, "recompute_method": "uniform"}], ids=_name)
def test_the_monitor_counts_no_token_twice(modules: str | dict[str, Any]) -> None:
    mixture = MixtureConfig(backend="eager")
    model = build(False, mixture, modules)
    monitor = CoefficientMonitor(mixture, interval=1)
    monitor.attach([model])
    monitor.begin_microbatch(0)
    gradients(model)
    assert monitor._sums[:, 0, 0, 0].tolist() == [16, 16]  # tokens, by layer


def test_delayed_scaling_cannot_recompute_the_input_of_fc2() -> None:
    config = configured(True, True, "moe_act")
    recompute.check_recompute(config, ["moe_act"])
    recompute.check_recompute_mixture(config, None)
    config.fp8, config.fp8_recipe = "hybrid", "delayed"
    with pytest.raises(UserError, match="--recompute-modules moe_act: not with --fp8-recipe delayed; take another"):
        recompute.check_recompute(config, ["moe_act"])
    with pytest.raises(UserError, match="--moa-recompute: not with --fp8-recipe delayed; take another"):
        recompute.check_recompute_mixture(config, None)
    recompute.check_recompute(config, ["core_attn"])
    config.fp8_recipe = "tensorwise"
    recompute.check_recompute(config, ["moe_act"])


def test_a_missing_ninja_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(True, True, "moe_act")
    recompute.check_recompute(config, ["moe_act"])
    monkeypatch.setattr(recompute, "is_ninja_available", lambda: False)
    with pytest.raises(UserError, match=r"--recompute-modules moe_act: .*pip install ninja"):
        recompute.check_recompute(config, ["moe_act"])


@pytest.mark.parametrize(
    ("modules", "moe", "refused"),
    [
        ("mlp", True, "mlp"),
        ("moe", False, "moe"),
        ("moe_act", False, "moe_act"),
        ("core_attn shared_experts", False, "shared_experts"),
    ],
)
def test_modules_the_model_does_not_have_are_refused(modules: str, moe: bool, refused: str) -> None:
    with pytest.raises(UserError, match=f"--recompute-modules {modules}: .* drop {refused}$"):
        recompute.check_recompute(configured(moe, True, modules), modules.split())


def test_a_model_with_dense_and_moe_layers_has_both() -> None:
    config = configured(True, True, "mlp moe")
    config.moe_layer_freq = [0, 1]
    recompute.check_recompute(config, ["mlp", "moe"])


@pytest.mark.slow
def test_flags_without_effect_are_refused() -> None:
    run = train(*SWIGLU, "--train-iters", "1", "--recompute-modules", "mlp", check=False)
    assert run.returncode == 2
    (line,) = [line for line in run.log.splitlines() if "--recompute-modules" in line]
    assert "--recompute-modules mlp: has no effect without --recompute-granularity selective; add it" in line


SPLIT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 3"
)
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recomputations"),
    [
        ([], [UNIFORM, f"{SELECTIVE} core_attn mlp"]),
        (
            [*MOE, "--moe-shared-expert-intermediate-size", "32"],
            [f"{SELECTIVE} moe_act"],
        ),
    ],
    ids=["dense", "moe"],
)
def test_training_on_two_ranks_is_bit_equal(model: list[str], recomputations: list[str], tmp_path: Path) -> None:
    flags = [*SWIGLU, *model, *SPLIT.split(), "--moa-backend", "eager"]
    expected = recorded(tmp_path / "kept", *flags, processes=2)
    for index, recomputation in enumerate(recomputations):
        run = recorded(tmp_path / str(index), *flags, *recomputation.split(), processes=2)
        comparison = RunComparison.of(expected, run)
        assert len(comparison.losses) == 3
        assert comparison.within(0.0), (recomputation, comparison)
