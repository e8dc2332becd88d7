"""Tests specs: every kind of model gets the mixture in every feed-forward layer.

Every model saves all its parameters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.fusions import fused_layer_norm
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_moa.errors import UserError
from megatron_moa.layer_specs import la_layer_spec, layer_spec, moa_layer_spec
from megatron_moa.layers.coefficients import Coefficients, build_coefficients
from megatron_moa.layers.experts import MixedGroupedMLP, MixedSequentialMLP, MixedSharedExpertMLP
from megatron_moa.layers.grouped_linear import TorchGroupedMLP
from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.layers.norm_and_attention import TorchAttention, TorchNorm
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training.model import check_mixture, measure_mixture, report_mixture
from tests.support.layers import build_model, logits_of, make_config, moe_settings

pytestmark = pytest.mark.usefixtures("megatron")

MOA = MixtureConfig(backend="eager", gate_bias=True, amplitude="learned")
LA = MixtureConfig(kind="la", backend="eager")

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa with q/k norm": {"num_query_groups": 2, "qk_layernorm": True},
    "moe": moe_settings(),
    "moe with shared expert": moe_settings(moe_shared_expert_intermediate_size=12, moe_shared_expert_gate=True),
    "moe grouped": moe_settings(moe_grouped_gemm=True, moe_shared_expert_intermediate_size=12),
    "moe every second layer": moe_settings(moe_layer_freq=2, num_layers=4),
    "moe by pattern": moe_settings(moe_layer_freq=[0, 1, 1], num_layers=3),
    "mtp": {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1},
    "moe with mtp": moe_settings(mtp_num_layers=1, mtp_loss_scaling_factor=0.1),
    "moe grouped with mtp": moe_settings(moe_grouped_gemm=True, mtp_num_layers=1, mtp_loss_scaling_factor=0.1),
}


@pytest.mark.parametrize("mixture", [MOA, LA], ids=["moa", "la"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_mixed_trains_and_is_saved(kind: str, mixture: MixtureConfig) -> None:
    model = build_model(make_config(**KINDS[kind]), mixture)
    check_mixture([model], mixture)
    feed_forward = [m for m in model.modules() if isinstance(m, Coefficients)]  # one in each, and in each expert
    layers = model.config.num_layers + (model.config.mtp_num_layers or 0)
    slots = [m.mlp for m in model.modules() if hasattr(m, "mlp")]
    assert len(slots) == layers
    assert len(feed_forward) >= layers

    tokens = torch.arange(16).view(2, 8)
    loss = model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens).sum()
    loss.backward()
    named = dict(model.named_parameters())
    mixing_parameters = [name for name in named if ".coefficients." in name]
    assert len(mixing_parameters) == len(feed_forward) * (3 if mixture is MOA else 1)
    if "moe" not in kind:  # an expert may get no token
        assert all(named[name].grad is not None and named[name].grad.any() for name in mixing_parameters)

    saved = model.sharded_state_dict()
    for name, parameter in named.items():
        assert name in saved, name
        assert saved[name].data.shape == parameter.shape
    assert set(model.state_dict()) - {k for k in model.state_dict() if k.endswith("_extra_state")} <= set(saved)


def test_mla_gets_the_mixture() -> None:
    base = make_config()
    kept = {name: getattr(base, name) for name in ("num_layers", "hidden_size", "num_attention_heads")}
    config = MLATransformerConfig(
        **kept,
        ffn_hidden_size=24,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        multi_latent_attention=True,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_head_dim=4,
        qk_pos_emb_head_dim=4,
        v_head_dim=4,
        rope_type="rope",
    )
    model = build_model(config, MOA)
    check_mixture([model], MOA)
    assert any(isinstance(m, TorchAttention) for m in model.modules())
    tokens = torch.arange(16).view(2, 8)
    model(tokens, torch.arange(8).expand(2, 8), None, labels=tokens).sum().backward()


def test_moe_layer_classes() -> None:
    model = build_model(make_config(**KINDS["moe with shared expert"]), MOA)
    assert sum(isinstance(m, MixedSequentialMLP) for m in model.modules()) == 2
    assert sum(isinstance(m, MixedSharedExpertMLP) for m in model.modules()) == 2


def test_grouped_experts_are_built_where_asked_for() -> None:
    config = make_config(**KINDS["moe grouped"])
    model = build_model(config, MOA)
    assert sum(isinstance(m, MixedGroupedMLP) for m in model.modules()) == 2
    assert sum(isinstance(m, MixedSharedExpertMLP) for m in model.modules()) == 2
    stock = build_model(config, None)
    check_mixture([stock], None)
    assert sum(isinstance(m, TorchGroupedMLP) for m in stock.modules()) == 2
    assert [type(m).__name__ for m in stock.modules() if "Mixed" in type(m).__name__] == []
    with pytest.raises(RuntimeError, match="was built as TorchGroupedMLP"):
        check_mixture([stock], MOA)
    with pytest.raises(RuntimeError, match="was built as MixedGroupedMLP"):
        check_mixture([model], None)


def test_mtp_layers_are_mixed_too() -> None:
    model = build_model(make_config(**KINDS["mtp"]), MOA)
    (mtp,) = [m for m in model.modules() if isinstance(m, MultiTokenPredictionLayer)]
    assert any(isinstance(m, MixedMLP) for m in mtp.modules())


@pytest.mark.parametrize(
    ("gated", "settings", "form"),
    [
        (True, {}, "bi-sided"),
        (False, {}, "type1"),
        (True, moe_settings(), "one-sided"),
        (True, moe_settings(moe_layer_freq=[0, 1]), "one-sided"),  # one form a model, in its dense layers too
        (False, moe_settings(), "type1"),
    ],
)
def test_named_specs_choose_the_form_by_the_model(gated: bool, settings: dict[str, Any], form: str) -> None:
    config = make_config(gated, **settings)
    for spec, mixing in ((moa_layer_spec, "moa"), (la_layer_spec, "la")):
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec(config),
            vocab_size=32,
            max_sequence_length=16,
            position_embedding_type="rope",
        )
        check_mixture([model], MixtureConfig(mixing, form))  # with the paper's initial values


GATE_KINDS = ("dense", "moe with shared expert", "moe grouped")


def _initial(kind: str, mixture: MixtureConfig, **settings: Any) -> dict[str, torch.Tensor]:
    tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    return dict(build_model(make_config(**KINDS[kind], **settings), mixture).named_parameters())


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("form", ["one-sided", "bi-sided", "quadratic"])
def test_gate_vectors_start_with_their_own_standard_deviation(form: str, kind: str) -> None:
    """N(0, 0.02^2), as the paper has it, however the other weights start."""
    mixture = MixtureConfig(form=form, backend="eager")
    wide, narrow, uniform = (
        _initial(kind, mixture, **settings)
        for settings in (
            {"init_method_std": 0.2},
            {"init_method_std": 0.006},
            {"init_method": torch.nn.init.xavier_uniform_},
        )
    )
    gates = {name for name in wide if name.endswith("coefficients.weight")}
    assert len(gates) == {"dense": 2, "moe with shared expert": 2 * (4 + 1), "moe grouped": 2 * (1 + 1)}[kind]
    for name in gates:
        assert torch.equal(wide[name], narrow[name])
        assert torch.equal(wide[name], uniform[name])
    drawn = torch.cat([wide[name].detach().flatten() for name in sorted(gates)])
    assert len(drawn.unique()) == len(drawn)  # no two layers or experts have the same
    assert drawn.mean().abs() < 4 * 0.02 / len(drawn) ** 0.5
    assert drawn.std().item() == pytest.approx(0.02, rel=4 / (2 * len(drawn)) ** 0.5)
    within_one_std = (drawn.abs() < 0.02).float().mean().item()
    assert within_one_std == pytest.approx(0.6827, abs=2 / len(drawn) ** 0.5)  # a normal distribution's


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_no_other_weight_depends_on_the_gates(kind: str) -> None:
    """They draw from a stream of their own."""
    papers = _initial(kind, MixtureConfig(form="one-sided", backend="eager"))
    wide = _initial(kind, MixtureConfig(form="one-sided", gate_init_std=0.5, backend="eager"))
    larger = _initial(kind, MixtureConfig(form="quadratic", backend="eager"))
    for name, value in papers.items():
        if name.endswith("coefficients.weight"):
            torch.testing.assert_close(wide[name], 25 * value)
        else:
            assert torch.equal(wide[name], value), name
            assert torch.equal(larger[name], value), name


@pytest.mark.parametrize("reason", ["routed experts", None])
def test_the_start_line_says_why_auto_became_a_form(reason: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = MixtureConfig(form="one-sided", activations=("silu", "identity"), backend="eager")
    report_mixture([build_model(make_config(**moe_settings()), mixture)], mixture, reason)
    why = " (--moa-form auto: routed experts)" if reason else ""
    expected = f"> mixture of activations: moa, one-sided, silu+identity, sigmoid gates{why}, eager backend, "
    assert capsys.readouterr().out.startswith(expected)


def test_named_specs_refuse_mtp_which_they_do_not_reach() -> None:
    with pytest.raises(UserError, match=r"--mtp-num-layers 1: .*pretrain_gpt_moa\.py"):
        moa_layer_spec(make_config(**KINDS["mtp"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_func_clamp_value": 7.0}, "--activation-func-clamp-value 7.0"),
        ({"activation_func": quick_gelu}, "--quick-geglu: the mixture replaces the activation; name it in --moa-act"),
        ({"activation_func": squared_relu}, "--squared-relu: the mixture replaces"),
        ({"activation_func": torch.relu}, "activation_func relu: the mixture replaces the activation"),
        (moe_settings(use_grouped_gemm_for_shared_expert=True), "--use-grouped-gemm-for-shared-expert:"),
    ],
)
def test_settings_that_act_on_the_activation_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layer_spec(make_config(**settings), MOA)


@pytest.mark.parametrize("mixture", [None, MOA], ids=["none", "moa"])
@pytest.mark.parametrize("kind", ["moe", "moe grouped"])
def test_probabilities_of_several_experts_on_the_input_are_refused(kind: str, mixture: MixtureConfig | None) -> None:
    config = make_config(**KINDS[kind] | {"moe_apply_probs_on_input": True, "moe_router_topk": 2})
    with pytest.raises(UserError, match=r"^--moe-apply-probs-on-input: needs --moe-router-topk 1, not 2; give that"):
        layer_spec(config, mixture)


@pytest.mark.parametrize("mixture", [None, MOA], ids=["none", "moa"])
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("add_bias_linear", True, "--moe-grouped-gemm: .*add --disable-bias-linear"),
        ("delay_wgrad_compute", True, "--delay-wgrad-compute: .*drop it, or --moe-grouped-gemm"),
        ("fp8", "e4m3", "--fp8-format e4m3: "),
        ("fp4", "e2m1", "--fp4-format e2m1: "),
        ("moe_mlp_glu_interleave_size", 32, "--moe-mlp-glu-interleave-size 32: "),
        ("use_transformer_engine_op_fuser", True, "--use-transformer-engine-op-fuser: "),
        ("offload_modules", ["core_attn", "moe_act"], "--offload-modules moe_act: "),
    ],
)
def test_what_grouped_experts_do_not_serve_is_refused(
    attribute: str, value: object, message: str, mixture: MixtureConfig | None
) -> None:
    config = make_config(**KINDS["moe grouped"])
    config.fine_grained_activation_offloading = attribute == "offload_modules"
    setattr(config, attribute, value)  # not through the constructor, which asks for Transformer Engine
    with pytest.raises(UserError, match=message):
        layer_spec(config, mixture)
    config.moe_grouped_gemm = False
    if mixture is None and attribute not in ("fp8", "fp4"):  # which local layers serve with no experts
        layer_spec(config, mixture)


@pytest.mark.parametrize(
    ("normalization", "nvidias", "expected"),
    [("RMSNorm", True, TorchNorm), ("LayerNorm", True, FusedLayerNorm), ("LayerNorm", False, TorchNorm)],
)
def test_with_apex_alone_the_final_norm_is_one_that_can_be(
    normalization: str, nvidias: bool, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks which norm stands behind the last layer where some apex can be imported.

    Megatron then takes Apex's norm there, which refuses RMSNorm; another project's package apex has no such norm.
    """
    monkeypatch.setattr(gpt_layer_specs, "LNImpl", FusedLayerNorm)  # what it is where some apex can be imported
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", nvidias)
    assert layer_spec(make_config(normalization=normalization), None).layer_norm is expected


