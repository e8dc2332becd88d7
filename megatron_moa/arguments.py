"""Command-line flags of the mixture -> MixingConfig, and parsing with one-line errors."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_moa import checkpoint_guard, cpu, optimizer, optimizer_resharding, progress, random_states
from megatron_moa.activations import ACTIVATIONS
from megatron_moa.config import (
    AMPLITUDES,
    BACKENDS,
    DEFAULT_GATE_INIT_STD,
    DEFAULT_INITIAL_COEFFICIENT,
    DICTIONARIES,
    FORMS,
    GATES,
    INIT_SCALES,
    MIXINGS,
    MixingConfig,
    auto_form,
    check_form,
)
from megatron_moa.errors import UserError, fail
from megatron_moa.functional import check_overwrite, resolve_backend
from megatron_moa.saved_settings import FORMAT_VERSION, as_typed, check_saved_settings

# Their values decide the model's function, so they travel in a checkpoint's args and come back from there.
MODEL_FLAGS = (
    "moa_mixing",
    "moa_form",
    "moa_activations",
    "moa_gate",
    "moa_gate_bias",
    "moa_amplitude",
    "moa_init",
    "moa_gate_init_std",
    "moa_init_scale",
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the group "mixture of activations" to Megatron's parser, and makes its errors one line."""
    group = parser.add_argument_group("mixture of activations")
    # No argparse choices: MixingConfig checks, so that one text serves the command line and the library.
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
        help=f"the dictionary, from: {', '.join(ACTIVATIONS)}; default {' '.join(DICTIONARIES['bi-sided'])} "
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
    optimizer.add_arguments(group)
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
    cpu.set_plain_torch_defaults(parser)
    parser.error = lambda message: fail(parser.prog, message)
    _mend_help(parser)
    return parser


def add_all_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds every flag of ours to Megatron's parser: the mixture's, those of checkpoints and of watching."""
    return progress.add_arguments(checkpoint_guard.add_arguments(add_arguments(parser)))


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Megatron 0.19.2 has a bare % in the help of a flag, and --help ends in a traceback."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except ValueError:
            action.help = action.help.replace("%", "%%")


def _one_of(*names: str) -> str:
    return "{" + ",".join(names) + "}"


def mixing_from_args(args: argparse.Namespace) -> MixingConfig | None:
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
    for flag, given in (("--squared-relu", args.squared_relu), ("--quick-geglu", args.quick_geglu)):
        if given:
            raise UserError(f"{flag}: the mixture replaces the activation; name it in --moa-activations instead")
    optimizer.check_arguments(args)
    form = args.moa_form
    if form == "auto":
        form, args.moa_form_reason = auto_form(args.swiglu, bool(args.num_experts))
    check_form(form, args.swiglu)
    mixing = MixingConfig(
        mixing=args.moa_mixing,
        form=form,
        activations=tuple(args.moa_activations or ()),
        gate=args.moa_gate,
        gate_bias=args.moa_gate_bias,
        amplitude=args.moa_amplitude,
        initial_coefficients=tuple(args.moa_init or (DEFAULT_INITIAL_COEFFICIENT,)),
        gate_init_std=args.moa_gate_init_std,
        init_scale=args.moa_init_scale,
        freeze=args.moa_freeze_gates,
        recompute=args.moa_recompute,
        overwrite=args.moa_overwrite_preactivation,
        backend=args.moa_backend,
    )
    args.moa_form = mixing.form
    args.moa_activations = list(mixing.activations)
    args.moa_init = list(mixing.initial_coefficients)
    return mixing


def _refuse_mixture_flags(args: argparse.Namespace) -> None:
    for name, default in _defaults().items():
        value = getattr(args, name)
        if name != "moa_mixing" and value != default:
            raise UserError(f"{as_typed(name, value)}: has no effect with --moa-mixing none; drop one of the two")


def _defaults() -> dict[str, object]:
    """The mixture's flags when none is given."""
    parsed = vars(add_arguments(argparse.ArgumentParser()).parse_args([]))
    return {name: value for name, value in parsed.items() if name.startswith("moa_")}


# What else decides the model's function, and Megatron's --use-checkpoint-args leaves to the command line.
_MEGATRON_MODEL_ARGS = (
    "add_qkv_bias",
    "attention_output_gate",
    "bias_gelu_fusion",
    "fp32_residual_connection",
    "init_method_std",
    "kv_lora_rank",
    "layernorm_epsilon",
    "moe_apply_probs_on_input",
    "moe_input_jitter_eps",
    "moe_router_group_topk",
    "moe_router_load_balancing_type",
    "moe_router_num_groups",
    "moe_shared_expert_gate",
    "mscale",
    "mscale_all_dim",
    "multi_latent_attention",
    "q_lora_rank",
    "qk_head_dim",
    "qk_l2_norm",
    "qk_layernorm",
    "qk_pos_emb_head_dim",
    "rope_scaling_factor",
    "rope_type",
    "rotary_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "softmax_scale",
    "use_rope_scaling",
    "v_head_dim",
    "vocab_size",
)


