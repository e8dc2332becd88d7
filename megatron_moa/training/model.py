"""Builds the GPT model with mixed feed-forward layers, checks it, and counts what was built."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_moa.layer_specs import check_supported, layer_spec, mtp_spec
from megatron_moa.layers.coefficients import Coefficients
from megatron_moa.layers.experts import MixedGroupedMLP, MixedSequentialMLP
from megatron_moa.layers.init_scale import initial_std
from megatron_moa.layers.mlp import MixedMLP
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.functional import resolve_backend
from megatron_moa.mixture.start_scale import output_scale
from megatron_moa.training.megatron_checks import megatron_checks
from megatron_moa.training.recompute import check_recompute, check_recompute_mixture

# GPTModelConfig's attributes that GPTModel takes under the same name.
_SAME_NAME = (
    "fp16_lm_cross_entropy",
    "parallel_output",
    "share_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "scatter_embedding_sequence_parallel",
    "seq_len_interpolation_factor",
)


@dataclass(kw_only=True)
class MixedGPTModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig plus the mixture's settings (None: stock feed-forward layers)."""

    builder: ClassVar[str] = "megatron_moa.training.model.MixedGPTModelBuilder"
    mixture: MixtureConfig | None = None


def transformer_config_from_args(args: argparse.Namespace, mixture: MixtureConfig | None) -> TransformerConfig:
    """Builds Megatron's config of the layers and checks it, with nothing set up or written yet.

    It serves ``--recompute-modules moe_act`` for the mixture's experts: Megatron 0.19.2 admits moe_act for grouped
    experts only; MixedMLP serves it, so Megatron's check does not see it.

    Raises:
        UserError: settings of Megatron's that contradict each other, would be ignored, or are not supported.
    """
    modules = args.recompute_modules
    if mixture is not None and modules:
        args.recompute_modules = [name for name in modules if name != "moe_act"]
    try:
        with megatron_checks(args):
            config = core_transformer_config_from_args(args)
    finally:
        args.recompute_modules = modules
    if modules:
        config.recompute_modules = list(modules)
    check_recompute(config, modules)
    if mixture is not None and mixture.recompute:
        check_recompute_mixture(config, modules)
    check_supported(config, mixture)
    return config


def model_config_from_args(
    args: argparse.Namespace, mixture: MixtureConfig | None, transformer: TransformerConfig | None = None
) -> MixedGPTModelConfig:
    """Builds the model's config: Megatron's ``gpt_config_from_args`` with the mixture.

    Megatron drops ``--rope-scaling-factor`` (whatever is given, a model gets 8), which is set here.

    Args:
        args: with the size of the vocabulary, which the tokenizer gives.
        mixture: None for stock feed-forward layers.
        transformer: of :func:`transformer_config_from_args`, which is called otherwise.
    """
    transformer = transformer or transformer_config_from_args(args, mixture)
    with megatron_checks(args):
        config = gpt_config_from_args(args, transformer, MixedGPTModelConfig)
    config.rope_scaling_factor = args.rope_scaling_factor
    config.mixture = mixture
    return config


