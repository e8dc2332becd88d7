"""How the mixture's parameters are trained: by Adam, at what learning rate and weight decay.

docs/mixture.md, "Optimizer", has the table. Megatron sorts parameters into groups by ``ParamKey``; these are the
mixture's, by name, because its FSDP keeps names and drops attributes of ours.
"""

from __future__ import annotations

import argparse
import functools
import math

from torch.nn import Parameter

from megatron_moa.checkpoint_files import Checkpoint
from megatron_moa.errors import UserError
from megatron_moa.saved_settings import as_typed, loads_optimizer

_GATES = "*.coefficients.weight"  # [n, h]
_ALL = "*.coefficients.*"  # biases, amplitudes and LA coefficients [n] too
_MARK = "moa_gate"  # attribute of a gate's matrix

# Settings of training, not of the model: they come back from a checkpoint, and another value is no contradiction.
TRAINING_FLAGS = ("moa_gate_lr_scale", "moa_gate_weight_decay", "moa_freeze_gates")


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of this module."""
    group.add_argument(
        "--moa-gate-lr-scale",
        type=float,
        default=1.0,
        metavar="V",
        help="multiplies the learning rate of gates, amplitudes and LA coefficients, at every step of its schedule",
    )
    group.add_argument(
        "--moa-gate-weight-decay",
        type=float,
        metavar="V",
        help="weight decay of the gate matrices, constant; default: as --weight-decay and its schedule. Biases, "
        "amplitudes and LA coefficients have none",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for values of these flags that cannot be, or have no effect; for a mixture only."""
    scale, decay = args.moa_gate_lr_scale, args.moa_gate_weight_decay
    if not 0 < scale < math.inf:
        raise UserError(f"--moa-gate-lr-scale {scale}: give a positive number; --moa-freeze-gates trains none of them")
    if decay is not None and not 0 <= decay < math.inf:
        raise UserError(f"--moa-gate-weight-decay {decay}: give a number, 0 or more")
    for name, without_effect in (("moa_gate_lr_scale", scale == 1), ("moa_gate_weight_decay", decay is None)):
        if args.moa_freeze_gates and not without_effect:
            given = as_typed(name, getattr(args, name))
            raise UserError(f"{given}: has no effect with --moa-freeze-gates; drop one of the two")
    if decay is not None and args.moa_mixing == "la":
        raise UserError(
            f"--moa-gate-weight-decay {decay}: has no effect with --moa-mixing la, which has no gates and never decays "
            "its coefficients; drop one of the two"
        )


def check_validated_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for what Megatron 0.19.2 only fails at in the first step; after its own checks of ``args``."""
    if args.use_layer_wise_distributed_optimizer and not args.bf16:
        # LayerWiseDistributedOptimizer then chains torch's optimizers bare: 'no attribute get_loss_scale'.
        raise UserError(
            f"--optimizer {args.optimizer} --use-distributed-optimizer: Megatron shares it out over ranks only with "
            "--bf16; add that, or drop --use-distributed-optimizer"
        )


def check_saved_optimizer(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint's optimizer has other parameter groups than a run's would have.

    Megatron 0.19.2 finds the groups again by their settings, learning rates among them, and if it does not, fails once
    everything is built; --override-opt-param-scheduler changes nothing about that.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    if not loads_optimizer(args, saved, checkpoint):
        return
    unset = {"moa_gate_lr_scale": 1.0, "moa_gate_weight_decay": None, "moa_freeze_gates": False}
    for name in ("optimizer", "lr", "min_lr", *unset):
        value = getattr(args, name)
        saved_value = getattr(saved, name, unset.get(name, value))
        if value != saved_value:
            raise UserError(
                f"{as_typed(name, value)}: the optimizer to load has {as_typed(name, saved_value)} ({checkpoint}); "
                "give that, or start a new optimizer and schedule with --no-load-optim"
            )


def check_saved_schedule(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint's learning rate and weight decay go by another schedule than the run's.

    Megatron 0.19.2 has an assertion for it once everything is built, which names no flag. Arguments are those of
    :func:`check_saved_optimizer`.
    """
    if not loads_optimizer(args, saved, checkpoint):
        return
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    theirs = _schedule(saved)
    for flag, (value, meaning) in _schedule(args).items():
        saved_flag, (saved_value, saved_meaning) = flag, theirs.get(flag, (None, None))
        if saved_value is None:  # iterations here, samples there
            saved_flag = next(name for name in theirs if name.split("_")[:-1] == flag.split("_")[:-1])
            saved_value, saved_meaning = theirs[saved_flag]
        if meaning != saved_meaning:
            differs, saved_differs = as_typed(flag, value), as_typed(saved_flag, saved_value)
            if value == saved_value:  # as many iterations, of another size
                differs = as_typed("global_batch_size", args.global_batch_size)
                saved_differs = as_typed("global_batch_size", saved.global_batch_size)
            raise UserError(
                f"{differs}: the schedule to go on with has {saved_differs} ({checkpoint}); give that, or add "
                "--override-opt-param-scheduler to follow the new one, --use-checkpoint-opt-param-scheduler the old one"
            )


