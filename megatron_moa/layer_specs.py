"""Gives Megatron layer specs whose feed-forward layers mix activations.

They are the stock specs with the mlp slot swapped. They are usable from Megatron's own script,
``--spec megatron_moa.layer_specs moa_layer_spec``, and from ``MixedGPTModelConfig`` (megatron_moa.training.model),
which also reaches the layers of multi-token prediction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions import fused_layer_norm
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.layers.experts import (
    MixedGroupedMLP,
    MixedGroupedMLPSubmodules,
    MixedSequentialMLP,
    MixedSharedExpertMLP,
)
from megatron_moa.layers.grouped_linear import (
    TorchColumnParallelGroupedLinear,
    TorchGroupedMLP,
    TorchRowParallelGroupedLinear,
)
from megatron_moa.layers.mlp import MixedMLP, MixedMLPSubmodules
from megatron_moa.layers.norm_and_attention import TorchAttention, TorchNorm
from megatron_moa.mixture.config import MixtureConfig, auto_form, check_form

if HAVE_TE:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )

Builder = Callable[..., Any]

# What acts on the activation step, which the mixture owns, and the value that does nothing.
_REFUSED_WITH_MIXTURE = {
    "activation_func_clamp_value": None,
    "activation_func_fp8_input_store": False,
    "glu_linear_offset": 0.0,
    "moe_mlp_glu_interleave_size": None,
    "use_fused_weighted_squared_relu": False,
    "use_grouped_gemm_for_dense_mlp": False,
    "use_grouped_gemm_for_shared_expert": False,
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
}

# What grouped experts of ours do not serve, Megatron's own on Transformer Engine do.
_REFUSED_WITH_GROUPED_EXPERTS = {
    "delay_wgrad_compute": False,
    "fp4": None,
    "fp8": None,
    "moe_mlp_glu_interleave_size": None,
    "moe_single_grouped_weight": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "use_te_activation_func": False,
    "use_transformer_engine_op_fuser": False,
}
_OFFLOADED_OF_EXPERTS = ("expert_fc1", "fused_group_mlp", "moe_act")


def moa_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The paper's MoA with default settings, of the form that ``--moa-form auto`` stands for."""
    return _named_layer_spec("moa", config, vp_stage)


def la_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """LA with default settings, of the form that ``--moa-form auto`` stands for."""
    return _named_layer_spec("la", config, vp_stage)