class MixedGPTModelBuilder(GPTModelBuilder):
    """Builds GPTModel from our specs.

    Megatron's builder would give multi-token prediction the stock layer.
    """

    @megatron_checks()
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One pipeline stage (one virtual stage) of the model; arguments as in Megatron's GPTModelBuilder."""
        config: MixedGPTModelConfig = self._model_config
        stage = {"vp_stage": vp_stage, "vp_size": config.transformer.virtual_pipeline_model_parallel_size}
        if pre_process is None:
            pre_process = is_vp_first_stage(**stage) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(**stage) and is_pp_last_stage(pg_collection.pp)
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size, config.make_vocab_size_divisible_by, config.transformer.tensor_model_parallel_size
            )
        return GPTModel(
            config=config.transformer,
            transformer_layer_spec=layer_spec(config, config.mixture, vp_stage),
            mtp_block_spec=mtp_spec(config, config.mixture, vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **{name: getattr(config, name) for name in _SAME_NAME},
        )


@dataclass(frozen=True)
class MixtureReport:
    """What a built model holds, over all ranks.

    Attributes:
        layers: mixed feed-forward layers, each expert counted as one.
        parameters: all of the model's.
        extra_parameters: those of gates, amplitudes and LA coefficients.
    """

    layers: int
    parameters: int
    extra_parameters: int

    @property
    def extra_percent(self) -> float:
        """The mixture's share, in per cent of what the model has without it."""
        return 100 * self.extra_parameters / (self.parameters - self.extra_parameters)


def report_mixture(
    models: list[MegatronModule], mixture: MixtureConfig | None, form_reason: str | None = None
) -> list[MegatronModule]:
    """Checks that what was asked for was built, and prints it in one line.

    Returns the models as they came.

    Args:
        form_reason: why ``--moa-form auto`` became the mixture's form; None where the form was named.
    """
    check_mixture(models, mixture)
    report = measure_mixture(models)
    if torch.distributed.get_rank() != 0:
        return models
    if mixture is None:
        print(
            f"> mixture of activations: none, stock feed-forward layers, {report.parameters:,} parameters", flush=True
        )
        return models
    config = models[0].config
    backend = resolve_backend(mixture.backend, "cuda" if torch.cuda.is_available() else "cpu")
    why = f" (--moa-form auto: {form_reason})" if form_reason else ""
    line = (
        f"> mixture of activations: {mixture.describe()}{why}, {backend} backend, "
        f"{report.layers} layers, {report.extra_parameters:,} extra parameters "
        f"({report.extra_percent:.4f} % of {report.parameters - report.extra_parameters:,})"
    )
    std = initial_std(config)
    if mixture.init_scale == "paper" and std is not None:
        scale = output_scale(mixture, std, config.hidden_size)
        line += f", output at step 0 about {scale:.1f} x {'SwiGLU' if mixture.gated else 'GELU'}'s"
    print(line, flush=True)
    return models


def check_mixture(models: list[MegatronModule], mixture: MixtureConfig | None) -> None:
    """Every feed-forward layer on this rank is of the class asked for, with the settings asked for.

    Raises:
        RuntimeError: the model has a stock feed-forward layer where a mixture was asked for, or the other way round.
    """
    feed_forward = (MLP, SequentialMLP, TEGroupedMLP)
    mixed = (MixedMLP, MixedSequentialMLP, MixedGroupedMLP)
    for model in models:
        for name, module in model.named_modules():
            if not isinstance(module, feed_forward):
                continue
            if isinstance(module, mixed) != (mixture is not None):
                raise RuntimeError(f"{name} was built as {type(module).__name__}, asked for was mixing {mixture}")
            if getattr(module, "mixture", mixture) != mixture:
                raise RuntimeError(f"{name} was built with {module.mixture}, asked for was {mixture}")


def measure_mixture(models: list[MegatronModule]) -> MixtureReport:
    """Counts over all ranks (one collective): a tensor held by r ranks counts 1/r on each of them."""
    counts = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
    for model in models:
        coefficients = [module for module in model.modules() if isinstance(module, Coefficients)]
        mixture_parameters = {id(parameter) for module in coefficients for parameter in module.parameters()}
        for module in coefficients:
            counts[0] += (module.experts or 1) / _replicas(next(module.parameters()))
        for parameter in model.parameters():
            if getattr(parameter, "shared", False):
                continue  # the last pipeline stage's copy of a tied embedding
            counts[1] += parameter.numel() / _replicas(parameter)
            if id(parameter) in mixture_parameters:
                counts[2] += parameter.numel() / _replicas(parameter)
    torch.distributed.all_reduce(counts)
    return MixtureReport(*(round(count) for count in counts.tolist()))


def _replicas(parameter: torch.nn.Parameter) -> int:
    """How many ranks hold this tensor (or, of a tensor-parallel weight, this shard of it)."""
    is_expert = not getattr(parameter, "allreduce", True)
    if is_expert:
        copies = parallel_state.get_expert_data_parallel_group().size()
        tensor_parallel = parallel_state.get_expert_tensor_parallel_group().size()
    else:
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True).size()
        tensor_parallel = parallel_state.get_tensor_model_parallel_group().size()
    return copies if getattr(parameter, "tensor_model_parallel", False) else copies * tensor_parallel
