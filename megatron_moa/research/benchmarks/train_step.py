"""Runs one training step of a model as Megatron sets it up, to be timed beside others in one process."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.benchmarks import timing


@dataclass
class TrainStep:
    """A model that trains.

    Attributes:
        run: one step: forward, backward, reduction of gradients, clipping, optimizer, schedule.
        state_bytes: what model, gradients and optimizer hold; None where nothing counts it: on a CPU.
    """

    name: str
    mixture: MixtureConfig | None
    run: timing.Run
    parameters: int
    state_bytes: int | None


def build(
    name: str,
    args: argparse.Namespace,
    mixture: MixtureConfig | None,
    batches: Iterator[dict],
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> TrainStep:
    """Builds model, optimizer and schedule as Megatron sets them up.

    The run is one training step inside ``context``.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import setup_model_and_optimizer, train_step

    from megatron_moa.training.model import check_mixture, measure_mixture, model_config_from_args
    from pretrain_gpt_moa import forward_step

    before = torch.cuda.memory_allocated()
    container = pretrain_cfg_container_from_args(args, model_config_from_args(args, mixture))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model, optimizer, schedule = setup_model_and_optimizer(
        ModelType.encoder_or_decoder, cfg_container=container, pg_collection=groups
    )
    check_mixture(model, mixture)
    for chunk in model:
        chunk.train()
    config = get_model_config(model[0])  # what Megatron's train() sets before its first step
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    iterator = RerunDataIterator(batches)

    def run(lap: timing.Lap) -> None:
        passes = get_forward_backward_func()
        with context():
            train_step(forward_step, iterator, model, optimizer, schedule, config, passes, iteration=0)
        lap("step")

    run(timing.no_lap)  # the optimizer makes its state in its first step
    state = torch.cuda.memory_allocated() - before if torch.cuda.is_available() else None
    return TrainStep(name, mixture, run, measure_mixture(model).parameters, state)


def random_batches(args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Endless micro-batches, a few of them in turn, on the device."""
    generator = torch.Generator().manual_seed(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (args.micro_batch_size, args.seq_length)
    positions = torch.arange(args.seq_length).expand(shape).contiguous()
    made = []
    for _ in range(4):
        drawn = torch.randint(args.padded_vocab_size, (shape[0], shape[1] + 1), generator=generator)
        batch = {
            "tokens": drawn[:, :-1].contiguous(),
            "labels": drawn[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape),
            "position_ids": positions,
        }
        made.append({key: tensor.to(device) for key, tensor in batch.items()})
    return itertools.cycle(made)