def restore_model_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Takes the model's settings from a checkpoint's args: the mixture's (without them it is stock Megatron's), and
    those of Megatron's that its own --use-checkpoint-args does not take.

    Raises:
        UserError: a flag of the mixture was given, and the checkpoint has another value.
    """
    for name in _MEGATRON_MODEL_ARGS:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    defaults = _defaults()
    stock = {**defaults, "moa_mixing": "none"}
    for name in MODEL_FLAGS:
        given, stored = getattr(args, name), getattr(saved, name, stock[name])
        if given not in (defaults[name], stored):
            raise UserError(f"{as_typed(name, given)}: the checkpoint has {as_typed(name, stored)}; drop the flag")
        setattr(args, name, stored)
    for name in optimizer.TRAINING_FLAGS:
        if getattr(args, name) == defaults[name]:
            setattr(args, name, getattr(saved, name, defaults[name]))


def parse_arguments(
    check: Callable[[argparse.Namespace], None] | None = None, as_global: bool = True
) -> tuple[argparse.Namespace, MixingConfig | None]:
    """Megatron's ``parse_and_validate_args`` with our flags, early checks and one-line errors.

    Args:
        check: the caller's own check of the parsed args, before Megatron's.
        as_global: whether they become Megatron's global args, which a process has once.

    Returns:
        Megatron's args and the mixture (None: stock).

    Raises:
        UserError: whatever a user can get wrong, Megatron's own assertions included.
    """
    # Imported here, when megatron_moa.cpu has replaced what it must.
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint
    from megatron.training.global_vars import set_global_variables

    args = parse_args(add_all_arguments)
    checkpoint_guard.check_arguments(args)
    progress.check_arguments(args)
    saved = None
    checkpoint = checkpoint_guard.find_checkpoint(args)
    if checkpoint is not None:
        checkpoint, saved = checkpoint_guard.read_saved_settings(args, checkpoint)
    if args.use_checkpoint_args:
        folder = args.load or args.pretrained_checkpoint
        if folder is None:
            raise UserError("--use-checkpoint-args: needs a checkpoint; add --load FOLDER")
        if saved is None:
            raise UserError(f"--load {folder}: no checkpoint with settings there; give a folder --save wrote to")
        grouped = args.moe_grouped_gemm  # how experts are computed, not what: a flag of the run
        load_args_from_checkpoint(args, "load" if checkpoint.flag == "--load" else "pretrained_checkpoint")
        args.moe_grouped_gemm = args.moe_grouped_gemm or grouped
        restore_model_flags(args, saved)
        if args.tokenizer_type is None:  # where only the tokenizer's file is the run's own, because it has moved
            args.tokenizer_type = getattr(saved, "tokenizer_type", None)
    mixing = mixing_from_args(args)
    if args.moa_log_interval and args.fake_process_group:
        raise UserError(
            f"--moa-log-interval {args.moa_log_interval}: with --fake-process-group there are no ranks to sum over; "
            "drop one of the two"
        )
    if mixing is not None:
        # Now, not at the first step.
        check_overwrite(mixing, resolve_backend(mixing.backend, "cuda" if torch.cuda.is_available() else "cpu"))
        # The activation step is ours; Megatron would check that it could fuse the one it no longer runs.
        args.bias_gelu_fusion = args.bias_swiglu_fusion = False
    if not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False  # plain causal: no [s, s] mask per sample
    if not args.eval_interval:
        # Megatron 0.19.2 means never before the end, and then divides by it.
        args.eval_interval = 1 + (args.train_iters or args.train_samples or 0)
    if check is not None:
        check(args)
    with megatron_checks():
        validate_args(args)
    optimizer.check_validated_arguments(args)
    if saved is not None:
        check_saved_settings(args, saved, checkpoint)
        optimizer.check_saved_optimizer(args, saved, checkpoint)
        optimizer.check_saved_schedule(args, saved, checkpoint)
        optimizer_resharding.check_saved_split(args, saved, checkpoint)
    args.moa_format_version = FORMAT_VERSION  # travels in checkpoints
    optimizer_resharding.install()
    random_states.keep_every_ranks()
    random_states.check_saved(args, saved)
    if as_global:
        with progress.wandb_errors(args):
            set_global_variables(args)
    return args, mixing


@contextmanager
def megatron_checks() -> Iterator[None]:
    """Turns Megatron's assertions on arguments, raised inside, into a :class:`UserError` of one line."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        text = " ".join(str(error).split())
        # Where an assertion has no text, the condition that failed says most.
        raise UserError(text or f"Megatron requires {traceback.extract_tb(error.__traceback__)[-1].line}") from error
