"""Pretrains GPT models, dense and MoE, whose feed-forward layers mix activations.

    python pretrain_gpt_moa.py --num-layers 4 ... --swiglu --moa-mixing moa        one process, GPU or CPU
    torchrun --nproc-per-node 8 pretrain_gpt_moa.py ... --tensor-model-parallel-size 2

The training loop is Megatron's, the layers are ours. Every Megatron flag holds; --help shows ours, --help-megatron
Megatron's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

if __name__ == "__main__":  # before torch and Megatron are imported, which takes seconds
    from megatron_moa.training import first_look

    first_look.main()

from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

# isort: split

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0, set_startup_timestamps
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_moa import startup
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.data.checks import check_data_arguments
from megatron_moa.errors import UserError, one_line_errors
from megatron_moa.training import index_cache, muon, nan_guard, optimizer
from megatron_moa.training.arguments import make_global, parse_arguments
from megatron_moa.training.coefficient_monitor import CoefficientMonitor
from megatron_moa.training.exit_codes import exit_codes, hold_timeout
from megatron_moa.training.model import model_config_from_args, report_mixture, transformer_config_from_args
from megatron_moa.training.patches import patch_training
from megatron_moa.training.progress import Progress

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_SPIKE = 10  # --check-for-spiky-loss: a loss this many times the largest seen

# Flags of Megatron's that need a batch this script does not make, ask for layers it does not build, or that Megatron
# 0.19.2 ignores (--freeze-all-layers) or fails at (--moe-use-upcycling) when a model is built by a builder.
_REFUSED = (
    "sft",
    "fim_data",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "logits_load_dir",
    "perform_rl_step",
    "vision_pretraining",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "mtp_hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "freeze_all_layers",
    "moe_use_upcycling",
)


def predicts_further_tokens(vp_stage: int | None) -> bool:
    """Tells whether layers of multi-token prediction are on this pipeline stage.

    They need tokens and labels too.
    """
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if layout is not None:  # parsed in the model's config alone
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout=layout, mtp_num_layers=args.mtp_num_layers, vp_stage=vp_stage)


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None) -> dict[str, Tensor | None]:
    """This rank's part of the next micro-batch: read by one rank, broadcast, cut for context parallelism."""
    args = get_args()
    mtp = predicts_further_tokens(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not mtp:
        return dict.fromkeys(_BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Tensor | None] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in _BATCH_KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses over unmasked tokens, their number, and both for the log.

    Args:
        loss_mask: [b, s]
        losses: [b, s], per token.
    """
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for problem, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            rerun.validate_result(
                result=loss, rejection_func=problem, message=f"{name} in the local loss", tolerance=0.0, fatal=True
            )
    if args.check_for_spiky_loss:
        is_spike = partial(rerun.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        rerun.validate_result(result=loss, rejection_func=is_spike, message="spiky loss", tolerance=0.0, fatal=False)
    return loss, num_tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    model: GPTModel,
    return_schedule_plan: bool = False,
    monitor: CoefficientMonitor | None = None,
) -> tuple[Any, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """One micro-batch forward, as Megatron's schedules call it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    if monitor is not None and model.training:
        monitor.begin_microbatch(get_args().curr_iteration)
    run = get_attr_wrapped_model(model, "build_schedule_plan") if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets, built on the ranks that read data.

    Args:
        num_samples: how many samples each must have.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def reads_data() -> bool:
        on_stage = is_first_or_last_pipeline_stage(vp_stage) or predicts_further_tokens(vp_stage)
        return on_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    dataset = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation and test datasets ...")
    return index_cache.build(BlendedMegatronDatasetBuilder(dataset, num_samples, reads_data, config))


datasets_provider.is_distributed = True  # Megatron then calls it on every rank


def check(args: argparse.Namespace) -> None:
    """What this script does not serve, data and tokenizer: checked before anything is set up or written."""
    for name in _REFUSED:
        if value := getattr(args, name, False):
            raise UserError(f"{as_typed(name, value)}: not supported by pretrain_gpt_moa.py; drop the flag")
    if args.spec is not None:
        raise UserError(f"--spec {' '.join(args.spec)}: the layers come from --moa-mixing here; drop one of the two")
    optimizer.check_schedule(args)
    check_data_arguments(args)


def main() -> None:
    """Parses, checks, builds and trains."""
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())
    with one_line_errors("pretrain_gpt_moa.py"):
        startup.prepare()  # changes Megatron before arguments are parsed
        startup.check_given_gpus()
        args, mixture = parse_arguments(check, as_global=False)
        transformer = transformer_config_from_args(args, mixture)  # refuses, too, so before anything is set up
        make_global(args)
        model_config = model_config_from_args(args, mixture, transformer)
        model_config.post_wrap_hooks.append(partial(report_mixture, mixture=mixture, form_reason=args.moa_form_reason))
        model_config.post_wrap_hooks.append(nan_guard.watch)
        if args.swiglu:
            model_config.post_wrap_hooks.append(muon.separate_gated_halves)
        monitor = None
        if args.moa_log_interval:
            monitor = CoefficientMonitor(mixture, args.moa_log_interval)
            model_config.post_wrap_hooks.append(monitor.attach)
        model_config.post_wrap_hooks.append(hold_timeout)  # last: a hook may make a group
        progress = Progress(args, monitor)
        stop = patch_training(args, mixture, progress)  # changes Megatron once they are known
        with exit_codes(stop), progress:
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                datasets_provider,
                ModelType.encoder_or_decoder,
                partial(forward_step, monitor=monitor),
            )


if __name__ == "__main__":
    main()
