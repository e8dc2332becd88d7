"""Refuses checkpoints that are damaged or do not fit, before anything of them is loaded.

Megatron 0.19.2 by itself takes another dictionary's or gate's weights without a word, ignores tensors of a checkpoint
that the model lacks, and ends with exit code 0 when it finds an empty ``latest_checkpointed_iteration.txt``.
:mod:`megatron_moa.megatron_fixes.checkpointing` puts these checks around Megatron's loading.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_moa.checkpoints.files import (
    NO_CHECKPOINT,
    TRACKER,
    Checkpoint,
    DamagedCheckpoint,
    all_kept_aside,
    check_files,
    check_writable,
    find_damage,
    gathered,
    kept_aside,
    last_complete_before,
    mistaken_folder,
    put_back,
    read_manifest,
    read_tracker,
    saved_iterations,
    write_tracker,
)
from megatron_moa.checkpoints.names import EXTRA_STATE, keep_absent_extra_state, take_stored_names
from megatron_moa.checkpoints.settings import (
    changed_data,
    changed_tokens,
    check_saved_settings,
    check_vocabulary,
    differing,
    upgrade_saved_settings,
    vocabulary_digest,
)
from megatron_moa.checkpoints.tensors import OPTIMIZER, CheckpointTensors
from megatron_moa.command_line.megatron_flags import as_typed
from megatron_moa.errors import UserError, check_is_folder, one_line

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# Before loading.


def find_checkpoint(args: argparse.Namespace) -> Checkpoint | None:
    """Returns the checkpoint that Megatron is going to load, or None if there is none.

    With None training starts at the beginning. A folder that is named and holds none is refused, unless it is also the
    one to save to. With ``--moa-load-last-complete`` a lost or unreadable ``latest_checkpointed_iteration.txt`` is
    written anew. Whole checkpoints that were being written again are put back first where the run saves there, too.

    Raises:
        UserError: it is named wrongly, or cannot be told.
    """
    folders = (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint))
    local = [(flag, Path(folder)) for flag, folder in folders if folder is not None]
    for flag, root in local:
        check_is_folder(flag, root)
        if _saves_to(args, root):
            _put_back(flag, root)
    checkpoint = next(filter(None, (_latest(args, flag, root) for flag, root in local)), None)
    checkpoint = _newer_non_persistent(args, checkpoint) or checkpoint
    if checkpoint is None:
        if args.non_persistent_ckpt_type is None:
            _check_start(args, local)
        return None
    kept = kept_aside(checkpoint.path)
    if kept is not None:
        raise _being_written_again(checkpoint, kept)
    if not checkpoint.path.is_dir():
        there = ", ".join(map(str, saved_iterations(checkpoint.root))) or "none"
        named = f"--ckpt-step {args.ckpt_step}" if args.ckpt_step else TRACKER
        raise UserError(f"{checkpoint}, named by {named}, is not there; complete checkpoints there: {there}")
    return checkpoint


def _put_back(flag: str, root: Path) -> None:
    """Puts back all checkpoints that were being written again when their training was ended."""
    for iteration, kept in all_kept_aside(root).items():
        checkpoint = Checkpoint(flag, root, iteration)
        try:
            if put_back(checkpoint.path, kept):
                notice(f"WARNING: {checkpoint} was not written again to its end; what it was is put back")
        except OSError as error:
            raise UserError(f"{checkpoint}: cannot be put back from {kept} ({error.strerror}); move it there") from None


def _being_written_again(checkpoint: Checkpoint, kept: Path) -> UserError:
    """Why a run does not take what another one, which saves there, may be replacing now."""
    return UserError(
        f"{checkpoint} was being written again, and what it was is {kept}; wait for its training, or if that has "
        f"ended: rm -rf {checkpoint.path} && mv {kept} {checkpoint.path}"
    )


def _saves_to(args: argparse.Namespace, root: Path) -> bool:
    return args.save is not None and os.path.realpath(args.save) == os.path.realpath(root)


def _check_start(args: argparse.Namespace, folders: list[tuple[str, Path]]) -> None:
    """Raises UserError for a folder without a checkpoint.

    Megatron would train from random weights, or, with ``--exit-on-missing-checkpoint``, leave with exit code 0.
    """
    for flag, root in folders:
        mistaken = mistaken_folder(root)
        is_new = flag == "--load" and _saves_to(args, root)
        if mistaken is None and is_new and not args.exit_on_missing_checkpoint:
            continue
        drop = "--exit-on-missing-checkpoint" if is_new else flag
        raise UserError(f"{flag} {root}: {mistaken or f'{NO_CHECKPOINT}, or drop {drop} to begin without'}")


def _latest(args: argparse.Namespace, flag: str, root: Path) -> Checkpoint | None:
    """Returns what Megatron would load of a folder, None for nothing.

    Where the tracker cannot be read, :func:`_last_complete` decides, which may change it or ``args``.
    """
    try:
        latest = read_tracker(root)
    except FileNotFoundError:
        if args.ckpt_step and flag == "--load":  # Megatron then needs no tracker
            return Checkpoint(flag, root, args.ckpt_step)
        if not saved_iterations(root) and not all_kept_aside(root):
            return None
        problem = f"{TRACKER} is missing"
    except DamagedCheckpoint as error:
        problem = str(error)
    else:
        return Checkpoint(flag, root, args.ckpt_step if args.ckpt_step and latest is not None else latest)
    return _last_complete(args, flag, root, problem)


def _last_complete(args: argparse.Namespace, flag: str, root: Path, problem: str) -> Checkpoint:
    """Returns the checkpoint to take instead of one that no tracker names, and makes Megatron take it.

    Args:
        problem: what is wrong with the tracker.

    Raises:
        UserError: there is none, it may be being written now, or ``--moa-load-last-complete`` is not given.
    """
    complete, kept = saved_iterations(root), all_kept_aside(root)
    if kept and max(kept) > max(complete, default=0):
        raise _being_written_again(Checkpoint(flag, root, max(kept)), kept[max(kept)])
    if not complete:
        raise UserError(f"{flag} {root}: {problem}; write the iteration to load into it")
    last = complete[-1]
    if not args.moa_load_last_complete:
        raise UserError(
            f"{flag} {root}: {problem}; the last complete checkpoint is iteration {last}: "
            f"write {last} into that file, or add --moa-load-last-complete"
        )
    notice(f"WARNING: {flag} {root}: {problem}; going on from iteration {last}, the last complete one")
    _name_for_megatron(args, flag, root, last, problem)
    return Checkpoint(flag, root, last)


def _name_for_megatron(args: argparse.Namespace, flag: str, root: Path, iteration: int, problem: str) -> None:
    """Writes the tracker anew, or sets ``args.ckpt_step`` where it cannot be written and that is enough."""
    try:
        write_tracker(root, iteration)  # by every rank, each the same: they cannot talk to each other yet
    except OSError as error:
        # Megatron finds an iteration that it is told without a tracker, but not beside one that it cannot read.
        if flag != "--load" or args.pretrained_checkpoint is not None or (root / TRACKER).exists():
            raise UserError(
                f"{flag} {root}: {problem}, and it cannot be written there ({error.strerror}); load a copy of that "
                "folder that can be written to"
            ) from None
        args.ckpt_step = iteration


def _newer_non_persistent(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The non-persistent checkpoint that Megatron loads instead of this one; None where it loads none.

    Those of ``--non-persistent-ckpt-type local`` are not looked for: each rank keeps a part of one.
    """
    if args.non_persistent_ckpt_type != "global":
        return None
    load = checkpoint.root if checkpoint is not None else args.load
    folder = args.non_persistent_global_ckpt_dir or (Path(load, "non_persistent") if load is not None else None)
    if folder is None:
        return None
    check_is_folder("--non-persistent-global-ckpt-dir", Path(folder))
    try:
        iteration = read_tracker(Path(folder))
    except FileNotFoundError:
        return None
    except DamagedCheckpoint as error:
        raise UserError(f"--non-persistent-ckpt-type global: {folder}: {error}; delete that folder") from None
    if iteration is None or (checkpoint is not None and iteration < (checkpoint.iteration or 0)):
        return None
    return Checkpoint(checkpoint.flag if checkpoint is not None else "--load", Path(folder), iteration)