@pytest.mark.parametrize("attribute", ["fp8", "fp4"])
@pytest.mark.parametrize("mixture", [None, MixtureConfig(kind="moa", form="bi-sided", recompute=True)])
def test_low_precision_of_local_layers_is_refused(attribute: str, mixture: MixtureConfig | None) -> None:
    """They would compute in the precision of the weights, and say nothing."""
    config = make_config()
    setattr(config, attribute, "e4m3")
    with pytest.raises(UserError, match=f"--{attribute}-format e4m3: needs Transformer Engine's layers"):
        layer_spec(config, mixture)


def test_a_file_of_precisions_is_refused_for_local_layers() -> None:
    config = make_config()
    config.quant_recipe = object()
    with pytest.raises(UserError, match="--te-precision-config-file: needs Transformer Engine's layers"):
        layer_spec(config, None)


def test_transformer_engine_that_is_not_there_is_refused() -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    for name, flag in (
        ("moe_latent_size", "--moe-latent-size 4"),
        ("cpu_offloading_num_layers", "--cpu-offloading-num-layers 4"),
    ):
        config = make_config(**KINDS["moe"])
        setattr(config, name, 4)
        with pytest.raises(UserError, match=f"{flag}: needs Transformer Engine; install it, or drop the flag"):
            layer_spec(config, MOA)
    config = make_config()
    config.transformer_impl = "transformer_engine"
    with pytest.raises(UserError, match=r"--transformer-impl transformer_engine: .*--transformer-impl local"):
        layer_spec(config, None)


