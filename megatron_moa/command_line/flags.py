"""Adds this project's flags to Megatron's parser and turns the parsed ones into a MixtureConfig.

Nothing here needs torch or Megatron, so that a mistake is answered before they are imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re

from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import (
    ACTIVATION_NAMES,
    AMPLITUDES,
    ARGS,
    BACKENDS,
    DEFAULT_GATE_INIT_STD,
    DEFAULT_INITIAL_COEFFICIENT,
    DICTIONARIES,
    FORMS,
    GATES,
    INIT_SCALES,
    LARGEST,
    MIXINGS,
    SMALLEST,
    MixtureConfig,
    auto_form,
    check_form,
    in_range,
)

PROGRESS_MODES = ("auto", "line", "log", "off")

# What Megatron writes every so many iterations, beside checkpoints.
_WRITTEN_TO_SAVE = (
    "save_params_interval",
    "save_activations_interval",
    "save_dgrads_interval",
    "save_wgrads_interval",
    "save_tokens_per_expert_interval",
    "non_persistent_save_interval",
)

# Settings of training, not of the model: they come back from a checkpoint, and another value is no contradiction.
TRAINING_FLAGS = ("moa_gate_lr_scale", "moa_gate_weight_decay", "moa_freeze_gates")

# Their values decide the model's function, so they travel in a checkpoint's args and come back from there.
MODEL_FLAGS = tuple(name for name in ARGS.values() if name not in TRAINING_FLAGS)


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds every flag of ours: the mixture's, those of checkpoints and of watching a training."""
    parser.add_argument("--help-megatron", action="help", help="explain Megatron's flags, too, and exit")
    add_mixture_flags(parser)
    add_checkpoint_flags(parser)
    add_progress_flags(parser)
    return parser


def our_flags() -> list[str]:
    """The names of every flag of ours."""
    parser = add_flags(argparse.ArgumentParser(add_help=False))
    return [flag for action in parser._actions for flag in action.option_strings]