def _named_layer_spec(mixing: str, config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    transformer = transformer_config(config)
    if transformer.mtp_num_layers:
        # Megatron's builder makes the layers of multi-token prediction from the stock spec, whatever --spec says.
        raise UserError(
            f"--mtp-num-layers {transformer.mtp_num_layers}: --spec does not reach these layers; "
            "train with pretrain_gpt_moa.py, which does"
        )
    form, _ = auto_form(transformer.gated_linear_unit, bool(transformer.num_moe_experts))
    return layer_spec(config, MixtureConfig(kind=mixing, form=form), vp_stage)


def transformer_config(config: Any) -> TransformerConfig:
    """The TransformerConfig itself, or the one inside a GPTModelConfig: Megatron's scripts pass either."""
    return config if isinstance(config, TransformerConfig) else config.transformer


def layer_spec(config: Any, mixture: MixtureConfig | None, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's spec on this pipeline stage, for the config at hand: dense, MoE, GQA, q/k norm, MLA.

    Args:
        config: TransformerConfig or GPTModelConfig.
        mixture: the mixture; None leaves the feed-forward layers stock (norm and attention still work without
            Transformer Engine and Apex).
        vp_stage: virtual pipeline stage.

    Raises:
        UserError: for a Megatron setting the mixture cannot serve.
    """
    config = transformer_config(config)
    check_supported(config, mixture)
    block = get_gpt_decoder_block_spec(config, **_stock_arguments(config), vp_stage=vp_stage)
    return dataclasses.replace(
        block,
        layer_specs=[_mixed_layer(layer, mixture, config) for layer in block.layer_specs],
        layer_norm=_final_norm(block.layer_norm, config),
    )


def mtp_spec(
    config: Any, mixture: MixtureConfig | None, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The spec of multi-token prediction's layers on this pipeline stage; None where there are none."""
    config = transformer_config(config)
    if not config.mtp_num_layers:
        return None
    stock = _stock_arguments(config)
    last_layer = get_gpt_decoder_layer_specs(config, **stock, vp_stage=vp_stage)[-1]
    block = get_gpt_mtp_block_spec(
        config,
        _mixed_layer(last_layer, mixture, config),
        use_transformer_engine=stock["use_transformer_engine"],
        vp_stage=vp_stage,
    )
    if block is None:
        return None
    layers = [dataclasses.replace(layer, submodules=_swap_slots(layer.submodules)) for layer in block.layer_specs]
    return dataclasses.replace(block, layer_specs=layers)


def check_supported(config: TransformerConfig, mixture: MixtureConfig | None) -> None:
    """Refuses Megatron settings that would silently change, or bypass, what was asked for."""
    local = config.transformer_impl == "local"
    if config.transformer_impl == "inference_optimized":
        raise UserError("--transformer-impl inference_optimized: is not for training; take transformer_engine or local")
    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise UserError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "install it, or take --transformer-impl local"
        )
    _refuse(config, {"experimental_attention_variant": None}, "not supported; drop the flag")
    if getattr(config, "heterogeneous_block_specs", False):
        raise UserError("--heterogeneous-layers-config-path: not supported; drop the flag")
    if config.num_moe_experts and config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        raise UserError(  # which Megatron asserts in the first step
            f"--moe-apply-probs-on-input: needs --moe-router-topk 1, not {config.moe_router_topk}; give that, or drop "
            "the flag"
        )
    if config.num_moe_experts and config.moe_grouped_gemm and (mixture is not None or local):
        _check_grouped_experts(config)
    if local:  # local layers ignore these
        problem = "needs Transformer Engine's layers; add --transformer-impl transformer_engine, or drop the flag"
        _refuse(config, {"fp8": None, "fp4": None}, problem)
        if config.quant_recipe:
            raise UserError(f"--te-precision-config-file: {problem}")
    if not HAVE_TE:
        needing = {"moe_latent_size": None, "cpu_offloading_num_layers": 0}
        _refuse(config, needing, "needs Transformer Engine; install it, or drop the flag")
    if mixture is not None:
        if mixture.gated != config.gated_linear_unit:
            check_form(mixture.form, config.gated_linear_unit)
        if config.activation_func not in (F.silu, F.gelu):  # that of --swiglu, and Megatron's default
            name = config.activation_func.__name__
            flags = {"squared_relu": "--squared-relu", "quick_gelu": "--quick-geglu"}
            shown = flags.get(name, f"activation_func {name}")
            raise UserError(f"{shown}: the mixture replaces the activation; name it in --moa-activations instead")
        _refuse(config, _REFUSED_WITH_MIXTURE, "acts on the activation step, which the mixture replaces; drop the flag")


def _check_grouped_experts(config: TransformerConfig) -> None:
    problem = "not supported by these grouped experts; drop it, or --moe-grouped-gemm"
    _refuse(config, _REFUSED_WITH_GROUPED_EXPERTS, problem)
    if config.add_bias_linear:
        raise UserError(
            "--moe-grouped-gemm: these grouped experts have no bias; add --disable-bias-linear, or drop the flag"
        )
    offloaded = [name for name in _OFFLOADED_OF_EXPERTS if name in (config.offload_modules or ())]
    if config.fine_grained_activation_offloading and offloaded:
        raise UserError(f"{as_typed('offload_modules', offloaded)}: {problem}")


def _refuse(config: TransformerConfig, neutral: Mapping[str, object], problem: str) -> None:
    """Raises UserError for the first of these settings that has another value than its neutral one."""
    for name, value in neutral.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{as_typed(name, getattr(config, name))}: {problem}")


def _stock_arguments(config: TransformerConfig) -> dict[str, Any]:
    return {
        "use_transformer_engine": config.transformer_impl == "transformer_engine",
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def _mixed_layer(layer: ModuleSpec, mixture: MixtureConfig | None, config: TransformerConfig) -> ModuleSpec:
    submodules = _swap_slots(layer.submodules)
    submodules = dataclasses.replace(submodules, mlp=_mixed_mlp(submodules.mlp, mixture, config))
    if mixture is not None and mixture.kind == "moa" and _norm_is_inside_fc1(submodules.mlp):
        submodules = _with_norm_before_mlp(submodules)
    return dataclasses.replace(layer, submodules=submodules)


def _mixed_mlp(mlp: functools.partial, mixture: MixtureConfig | None, config: TransformerConfig) -> functools.partial:
    """The builder in a layer's mlp slot (dense or MoE) with our classes in place of Megatron's."""
    builder = getattr(mlp, "func", mlp)
    if builder is MoELayer:
        moe: MoESubmodules = mlp.keywords["submodules"]
        changed = {"experts": _experts(moe.experts, mixture, config)}
        if mixture is not None:
            changed["shared_experts"] = functools.partial(
                MixedSharedExpertMLP, submodules=_mixed_submodules(moe.shared_experts, mixture)
            )
        return functools.partial(MoELayer, submodules=dataclasses.replace(moe, **changed))
    if mixture is None:
        return mlp
    if builder == MLP.as_mlp_submodule:
        return functools.partial(MixedMLP.as_mlp_submodule, submodules=_mixed_submodules(mlp, mixture))
    raise _no_mixture(mixture, builder)


def _experts(stock: Builder, mixture: MixtureConfig | None, config: TransformerConfig) -> Builder:
    """Returns the builder of the routed experts, which mix activations if ``mixture`` is given.

    Without Transformer Engine Megatron builds sequential experts, whatever ``--moe-grouped-gemm`` says: with that flag
    they are grouped over linears of ours.
    """
    kind = getattr(stock, "func", stock)
    grouped = kind is TEGroupedMLP
    if kind is SequentialMLP and config.moe_grouped_gemm:
        grouped = True
        linears = GroupedMLPSubmodules(
            linear_fc1=TorchColumnParallelGroupedLinear, linear_fc2=TorchRowParallelGroupedLinear
        )
        stock = functools.partial(TorchGroupedMLP, submodules=linears)
    if mixture is None:
        return stock
    if grouped:
        linears = stock.keywords["submodules"]
        submodules = MixedGroupedMLPSubmodules(
            linear_fc1=linears.linear_fc1, linear_fc2=linears.linear_fc2, mixture=mixture
        )
        return functools.partial(MixedGroupedMLP, submodules=submodules)
    if kind is SequentialMLP:
        return functools.partial(MixedSequentialMLP, submodules=_mixed_submodules(stock, mixture))
    raise _no_mixture(mixture, kind)


def _no_mixture(mixture: MixtureConfig, builder: Builder) -> UserError:
    return UserError(f"--moa-mixing {mixture.kind}: no mixture for {builder}; take --moa-mixing none")


def _mixed_submodules(builder: functools.partial, mixture: MixtureConfig) -> MixedMLPSubmodules:
    stock = builder.keywords["submodules"]
    return MixedMLPSubmodules(linear_fc1=stock.linear_fc1, linear_fc2=stock.linear_fc2, mixture=mixture)


def _norm_is_inside_fc1(mlp: functools.partial) -> bool:
    submodules = mlp.keywords["submodules"]
    return HAVE_TE and getattr(submodules, "linear_fc1", None) is TELayerNormColumnParallelLinear


def _with_norm_before_mlp(submodules: Any) -> Any:
    """Takes the norm out of Transformer Engine's fused norm + fc1, and puts it before the mlp.

    The gates need the normalised input too. Checkpoint keys stay those of the fused module.
    """
    mlp_submodules = dataclasses.replace(submodules.mlp.keywords["submodules"], linear_fc1=TEColumnParallelLinear)
    keys = {**submodules.sharded_state_dict_keys_map, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return dataclasses.replace(
        submodules,
        pre_mlp_layernorm=TENorm,
        mlp=functools.partial(submodules.mlp.func, submodules=mlp_submodules),
        sharded_state_dict_keys_map=keys,
    )


def _without_apex(module: Any) -> Any:
    """Replaces Megatron's plain-torch norm and attention, and Apex's norm without Apex, by ours.

    Megatron's plain-torch norm refuses sequence parallelism, its attention keeps s x s scores: ours do neither.
    Megatron 0.19.2 takes Apex's norm wherever a package of that name can be imported, PyPI's other one included.
    """
    if module is FusedLayerNorm and not fused_layer_norm.HAVE_FUSED_LAYER_NORM:
        return TorchNorm
    return {WrappedTorchNorm: TorchNorm, DotProductAttention: TorchAttention}.get(module, module)


def _final_norm(module: Any, config: TransformerConfig) -> Any:
    """Returns the norm behind the last layer: ours where Megatron takes Apex's for RMSNorm.

    Megatron 0.19.2 takes Apex's norm where Apex is there and Transformer Engine is not, also for RMSNorm, which Apex's
    refuses.
    """
    if module is FusedLayerNorm and config.normalization != "LayerNorm":
        return TorchNorm
    return _without_apex(module)


def _swap_slots(submodules: Any) -> Any:
    """A copy of a submodules dataclass with norms and core attention swapped, at every depth."""
    if not dataclasses.is_dataclass(submodules):
        return submodules
    changes = {}
    for field in dataclasses.fields(submodules):
        value = getattr(submodules, field.name)
        if isinstance(value, ModuleSpec):
            changes[field.name] = dataclasses.replace(
                value, module=_without_apex(value.module), submodules=_swap_slots(value.submodules)
            )
        elif isinstance(value, type):
            changes[field.name] = _without_apex(value)
    return dataclasses.replace(submodules, **changes)
