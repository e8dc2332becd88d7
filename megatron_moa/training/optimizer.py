"""Sets how the mixture's parameters are trained: by Adam, at what learning rate and weight decay.

docs/mixture.md, "Optimizer", has the table. Megatron sorts parameters into groups by ``ParamKey``; these are the
mixture's, by name, because its FSDP keeps names and drops attributes of ours.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.checkpoints.settings import differing, loads_optimizer
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes.patching import patch
from megatron_moa.training.megatron_checks import megatron_checks

_GATES = "*.coefficients.weight"  # [n, h]
_ALL = "*.coefficients.*"  # biases, amplitudes and LA coefficients [n] too
_UNSAVED = ("lr_wsd_decay", "lr_warmup_init")  # what a saved schedule of Megatron 0.19.2 lacks


def check_schedule(args: argparse.Namespace) -> None:
    """Raises UserError for an invalid schedule of learning rate or weight decay.

    Megatron 0.19.2 asserts these things once the model is built, without naming a flag.

    Args:
        args: Megatron's, parsed and not validated.
    """
    unit = "samples" if args.train_samples else "iters"
    length = getattr(args, f"train_{unit}")
    if not length:
        raise UserError("--train-iters is missing; add --train-iters N, or --train-samples N")
    if args.lr is None:
        raise UserError("--lr is missing; add e.g. --lr 3e-4")
    for name in ("min_lr", "lr_warmup_init"):
        if (getattr(args, name) or 0) > args.lr:
            raise UserError(f"{as_typed(name, getattr(args, name))}: above --lr {args.lr}; give that or less")
    _check_lengths(args, unit, length)
    _check_weight_decay(args)


def _check_lengths(args: argparse.Namespace, unit: str, length: int) -> None:
    """The parts of a schedule, in iterations or samples."""
    decay_name, warmup_name, last_name = (f"lr_{part}_{unit}" for part in ("decay", "warmup", "wsd_decay"))
    decay = getattr(args, decay_name) or length
    decay_is = as_typed(decay_name, decay) if getattr(args, decay_name) else as_typed(f"train_{unit}", length)
    if args.lr_warmup_fraction is not None:
        if args.lr_warmup_fraction >= 1:
            given = as_typed("lr_warmup_fraction", args.lr_warmup_fraction)
            raise UserError(f"{given}: leaves nothing to the decay; give a part of it, such as 0.01")
    elif getattr(args, warmup_name) >= decay:
        given = as_typed(warmup_name, getattr(args, warmup_name))
        raise UserError(f"{given}: the warm-up does not end before the decay ({decay_is}); give less")
    last = getattr(args, last_name)
    if args.lr_decay_style == "WSD" and last is None:
        flag = as_typed(last_name, "N")
        raise UserError(f"--lr-decay-style WSD: the length of its last part is missing; add {flag}")
    if args.lr_decay_style == "WSD" and last > decay:
        raise UserError(f"{as_typed(last_name, last)}: longer than the decay it is a part of ({decay_is}); give less")


def _check_weight_decay(args: argparse.Namespace) -> None:
    start, end = args.start_weight_decay, args.end_weight_decay
    style = as_typed("weight_decay_incr_style", args.weight_decay_incr_style)
    if args.weight_decay_incr_style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(args, name) is not None:
                given = as_typed(name, getattr(args, name))
                raise UserError(f"{given}: has no effect with {style}; add --weight-decay-incr-style linear")
        return
    if start is None or end is None:
        raise UserError(f"{style}: from where to where; add --start-weight-decay V --end-weight-decay V")
    if start > end:
        raise UserError(f"--start-weight-decay {start}: above --end-weight-decay {end}, and it only grows; give less")


def check_validated_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for what Megatron 0.19.2 only fails at in the first step.

    To be called after Megatron's own checks of ``args``.
    """
    if args.use_layer_wise_distributed_optimizer and not args.bf16:
        # LayerWiseDistributedOptimizer then chains torch's optimizers bare: 'no attribute get_loss_scale'.
        raise UserError(
            f"--optimizer {args.optimizer} --use-distributed-optimizer: Megatron shares it out over ranks only with "
            "--bf16; add that, or drop --use-distributed-optimizer"
        )
    if args.optimizer == "adaptive_muon":  # 'no attribute scale_mode'
        raise UserError(
            "--optimizer adaptive_muon: Megatron 0.19.2's does not go with emerging-optimizers 0.3.0; "
            "take --optimizer muon"
        )


_IN_GROUPS = {  # settings that an optimizer keeps in its parameter groups, and so in checkpoints
    "adam": ("adam_beta1", "adam_beta2", "adam_eps"),
    "lion": ("lion_beta1", "lion_beta2"),
    "muon": ("muon_momentum",),
    "sgd": ("sgd_momentum",),
}