@pytest.mark.parametrize("mixture", [MOA, LA], ids=["moa", "la"])
def test_coefficients_start_as_ever_where_others_are_made_without_values(mixture: MixtureConfig) -> None:
    """With --init-model-with-meta-device only Transformer Engine's layers get their values later."""
    config = make_config()
    config.use_cpu_initialization = False
    with torch.device("meta"):
        built = build_coefficients(
            mixture, config, torch.distributed.group.WORLD, is_expert=False, dispatched=False, input_size=8
        )
    for name, parameter in built.named_parameters():
        assert not parameter.is_meta, name
        assert name == "bias" or parameter.any(), name


def test_a_stock_layer_where_a_mixture_was_asked_for_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="was built as MLP"):
        check_mixture([build_model(make_config(), None)], MOA)
    with pytest.raises(RuntimeError, match="was built as MixedMLP"):
        check_mixture([build_model(make_config(), MOA)], None)
    with pytest.raises(RuntimeError, match="was built with"):
        check_mixture([build_model(make_config(), LA)], MixtureConfig(kind="la", form="one-sided"))


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_report_counts_the_built_model(grouped: bool) -> None:
    config = make_config(**{**KINDS["moe with shared expert"], "moe_grouped_gemm": grouped})
    model = build_model(config, MOA)
    report = measure_mixture([model])
    assert report.layers == 2 * (4 + 1)
    assert report.extra_parameters == 10 * (14 * 16 + 14 + 14)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    stock = measure_mixture([build_model(config, None)])
    assert report.parameters - report.extra_parameters == stock.parameters


