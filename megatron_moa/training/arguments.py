"""Parses and checks the command line of a training.

Takes the settings of a checkpoint where that is asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

import torch

from megatron_moa.checkpoints import guard
from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.checkpoints.settings import check_saved_settings, differing
from megatron_moa.command_line import megatron_flags
from megatron_moa.command_line.flags import (
    MODEL_FLAGS,
    TRAINING_FLAGS,
    check_checkpoint_flags,
    check_progress_flags,
    mixture_defaults,
    mixture_from_args,
)
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.command_line.output_folder import check_output_folders
from megatron_moa.command_line.shapes import check_shapes
from megatron_moa.errors import UserError
from megatron_moa.megatron_fixes import optimizer_resharding, random_states
from megatron_moa.mixture.config import FORMAT_VERSION, MixtureConfig
from megatron_moa.mixture.functional import check_overwrite, resolve_backend
from megatron_moa.training import optimizer, progress
from megatron_moa.training.data_order import changed_order
from megatron_moa.training.megatron_checks import megatron_checks
from megatron_moa.training.parser import parse_flags, parser_defaults


def restore_model_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Takes every setting that decides the model's function from a checkpoint's args.

    Those of the mixture are among them; a checkpoint without them is stock Megatron's.

    Args:
        args: parsed and not validated; changed in place.
        saved: validated args in this format version.

    Raises:
        UserError: a flag was given, and the checkpoint has another value.
    """
    _restore_megatrons(args, saved)
    defaults = mixture_defaults()
    stock = {**defaults, "moa_mixing": "none"}
    for name, given, stored in differing(MODEL_FLAGS, args, saved, unset=stock, exactly=True):
        if given != defaults[name] or megatron_flags.is_typed(name):
            raise _contradiction(name, given, stored)
        setattr(args, name, stored)
    for name in TRAINING_FLAGS:
        if getattr(args, name) == defaults[name] and not megatron_flags.is_typed(name):
            setattr(args, name, getattr(saved, name, defaults[name]))


# Of another class, and taken from the checkpoint all the same: an export writes it as initializer_range.
_ALSO_RESTORED = ("init_method_std",)
_RESTORED = {*megatron_flags.FUNCTION, *_ALSO_RESTORED}
# What --use-mp-args-from-checkpoint-args takes from a checkpoint whatever the command line says.
_MODEL_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")


def _restore_megatrons(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    defaults = parser_defaults()
    takes_tokenizer = args.use_tokenizer_model_from_checkpoint_args
    tokenizer = [name for name in megatron_flags.TOKENIZER if name != "trust_remote_code"]
    for name in (*megatron_flags.FUNCTION, *_ALSO_RESTORED, *tokenizer):
        if not hasattr(saved, name):
            continue
        given, stored, default = getattr(args, name, None), getattr(saved, name), defaults[name]
        if name in tokenizer:
            if takes_tokenizer or given == default:
                setattr(args, name, stored if stored is not None else given)
        else:
            was_given = not megatron_flags.same(name, given, default) or megatron_flags.is_typed(name)
            if was_given and name in megatron_flags.FUNCTION and not megatron_flags.same(name, given, stored):
                raise _contradiction(name, given, stored)
            setattr(args, name, stored)
    if not (args.fp16 or args.bf16):
        args.fp32_residual_connection = False  # everything is in float32


def _contradiction(name: str, given: object, stored: object) -> UserError:
    return UserError(f"{as_typed(name, given)}: the checkpoint has {as_typed(name, stored)}; drop the flag")


def parse_arguments(
    check: Callable[[argparse.Namespace], None] | None = None, as_global: bool = True
) -> tuple[argparse.Namespace, MixtureConfig | None]:
    """Megatron's ``parse_and_validate_args`` with our flags, early checks and one-line errors.

    Args:
        check: the caller's own check of the parsed args, before Megatron's.
        as_global: whether they become Megatron's global args, which a process has once.

    Returns:
        Megatron's args and the mixture (None: stock).

    Raises:
        UserError: whatever a user can get wrong, Megatron's own assertions included.
    """
    args = parse_flags()
    # What flags say by themselves, before any file is read.
    check_checkpoint_flags(args)
    check_progress_flags(args)
    # Before anything depends on settings: with --use-checkpoint-args they are the checkpoint's.
    checkpoint, saved = _find_settings(args)
    mixture = mixture_from_args(args)
    _validate(args, mixture, check)
    # Once settings are validated, as those in a checkpoint are.
    _compare_with_saved(args, saved, checkpoint)
    _mark(args, saved)
    if as_global:  # last, since it makes folders
        make_global(args)
    return args, mixture


def _find_settings(args: argparse.Namespace) -> tuple[Checkpoint | None, argparse.Namespace | None]:
    """Returns the checkpoint to load and its settings, None for what is not there.

    With ``--use-checkpoint-args`` the settings become the run's.
    """
    checkpoint, saved = guard.find_checkpoint(args), None
    if checkpoint is not None:
        checkpoint, saved = guard.read_saved_settings(args, checkpoint)
    if args.use_checkpoint_args:
        _take_saved_settings(args, checkpoint, saved)
    return checkpoint, saved


def _validate(
    args: argparse.Namespace, mixture: MixtureConfig | None, check: Callable[[argparse.Namespace], None] | None
) -> None:
    """Checks settings against each other, ours around Megatron's, which fill in what follows from them."""
    from megatron.training.arguments import validate_args

    # Before Megatron's: what it would assert without naming a flag, or fill in otherwise.
    check_shapes(args)
    _settle(args, mixture)
    if check is not None:
        check(args)
    check_output_folders(args)
    with megatron_checks(args):
        validate_args(args)
    # After Megatron's: what it has filled in, such as sizes of splits and modules of CUDA graphs.
    if mixture is not None:
        check_graphs(args)
    check_splits(args, mixture)
    optimizer.check_validated_arguments(args)


def _compare_with_saved(
    args: argparse.Namespace, saved: argparse.Namespace | None, checkpoint: Checkpoint | None
) -> None:
    """Refuses a checkpoint that does not fit the run: its model first, then its optimizer's state.

    Random number states that do not fit are only left out.
    """
    if saved is not None:
        for change in changed_order(args, saved, checkpoint):
            guard.notice(f"WARNING: {change}")
        check_saved_settings(args, saved, checkpoint)
        optimizer.check_saved_optimizer(args, saved, checkpoint)
        optimizer.check_saved_schedule(args, saved, checkpoint)
        optimizer_resharding.check_saved_split(args, saved, checkpoint)
    random_states.check_saved(args, saved, checkpoint)


def _mark(args: argparse.Namespace, saved: argparse.Namespace | None) -> None:
    """Adds to args what is to be known of this run's checkpoints and has no flag."""
    args.moa_format_version = FORMAT_VERSION
    args.moa_experts_share_parameters = True  # optimizer_resharding reads by it how the state is laid out
    for name in ("moa_end_tokens", "moa_generation", "moa_source"):  # of the Hugging Face folder a model came from
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))