def _schedule(args: argparse.Namespace) -> dict[str, tuple[object, object]]:
    """What Megatron's schedule is made of, by flag: as given, and what it means (lengths in samples)."""
    in_samples = bool(args.train_samples)
    unit, samples = ("samples", 1) if in_samples else ("iters", args.global_batch_size)
    length = getattr(args, f"train_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or length
    warmup = getattr(args, f"lr_warmup_{unit}")
    schedule = {f"train_{unit}": (length, length * samples), f"lr_decay_{unit}": (decay, decay * samples)}
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    schedule[f"lr_warmup_{unit}"] = (warmup, warmup * samples)
    for name in ("lr_decay_style", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"):
        schedule[name] = (getattr(args, name), getattr(args, name))
    return schedule


def install(args: argparse.Namespace) -> None:
    """Lets Megatron's training loop follow this module's flags; before ``pretrain``.

    Megatron 0.19.2 has ParamKey overrides for this, and no way for a script to pass its own. ``lr_mult`` is kept in its
    groups and checkpoints, but no longer applied: a scaled ``max_lr`` and ``min_lr`` would leave --lr-warmup-init as it
    is, and contradict what --use-mup sets.
    """
    from megatron.core.optimizer import ParamKey
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import training

    ours = {}
    if args.moa_gate_lr_scale != 1:
        ours[ParamKey(name=_ALL)] = {"lr_mult": args.moa_gate_lr_scale}
    if args.moa_gate_weight_decay is not None:
        decay = args.moa_gate_weight_decay
        ours[ParamKey(name=_GATES)] = {"start_wd": decay, "end_wd": decay}
    if not ours:
        return
    overrides, learning_rate = training.get_standard_config_overrides, OptimizerParamScheduler.get_lr

    @functools.wraps(overrides)
    def overrides_with_ours(*arguments: object, **keywords: object) -> dict:
        return overrides(*arguments, **keywords) | ours

    @functools.wraps(learning_rate)
    def scaled_learning_rate(self: OptimizerParamScheduler, group: dict) -> float:
        return learning_rate(self, group) * group["lr_mult"]

    training.get_standard_config_overrides = overrides_with_ours
    OptimizerParamScheduler.get_lr = scaled_learning_rate


def train_by_adam(gate: Parameter) -> Parameter:
    """Marks a gate's matrix, so that Muon, SOAP and the like, which take every matrix [.., ..], leave it to Adam.

    ``is_embedding_or_output_parameter`` would do that too, but it also asks for --decoupled-lr.
    """
    _leave_marked_to_adam()
    setattr(gate, _MARK, True)
    return gate


@functools.cache
def _leave_marked_to_adam() -> None:
    """Megatron 0.19.2 decides by shape in two places that must agree: which optimizer a parameter's group gets, by the
    overrides of each optimizer's registry entry; and which buffer of the layer-wise distributed optimizer it lies in,
    and which rules of --use-mup it follows, by a predicate.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import ParamKey, emerging_optimizers, layer_wise_optimizer

    for entry in emerging_optimizers._EMERGING_OPTIMIZERS.values():
        entry.default_param_overrides[ParamKey(attr=_MARK)] = {"optimizer": "adam"}
    by_shape = layer_wise_optimizer.is_managed_by_layer_wise_optimizer

    @functools.wraps(by_shape)
    def by_shape_and_mark(parameter: Parameter) -> bool:
        return by_shape(parameter) and not getattr(parameter, _MARK, False)

    for module in (layer_wise_optimizer, optimizer):
        module.is_managed_by_layer_wise_optimizer = by_shape_and_mark