def add_mixture_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group "mixture of activations"."""
    # Python 3.12 takes -1e-05, as a float is printed, for a flag.
    parser._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    group = parser.add_argument_group("mixture of activations")
    # No argparse choices: MixtureConfig checks, so that one text serves the command line and the library.
    group.add_argument(
        "--moa-mixing",
        default="moa",
        metavar=_one_of("none", *MIXINGS),
        help="moa: coefficients from token-dependent gates; la: coefficients are parameters; none: stock Megatron",
    )
    group.add_argument(
        "--moa-form",
        default="auto",
        metavar=_one_of("auto", *FORMS),
        help="which branches are mixed; auto is type1 without --swiglu, one-sided with --num-experts, else bi-sided",
    )
    group.add_argument(
        "--moa-activations",
        nargs="+",
        metavar="NAME",
        help=f"the dictionary, from: {', '.join(ACTIVATION_NAMES)}; default {' '.join(DICTIONARIES['bi-sided'])} "
        f"(type1: {' '.join(DICTIONARIES['type1'])}; quadratic: {' '.join(DICTIONARIES['quadratic'])})",
    )
    group.add_argument("--moa-gate", default="sigmoid", metavar=_one_of(*GATES), help="the gates' nonlinearity")
    group.add_argument("--moa-gate-bias", action="store_true", help="gates have a bias, started at 0")
    group.add_argument(
        "--moa-amplitude",
        default="fixed",
        metavar=_one_of(*AMPLITUDES),
        help="learned: a factor per coefficient, so that MoA contains LA",
    )
    group.add_argument(
        "--moa-init",
        nargs="+",
        type=float,
        metavar="V",
        help="start of the LA coefficients and of learned amplitudes: one value, or all n; "
        f"default {DEFAULT_INITIAL_COEFFICIENT:g}",
    )
    group.add_argument(
        "--moa-gate-init-std",
        type=float,
        default=DEFAULT_GATE_INIT_STD,
        metavar="STD",
        help=f"gate vectors start normal with this standard deviation; default {DEFAULT_GATE_INIT_STD}",
    )
    group.add_argument(
        "--moa-init-scale",
        default="paper",
        metavar=_one_of(*INIT_SCALES),
        help="paper: the initial values as they are; matched: coefficients scaled so that the layer starts with "
        "SwiGLU's (type1: GELU's) output variance; default paper",
    )
    group.add_argument(
        "--moa-freeze-gates", action="store_true", help="gates, amplitudes and LA coefficients stay as they start"
    )
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
    group.add_argument(
        "--moa-backend",
        default="auto",
        metavar=_one_of(*BACKENDS),
        help="what computes the mixture; auto takes the fastest that is there",
    )
    group.add_argument(
        "--moa-recompute",
        action="store_true",
        help="keep fc1's output and compute the mixture's again in backward: dense, routed and shared experts",
    )
    group.add_argument(
        "--moa-overwrite-preactivation",
        action="store_true",
        help="backward writes the gradient of fc1's output over that output (Triton kernels only)",
    )
    group.add_argument(
        "--moa-log-interval",
        type=int,
        default=0,
        metavar="N",
        help="every N iterations log mean and standard deviation over tokens of the coefficients, and of a layer's "
        "gates effective rank, spread and distance from a constant, also to TensorBoard and W&B; 0 is never",
    )


def add_progress_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group "watching a training"."""
    group = parser.add_argument_group("watching a training, beside Megatron's own flags")
    group.add_argument(
        "--moa-progress",
        default="auto",
        metavar="{" + ",".join(PROGRESS_MODES) + "}",
        help="log: tokens, tokens/s, MFU and the time left in each line of the training log; line: a line on the "
        "terminal, too, that is rewritten in place; off: neither; auto: line on a terminal, else log",
    )
    group.add_argument(
        "--moa-peak-tflops",
        type=float,
        metavar="X",
        help="what MFU is a part of: dense TFLOP/s of one GPU in the format trained in; default: the data sheet's "
        "(megatron_moa/training/gpus.py)",
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group "checkpoints"."""
    group = parser.add_argument_group("checkpoints, beside Megatron's own flags")
    group.add_argument(
        "--moa-keep-last",
        type=int,
        metavar="N",
        help="keep the last N checkpoints, and with --save-retain-interval M also those of iterations divisible by M",
    )
    group.add_argument(
        "--moa-load-last-complete",
        action="store_true",
        help="where the latest checkpoint is damaged, go on from the last complete one before it instead of an error",
    )
    group.add_argument(
        "--moa-no-verify-checkpoint",
        action="store_true",
        help="before loading compare only the sizes of a checkpoint's files with its manifest, not their checksums",
    )


def _one_of(*names: str) -> str:
    return "{" + ",".join(names) + "}"


def mixture_from_args(args: argparse.Namespace) -> MixtureConfig | None:
    """The mixture that the parsed flags ask for; None for ``--moa-mixing none``.

    Writes the resolved form, dictionary and initial values back to ``args``, so that checkpoints carry them, and why
    ``auto`` became that form as ``args.moa_form_reason`` (None for a form that was named).

    Raises:
        UserError: flags that are invalid or contradict each other.
    """
    if args.moa_log_interval < 0:
        raise UserError(
            f"--moa-log-interval {args.moa_log_interval}: negative; give a number of iterations, 0 for never"
        )
    args.moa_form_reason = None
    if args.moa_mixing == "none":
        _refuse_mixture_flags(args)
        return None
    _check_gate_training(args)
    if args.moa_form == "auto":
        args.moa_form, args.moa_form_reason = auto_form(args.swiglu, bool(args.num_experts))
    check_form(args.moa_form, args.swiglu)
    mixture = MixtureConfig.from_args(
        args, recompute=args.moa_recompute, overwrite=args.moa_overwrite_preactivation, backend=args.moa_backend
    )
    vars(args).update(mixture.to_args())
    return mixture


def _refuse_mixture_flags(args: argparse.Namespace) -> None:
    for name, default in mixture_defaults().items():
        value = getattr(args, name)
        if name != "moa_mixing" and value != default:
            raise UserError(f"{as_typed(name, value)}: has no effect with --moa-mixing none; drop one of the two")


def mixture_defaults() -> dict[str, object]:
    """The mixture's flags when none is given."""
    parser = argparse.ArgumentParser()
    add_mixture_flags(parser)
    return vars(parser.parse_args([]))


def _check_gate_training(args: argparse.Namespace) -> None:
    """Raises UserError for invalid settings of the gates' training, and for those without effect."""
    scale, decay = args.moa_gate_lr_scale, args.moa_gate_weight_decay
    allowed = f"from {SMALLEST:g} to {LARGEST:g}"
    if not (in_range(scale) and scale > 0):
        raise UserError(
            f"--moa-gate-lr-scale {scale}: give a positive number {allowed}; --moa-freeze-gates trains none of them"
        )
    if decay is not None and not (in_range(decay) and decay >= 0):
        raise UserError(f"--moa-gate-weight-decay {decay}: give a number, 0 or more, {allowed}")
    for name, without_effect in (("moa_gate_lr_scale", scale == 1), ("moa_gate_weight_decay", decay is None)):
        if args.moa_freeze_gates and not without_effect:
            given = as_typed(name, getattr(args, name))
            raise UserError(f"{given}: has no effect with --moa-freeze-gates; drop one of the two")
    if decay is not None and args.moa_mixing == "la":
        raise UserError(
            f"--moa-gate-weight-decay {decay}: has no effect with --moa-mixing la, which has no gates and never decays "
            "its coefficients; drop one of the two"
        )


def check_checkpoint_flags(args: argparse.Namespace) -> None:
    """Raises UserError for invalid values of these flags."""
    for name in ("load", "save", "pretrained_checkpoint", "non_persistent_global_ckpt_dir"):
        folder = getattr(args, name)
        if folder is not None and "://" in folder:  # which Megatron takes, and nothing here could check
            raise UserError(
                f"{as_typed(name, folder)}: checkpoints in object stores are not supported; name a folder, and copy it"
            )
    if args.moa_keep_last is not None and args.moa_keep_last < 1:
        raise UserError(f"--moa-keep-last {args.moa_keep_last}: would keep none; give 1 or more")
    if args.moa_keep_last is not None and args.save is None:
        raise UserError(f"--moa-keep-last {args.moa_keep_last}: nothing is saved; add --save FOLDER, or drop the flag")
    if args.save is not None and args.save_interval is None:
        # Megatron 0.19.2 has an assertion without a text for it.
        raise UserError(f"--save {args.save}: says where, not when; add --save-interval N, in iterations")
    for name in _WRITTEN_TO_SAVE:
        interval = getattr(args, name, None)
        if interval is not None and args.save is None:  # Megatron finds out when there is something to write
            raise UserError(f"{as_typed(name, interval)}: writes to the folder --save names; add it, or drop the flag")
    every = getattr(args, "non_persistent_save_interval", None)
    if every is not None and args.non_persistent_ckpt_type is None:  # an error at the first of these saves
        raise UserError(f"--non-persistent-save-interval {every}: says when, not how; add --non-persistent-ckpt-type")
    if args.moa_load_last_complete and args.ckpt_step:
        raise UserError(f"--moa-load-last-complete: contradicts --ckpt-step {args.ckpt_step}; drop one of the two")


def check_progress_flags(args: argparse.Namespace) -> None:
    """Raises UserError for invalid progress flags and for TensorBoard or W&B that cannot be used.

    Both must be installed where they are asked for. Megatron trains on without TensorBoard, after a warning, and
    without W&B ends in a traceback.
    """
    if args.moa_progress not in PROGRESS_MODES:
        raise UserError(f"--moa-progress {args.moa_progress}: unknown; choose one of {', '.join(PROGRESS_MODES)}")
    peak = args.moa_peak_tflops
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--moa-peak-tflops {peak:g}: not a speed; give the GPU's dense TFLOP/s, such as 989")
    if args.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            f"--tensorboard-dir {args.tensorboard_dir}: TensorBoard is not installed; pip install tensorboard, or drop "
            "the flag"
        )
    if not args.wandb_project:
        return
    flag = f"--wandb-project {args.wandb_project}"
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"{flag}: W&B is not installed; pip install wandb, or drop the flag")
    if not args.wandb_exp_name:
        raise UserError(f"{flag}: a run needs a name; add --wandb-exp-name NAME")
    if not args.wandb_save_dir and not args.save:
        raise UserError(f"{flag}: nowhere to write; add --wandb-save-dir FOLDER, or --save FOLDER")
    if not args.tensorboard_dir:
        raise UserError(f"{flag}: Megatron sends W&B only what it writes to TensorBoard; add --tensorboard-dir FOLDER")