def make_global(args: argparse.Namespace) -> None:
    """Makes args Megatron's global ones, with tokenizer, timers, and writers, which make folders."""
    from megatron.training.global_vars import set_global_variables

    with progress.wandb_errors(args):
        set_global_variables(args)


def check_graphs(args: argparse.Namespace) -> None:
    """Refuses what a CUDA graph cannot record, or hides: a replay runs no Python.

    Args:
        args: validated by Megatron, which turns older flags for graphs into these.

    Raises:
        UserError: a graph covers mixtures whose coefficients ``--moa-log-interval`` asks for, or experts that read
            their numbers of tokens on the host (layers/experts.py).
    """
    if (
        args.num_experts
        and _graphs_cover(args, "moe")
        and not (args.moe_grouped_gemm and args.transformer_impl == "local")
    ):
        raise UserError(
            f"--cuda-graph-impl {args.cuda_graph_impl}: records routed experts, which read their numbers of tokens on "
            "the host; take --cuda-graph-impl local --cuda-graph-modules attn, or experts that do not: "
            "--moe-grouped-gemm --transformer-impl local"
        )
    if args.moa_log_interval and _graphs_cover_mixtures(args):
        raise UserError(
            f"--moa-log-interval {args.moa_log_interval}: a replayed graph of --cuda-graph-impl {args.cuda_graph_impl} "
            "runs no Python to see coefficients; take --moa-log-interval 0, or --cuda-graph-modules attn"
            + (" with --cuda-graph-impl local" if args.cuda_graph_impl == "full_iteration" else "")
        )


def check_splits(args: argparse.Namespace, mixture: MixtureConfig | None) -> None:
    """Refuses splits of weights or optimizer that no mixture has, or whose package is missing.

    Args:
        args: validated by Megatron, which derives the sizes.

    Raises:
        UserError: a package is missing, or a mixture's weights would be split over ranks that gather them for each
            product: Muon would take parts of fc1 for its two matrices (training/muon.py), and no test has this.
    """
    from megatron.core.tensor_parallel.gtp_api import HAVE_GTP

    for prefix, size in (("", args.gtp_weight_remat_size), ("expert_", args.expert_gtp_weight_remat_size)):
        name = f"{prefix}tensor_parallel_num_weight_shards"
        given = as_typed(name, getattr(args, name))
        if size > 1 and mixture is not None:
            raise UserError(f"{given}: not supported with a mixture; drop the flag, or take --moa-mixing none")
        if size > 1 and not HAVE_GTP:
            raise UserError(f"{given}: needs Transformer Engine 2.19 or later; install it, or drop the flag")
    if importlib.util.find_spec("einops") is None:
        for name, neutral in (
            ("use_megatron_fsdp", False),
            ("num_distributed_optimizer_instances", 1),
            ("hierarchical_context_parallel_sizes", None),
        ):
            value = getattr(args, name)
            if value != neutral:
                raise UserError(f"{as_typed(name, value)}: needs einops; pip install einops, or drop the flag")