def check_saved_optimizer(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint's optimizer has other parameter groups than a run's would have.

    Megatron 0.19.2 finds the groups again by their settings, learning rates among them, and if it does not, fails once
    everything is built; --override-opt-param-scheduler changes nothing about that. The groups' betas, epsilon and
    momentum come from the checkpoint, and the run's would be ignored.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    if not loads_optimizer(args, saved, checkpoint):
        return
    unset = {"moa_gate_lr_scale": 1.0, "moa_gate_weight_decay": None, "moa_freeze_gates": False}
    names = ["optimizer", "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", *unset]
    if args.optimizer == "muon":
        names.append("muon_scalar_optimizer")
    for optimizer in (args.optimizer, args.muon_scalar_optimizer if args.optimizer == "muon" else None):
        names += _IN_GROUPS.get(optimizer, ())
    for name, here, there in differing(names, args, saved, unset, exactly=True):
        raise UserError(
            f"{as_typed(name, here)}: the optimizer to load has {as_typed(name, there)} ({checkpoint}); "
            "give that, or start a new optimizer and schedule with --no-load-optim"
        )


def check_saved_schedule(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint goes by another schedule than the run.

    That is the schedule of learning rate and weight decay. Megatron 0.19.2 has an assertion for it once everything is
    built, which names no flag. Arguments are those of :func:`check_saved_optimizer`.
    """
    if not loads_optimizer(args, saved, checkpoint):
        return
    if args.override_opt_param_scheduler:
        return
    follows_saved = args.use_checkpoint_opt_param_scheduler
    style = (saved if follows_saved else args).lr_decay_style
    theirs = _schedule(saved, style)
    for flag, (value, meaning) in _schedule(args, style).items():
        is_saved = not flag.startswith(_UNSAVED)
        if follows_saved and is_saved:
            continue
        saved_flag = flag
        if flag not in theirs:  # iterations here, samples there
            what, unit = flag.rsplit("_", 1)
            saved_flag = f"{what}_{'samples' if unit == 'iters' else 'iters'}"
        saved_value, saved_meaning = theirs[saved_flag]
        if meaning != saved_meaning:
            differs, saved_differs = as_typed(flag, value), as_typed(saved_flag, saved_value)
            if value == saved_value:  # as many iterations, of another size
                differs = as_typed("global_batch_size", args.global_batch_size)
                saved_differs = as_typed("global_batch_size", saved.global_batch_size)
            old_one = ", --use-checkpoint-opt-param-scheduler the old one" if is_saved else ""
            raise UserError(
                f"{differs}: the schedule to go on with has {saved_differs} ({checkpoint}); give that, or add "
                f"--override-opt-param-scheduler to follow the new one{old_one}"
            )


def _schedule(args: argparse.Namespace, style: str) -> dict[str, tuple[object, object]]:
    """What Megatron's schedule is made of, by flag: as given, and what it means (lengths in samples).

    Args:
        style: of the learning rate's decay; WSD has flags of its own.
    """
    in_samples = bool(args.train_samples)
    unit, samples = ("samples", 1) if in_samples else ("iters", args.global_batch_size)
    length = getattr(args, f"train_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or length
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    lengths = {f"train_{unit}": length, f"lr_decay_{unit}": decay, f"lr_warmup_{unit}": warmup}
    names = ["lr_decay_style", "lr_warmup_init", "weight_decay_incr_style"]
    if style == "WSD":
        names.append("lr_wsd_decay_style")
        lengths[f"lr_wsd_decay_{unit}"] = getattr(args, f"lr_wsd_decay_{unit}") or 0
    if args.weight_decay_incr_style == "constant":  # Megatron fills in the other two by it
        names.append("weight_decay")
    else:
        names += ["start_weight_decay", "end_weight_decay"]
    values = {name: getattr(args, name) for name in names}
    return {name: (value, value) for name, value in values.items()} | {
        name: (value, value * samples) for name, value in lengths.items()
    }


def _checked(build: Callable, args: argparse.Namespace) -> Callable:
    """A function of Megatron's that builds from settings; its assertions become one line."""

    @functools.wraps(build)
    def call(*arguments: object, **keywords: object) -> object:
        with megatron_checks(args):
            return build(*arguments, **keywords)

    return call


def install(args: argparse.Namespace) -> None:
    """Lets Megatron's training loop follow this module's flags; before ``pretrain``.

    Megatron 0.19.2 has ParamKey overrides for this, and no way for a script to pass its own. ``lr_mult`` is kept in its
    groups and checkpoints, but no longer applied: a scaled ``max_lr`` and ``min_lr`` would leave --lr-warmup-init as it
    is, and contradict what --use-mup sets.
    """
    for change in _CHECKED:
        change.install(args)
    overrides = _overrides(args)
    if overrides:
        _OVERRIDES.install(overrides)
        _LEARNING_RATE.install()


def _overrides(args: argparse.Namespace) -> dict:
    """What this module's flags ask of the groups of the mixture's parameters; empty for nothing."""
    from megatron.core.optimizer import ParamKey

    overrides = {}
    if args.moa_gate_lr_scale != 1:
        overrides[ParamKey(name=_ALL)] = {"lr_mult": args.moa_gate_lr_scale}
    if args.moa_gate_weight_decay is not None:
        decay = args.moa_gate_weight_decay
        overrides[ParamKey(name=_GATES)] = {"start_wd": decay, "end_wd": decay}
    return overrides


def _with_overrides(standard: Callable, ours: dict) -> Callable:
    @functools.wraps(standard)
    def call(*arguments: object, **keywords: object) -> dict:
        return standard(*arguments, **keywords) | ours

    return call


def _scaled(learning_rate: Callable) -> Callable:
    @functools.wraps(learning_rate)
    def call(self: object, group: dict) -> float:
        return learning_rate(self, group) * group["lr_mult"]

    return call


_CHECKED = tuple(
    patch(
        f"megatron.training.training.{name}",
        _checked,
        why="its assertions about flags are tracebacks that name no flag",
        version="0.19.2",
        remove_when="Megatron checks these settings with its arguments",
    )
    for name in ("get_optimizer_param_scheduler", "get_megatron_optimizer")
)
_OVERRIDES = patch(
    "megatron.training.training.get_standard_config_overrides",
    _with_overrides,
    why="a script cannot pass ParamKey overrides, which --moa-gate-lr-scale and --moa-gate-weight-decay are",
    version="0.19.2",
    remove_when="pretrain() takes overrides from the script",
)
_LEARNING_RATE = patch(
    "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.get_lr",
    _scaled,
    why="groups keep lr_mult, and nothing multiplies by it",
    version="0.19.2",
    remove_when="Megatron's scheduler applies lr_mult",
)