def test_stock_model_keeps_its_keys_and_its_function() -> None:
    """Checks that a model of mixing none has the keys and logits of stock Megatron.

    The two differ in norm and attention alone, which are in plain torch.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = make_config(num_query_groups=2, qk_layernorm=True)
    ours = build_model(config, None)
    stock = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=32,
        max_sequence_length=16,
        position_embedding_type="rope",
    )
    stock.load_state_dict(ours.state_dict())
    tokens = torch.arange(16).view(2, 8)
    mask = torch.ones(1, 1, 8, 8).triu(1).bool()
    expected = stock(tokens, torch.arange(8).expand(2, 8), mask)
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe with shared expert", "moe grouped"])
def test_arms_of_a_comparison_share_their_initial_weights(kind: str) -> None:
    """With the same seed stock, LA and MoA differ in their coefficients alone."""

    def initial(mixture: MixtureConfig | None) -> dict[str, torch.Tensor]:
        tensor_parallel.model_parallel_cuda_manual_seed(5, force_reset_rng=True)
        torch.manual_seed(5)
        return dict(build_model(make_config(**KINDS[kind]), mixture).named_parameters())

    stock = initial(None)
    for mixture in (LA, MOA):
        other = initial(mixture)
        assert set(stock) == {name for name in other if ".coefficients." not in name}
        assert [name for name in stock if not torch.equal(stock[name], other[name])] == []