def _graphs_cover(args: argparse.Namespace, *names: str) -> bool:
    """Whether a graph is recorded of one of these modules, or of whole layers or the whole iteration."""
    modules = {module.name for module in args.cuda_graph_modules}
    return args.cuda_graph_impl != "none" and (not modules or not modules.isdisjoint(names))


def _graphs_cover_mixtures(args: argparse.Namespace) -> bool:
    with_router = bool(args.moe_shared_expert_intermediate_size) and not args.moe_shared_expert_overlap
    return _graphs_cover(args, "mlp", "moe", *(["moe_router"] if with_router else []))


def _take_saved_settings(
    args: argparse.Namespace, checkpoint: Checkpoint | None, saved: argparse.Namespace | None
) -> None:
    """Takes the checkpoint's settings for the run, as ``--use-checkpoint-args`` asks.

    They become the run's where its flags do not contradict them.
    """
    from megatron.training.checkpointing import load_args_from_checkpoint

    folder = args.load or args.pretrained_checkpoint
    if folder is None:
        raise UserError("--use-checkpoint-args: needs a checkpoint; add --load FOLDER")
    if saved is None:
        raise UserError(f"--load {folder}: no checkpoint with settings there; give a folder --save wrote to")
    restore_model_flags(args, saved)
    defaults = parser_defaults()
    left = _RESTORED.union(_MODEL_PARALLEL if args.use_mp_args_from_checkpoint_args else ())
    given = {  # Megatron takes some of these from the checkpoint whatever the command line says
        name: value
        for name, value in vars(args).items()
        if name in defaults.keys() - left
        and (not megatron_flags.same(name, value, defaults[name]) or megatron_flags.is_typed(name))
    }
    load_args_from_checkpoint(args, "load" if checkpoint.flag == "--load" else "pretrained_checkpoint")
    vars(args).update(given, spec=given.get("spec"))  # Megatron's own script builds its layers by a --spec
    if args.tokenizer_type is None:  # where only the tokenizer's file is the run's own, because it has moved
        args.tokenizer_type = getattr(saved, "tokenizer_type", None)


def _settle(args: argparse.Namespace, mixture: MixtureConfig | None) -> None:
    """Sets what follows from the mixture and the machine.

    Checks that this machine can compute the mixture.
    """
    if args.moa_log_interval and args.fake_process_group:
        raise UserError(
            f"--moa-log-interval {args.moa_log_interval}: with --fake-process-group there are no ranks to sum over; "
            "drop one of the two"
        )
    if mixture is not None:
        # Now, not at the first step.
        check_overwrite(mixture, resolve_backend(mixture.backend, "cuda" if torch.cuda.is_available() else "cpu"))
        # The activation step is ours; Megatron would check that it could fuse the one it no longer runs.
        args.bias_gelu_fusion = args.bias_swiglu_fusion = False
        if args.ckpt_format == "fsdp_dtensor" and args.moe_grouped_gemm and args.expert_model_parallel_size > 1:
            # Megatron 0.19.2 would write each rank's coefficients under one name: it finds experts by theirs.
            raise UserError(
                "--ckpt-format fsdp_dtensor: cannot hold the coefficients of grouped experts on "
                f"{args.expert_model_parallel_size} ranks; drop --moe-grouped-gemm, or --expert-model-parallel-size"
            )
    _check_what_is_written(args)
    if not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False  # plain causal: no [s, s] mask per sample
    settle_evaluation(args)


def settle_evaluation(args: argparse.Namespace) -> None:
    """Gives a run that evaluates only at its end an interval beyond that: Megatron 0.19.2 divides by it."""
    if not args.eval_interval:
        args.eval_interval = 1 + (args.train_iters or args.train_samples or 0)


def _check_what_is_written(args: argparse.Namespace) -> None:
    """Refuses to write what Megatron reads off Transformer Engine's modules alone, where there are none."""
    from megatron.core.extensions.transformer_engine import HAVE_TE  # when megatron_moa.cpu has replaced what it must

    te_experts = args.moe_grouped_gemm and args.transformer_impl == "transformer_engine"
    if args.save_tokens_per_expert_interval and not te_experts:
        raise UserError(
            f"{as_typed('save_tokens_per_expert_interval', args.save_tokens_per_expert_interval)}: sees the tokens of "
            "Transformer Engine's grouped experts alone; add --moe-grouped-gemm --transformer-impl transformer_engine, "
            "or drop the flag"
        )
    for name in ("save_activations_interval", "save_dgrads_interval"):
        if getattr(args, name) and not HAVE_TE:  # Megatron 0.19.2 looks for its classes, and takes None for one
            raise UserError(
                f"{as_typed(name, getattr(args, name))}: needs Transformer Engine; install it, or drop the flag"
            )