def read_saved_settings(
    args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[Checkpoint, argparse.Namespace | None]:
    """The args a checkpoint was saved with (None where it holds none), and the checkpoint: with
    ``--moa-load-last-complete`` an earlier one, if this one cannot be read.

    Every rank reads them by itself, so that all come to the same end without a collective.

    Raises:
        UserError: it cannot be read, or is of another format version.
    """
    while True:
        try:
            saved = _saved_args(args, checkpoint)
            break
        except DamagedCheckpoint as error:
            checkpoint = _earlier(args, checkpoint, str(error))
    if saved is not None:
        upgrade_saved_settings(saved, checkpoint)
    elif args.moa_mixing != "none":
        raise UserError(
            f"{checkpoint}: holds no settings to compare; a mixture is loaded from its own checkpoints only"
        )
    else:
        notice(f"WARNING: {checkpoint}: holds no settings, they are not compared")
    return checkpoint, saved


def _saved_args(args: argparse.Namespace, checkpoint: Checkpoint) -> argparse.Namespace | None:
    """Reads the small part of a checkpoint in which Megatron keeps the args.

    Raises:
        DamagedCheckpoint: it is not there or not readable.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing

    path = checkpoint.path
    manifest = read_manifest(path)
    if manifest is not None:
        small = [name for name in (".metadata", "metadata.json") if name in manifest]
        check_files(path, manifest, small, checksums=True)
    try:
        kind = checkpointing._get_checkpoint_format(str(path), args)
        if kind == "torch_dist":
            return dist_checkpointing.load_common_state_dict(str(path)).get("args")
        if kind == "torch":
            file = checkpointing.find_checkpoint_rank_0(
                str(checkpoint.root), checkpoint.iteration or 0, checkpoint.iteration is None
            )
            return torch.load(file, map_location="cpu", mmap=True).get("args")
        state = {"args": None}
        torch.distributed.checkpoint.load(state, checkpoint_id=str(path), no_dist=True)
        return state["args"]
    except NotImplementedError:
        raise DamagedCheckpoint("was not written to its end") from None
    # Damaged pickles and archives raise whatever they like; torch's CheckpointException is no Exception.
    except (Exception, torch.distributed.checkpoint.CheckpointException) as error:
        if manifest is not None:
            check_files(path, manifest, manifest, checksums=False)  # a better reason, where there is one
        raise DamagedCheckpoint(
            f"its settings cannot be read ({one_line(first_failure(error), typed=True)})"
        ) from error


def first_failure(error: BaseException) -> BaseException:
    """Returns the first error of those that torch collects from the ranks; any other error as it is."""
    if isinstance(error, torch.distributed.checkpoint.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


class EarlierIsComplete(UserError):
    """A damaged checkpoint with a complete one before it; a tool has another flag for that than training.

    Attributes:
        problem: with the complete one's iteration.
        iteration: of the complete one.
    """

    def __init__(self, problem: str, iteration: int) -> None:
        self.problem = f"{problem}; the last complete one before it is iteration {iteration}"
        self.iteration = iteration
        super().__init__(f"{self.problem}: add --ckpt-step {iteration}, or --moa-load-last-complete")


def _earlier(args: argparse.Namespace, checkpoint: Checkpoint, problem: str) -> Checkpoint:
    """The checkpoint to go on from instead of a damaged one.

    Raises:
        UserError: there is none, or --moa-load-last-complete is not given.
    """
    if checkpoint.root not in [Path(folder) for folder in (args.load, args.pretrained_checkpoint) if folder]:
        raise UserError(
            f"{checkpoint} is damaged: {problem}; it is a non-persistent one, delete {checkpoint.root} to go on from "
            "the last that is persistent"
        )
    earlier = last_complete_before(checkpoint)
    if earlier is None:
        raise UserError(
            f"{checkpoint} is damaged: {problem}; there is no complete one before it: give another "
            f"{checkpoint.flag}, or delete {checkpoint.path} and {TRACKER} beside it to begin anew"
        )
    if not args.moa_load_last_complete:
        raise EarlierIsComplete(f"{checkpoint} is damaged: {problem}", earlier.iteration)
    notice(f"WARNING: {checkpoint} is damaged: {problem}; going on from iteration {earlier.iteration}")
    args.ckpt_step = earlier.iteration
    return earlier


def check_before_setup(
    args: argparse.Namespace, tokenizer: Any, trains: bool = True
) -> tuple[Checkpoint | None, argparse.Namespace | None]:
    """Checks the folders to load from and save to before a model is built; collective.

    Call it when the ranks can talk. The checkpoint is looked for anew, as Megatron does after this: since the command
    line was checked another may have been saved there, or be taken now in the place of a damaged one.

    Args:
        args: the run's; gets a fingerprint of the tokenizer, which checkpoints carry.
        tokenizer: Megatron's.
        trains: whether the run goes on training from the checkpoint, on data that may have changed.

    Returns:
        The checkpoint that is going to be loaded and the args it was saved with; None for what is not there.

    Raises:
        UserError: on every rank.
    """
    saved = None
    args.moa_vocabulary = vocabulary_digest(tokenizer)
    checkpoint = find_checkpoint(args)
    while checkpoint is not None:
        damage = find_damage(checkpoint.path, checksums=not args.moa_no_verify_checkpoint)
        if damage is None:
            break
        checkpoint = _earlier(args, checkpoint, damage)
    if checkpoint is not None:
        if read_manifest(checkpoint.path) is None:
            notice(f"WARNING: {checkpoint} has no manifest, as one saved by another program: its files are not checked")
        checkpoint, saved = read_saved_settings(args, checkpoint)
        if saved is not None:
            check_saved_settings(args, saved, checkpoint)
            check_vocabulary(args, saved, tokenizer.vocab_size, checkpoint)
            other_tokens = list(changed_tokens(args, saved, checkpoint))
            if other_tokens:
                args.moa_end_tokens = args.moa_generation = None  # numbers of the vocabulary before
            for change in (*other_tokens, *(changed_data(args, saved, checkpoint) if trains else ())):
                notice(f"WARNING: {change}")
    if args.save is not None:
        check_writable(Path(args.save))
    return checkpoint, saved


def notice(text: str) -> None:
    """Prints a line on the first rank."""
    from megatron.training.utils import print_rank_0

    print_rank_0(text)


# While loading.

SAME_SETTINGS = "load it with the settings it was saved with"


_Shapes = dict[str, tuple[int, ...] | None]  # of tensors by their names; None: any will do


def match_tensors(sharded_state_dict: dict, folder: str, flag: str = "--load") -> None:
    """Matches what a model asks for with what a checkpoint has, before it is loaded.

    Collective, since ranks ask for different tensors. Changes ``sharded_state_dict`` in place: names that differ
    between Transformer Engine's layers and local ones are made the checkpoint's, and what Transformer Engine keeps
    beside parameters stays as it is where the checkpoint lacks it (megatron_moa.checkpoints.names).

    Args:
        folder: of the one checkpoint.
        flag: that named the folder above it, for messages.

    Raises:
        UserError: the checkpoint lacks a tensor that is asked for, has it in another shape, or has one that is not an
            optimizer's and that nobody asks for. Megatron by itself ignores surplus tensors, missing ones too under
            some values of ``--dist-ckpt-strictness``, and answers another shape with a traceback.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    stored = {key: tuple(entry.size) for key, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    take_stored_names(sharded_state_dict, set(stored))
    keep_absent_extra_state(sharded_state_dict, metadata)
    where = f"{flag} {folder}"
    model, optimizer = _by_owner(_asked_for(sharded_state_dict))
    stored_model, stored_optimizer = _by_owner(stored)
    # The model comes first: another one has another optimizer's state.
    _refuse(where, *_mismatches(model, stored_model), SAME_SETTINGS)
    lacking, surplus, reshaped = _mismatches(optimizer, stored_optimizer)
    buckets = {key for key in lacking | surplus | reshaped if _BUCKET in key}
    if buckets and all(any(_BUCKET in key for key in shapes) for shapes in (optimizer, stored_optimizer)):
        raise UserError(_other_buckets(where, min(buckets), folder))
    _refuse(where, lacking, set(), reshaped, f"{SAME_SETTINGS}, or with --no-load-optim")


def _asked_for(sharded_state_dict: dict) -> _Shapes:
    """Returns the shapes of the tensors that the ranks ask for, all ranks together; collective."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    wanted, _, _ = load_preprocess(sharded_state_dict)
    own = {
        value.key: None if value.allow_shape_mismatch else tuple(value.global_shape)
        for value in nested_values(wanted)
        if isinstance(value, ShardedTensor)
    }
    return {key: shape for part in gathered(own) for key, shape in part.items()}


def _by_owner(shapes: _Shapes) -> tuple[_Shapes, _Shapes]:
    """Returns the model's tensors and the optimizer's, without Transformer Engine's extra states."""
    model, optimizer = {}, {}
    for key, shape in shapes.items():
        if not key.endswith(EXTRA_STATE):
            (optimizer if key.startswith(OPTIMIZER) else model)[key] = shape
    return model, optimizer


def _mismatches(asked: _Shapes, stored: _Shapes) -> tuple[set[str], set[str], set[str]]:
    """Returns names of tensors: those a checkpoint lacks, has beyond the model's, has in another shape."""
    reshaped = {key for key in asked.keys() & stored.keys() if asked[key] not in (None, stored[key])}
    return asked.keys() - stored.keys(), stored.keys() - asked.keys(), reshaped


def _refuse(where: str, lacking: set[str], surplus: set[str], reshaped: set[str], remedy: str) -> None:
    """Raises UserError if any tensor is named."""
    for keys, what in (
        (lacking, "lacks {} that this run has"),
        (surplus, "has {} that this run lacks"),
        (reshaped, "has {} in other shapes than this run"),
    ):
        if keys:
            named = f"{len(keys)} tensors ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
            raise UserError(f"{where}: the checkpoint {what.format(named)}; {remedy}")


_BUCKET = "optimizer.distributed."  # in the names of a distributed optimizer's buckets, which are saved as they lie
# Settings that decide what lies in which bucket.
_OF_BUCKETS = tuple(
    """
    overlap_grad_reduce ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw nccl_ub bf16 fp16
    accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 main_grads_dtype num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank pipeline_model_parallel_layout overlap_param_gather_with_optimizer_step
    """.split()
)


def _other_buckets(where: str, example: str, folder: str) -> str:
    """What is wrong with an optimizer's buckets that are not those of the run, and why."""
    from megatron.training import get_args

    args, saved = get_args(), CheckpointTensors(Path(folder)).args
    changed = [
        f"{as_typed(name, there)} there, {as_typed(name, here)} here"
        for name, here, there in differing(_OF_BUCKETS, args, saved, exactly=True)
    ]
    sizes = [getattr(some, "data_parallel_size", None) for some in (saved, args)]
    if None not in sizes and sizes[0] != sizes[1]:
        changed.append(f"a data-parallel size of {sizes[0]} there, {sizes[1]} here")
    return (
        f"{where}: has the optimizer's state in other buckets than this run ({', '.join(changed) or example}); go on "
        "under the settings it was saved with, or with --no-load-optim; saved with "
        "--dist-ckpt-optim-fully-reshardable, an optimizer's state loads under any"
    )


def changed_scales(config: TransformerConfig, checkpoint: CheckpointTensors) -> str:
    """Returns what becomes of fp8 scales that a checkpoint or a model alone has.

    The text is empty if both have them, or neither.
    """
    scaled = bool(config.fp8) and config.fp8_recipe == "delayed"
    if checkpoint.has_fp8_scales == scaled:
        return ""
    if scaled:
        return "has no fp8 scales; those of --fp8-recipe delayed start anew"
    return "its fp8 scales are dropped, since this model is not of --fp8-format with --fp8-recipe delayed"
