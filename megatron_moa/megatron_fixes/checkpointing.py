"""Puts checks around Megatron's saving and loading of checkpoints.

Nothing is loaded that is damaged or does not fit, and nothing is lost when a save fails. Megatron 0.19.2 falls back to
a partial load where a strict one fails (``load_model_state_dict``), leaves an empty
``latest_checkpointed_iteration.txt`` when it dies while writing that, and deletes the previous checkpoint
(``--save-retain-interval``) without a look at the new one. :func:`install` mends that.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_moa.checkpoints.files import (
    TRACKER,
    DamagedCheckpoint,
    delete_superseded,
    iteration_folder,
    kept_aside,
    make_way,
    raise_together,
    saved_iterations,
    settle,
    write_manifest,
    write_tracker,
)
from megatron_moa.checkpoints.guard import (
    SAME_SETTINGS,
    changed_scales,
    check_before_setup,
    first_failure,
    match_tensors,
    notice,
)
from megatron_moa.checkpoints.names import EXTRA_STATE
from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError, one_line
from megatron_moa.megatron_fixes.patching import patch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def install(args: argparse.Namespace) -> None:
    """Puts this module's checks around Megatron's training loop.

    To be called before ``pretrain``, after Megatron's own checks of ``args``.
    """
    _SETUP.install()
    if args.save is None:
        return
    saver = Saver(Path(args.save), args.moa_keep_last, args.save_retain_interval)
    if args.save_retain_interval is not None:
        saver.keep_last = args.moa_keep_last or 1  # what that flag means to Megatron
        args.save_retain_interval = None  # Megatron would delete the previous checkpoint itself
    if args.ckpt_step and args.load is not None and Path(args.load).resolve() == saver.root.resolve():
        saver.pinned = args.ckpt_step
    for change in _SAVING:
        change.install(saver)


# Loading.


@contextmanager
def strict_loading(models: list[torch.nn.Module], flag: str = "--load") -> Iterator[None]:
    """Makes Megatron load all of a checkpoint into these models; collective.

    Inside, a load leaves none of the models' parameters as it was.

    Args:
        flag: that named the folder, for messages.

    Raises:
        UserError: on every rank.
    """
    from megatron.core.utils import unwrap_model

    problems: list[str] = []

    def note(module: torch.nn.Module, keys: Any) -> None:
        # Megatron answers a strict load that fails with one that is not strict.
        for what, names in (("lacks", keys.missing_keys), ("has a surplus", keys.unexpected_keys)):
            problems.extend(f"{what} {name}" for name in names if not name.endswith(EXTRA_STATE))

    hooks = [model.register_load_state_dict_post_hook(note) for model in unwrap_model(models)]
    try:
        with _LOAD.installed(unwrap_model(models)[0].config, flag):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    raise_together(f"{flag}: the checkpoint {problems[0]}; {SAME_SETTINGS}" if problems else None)


def _matching_tensors(load: Callable, config: TransformerConfig, flag: str) -> Callable:
    @functools.wraps(load)
    def call(sharded_state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        match_tensors(sharded_state_dict, checkpoint_dir, flag)
        if change := changed_scales(config, CheckpointTensors(Path(checkpoint_dir))):
            notice(f"WARNING: {flag} {checkpoint_dir}: {change}")
        return load(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return call


# Saving.


@dataclass
class Saver:
    """Completes Megatron's saves.

    Attributes:
        root: ``--save``.
        keep_last: how many checkpoints to keep; None for all.
        keep_every: keeps iterations divisible by it.
        pinned: an iteration to keep in any case.
    """

    root: Path
    keep_last: int | None = None
    keep_every: int | None = None
    pinned: int | None = None
    saving: int | None = field(default=None, init=False)  # the iteration, inside Megatron's save_checkpoint
    unfinished: set[int] = field(default_factory=set, init=False)  # saves that go on in the background, too

    def save(self, save_checkpoint: Callable) -> Callable:
        """Wraps Megatron's ``save_checkpoint``; what it leaves to be written later ends in :meth:`schedule`."""

        @functools.wraps(save_checkpoint)
        def call(iteration: int, *args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            if not self.is_root(get_args().save):
                return save_checkpoint(iteration, *args, **kwargs)
            with self.clear_errors(iteration):
                if kwargs.get("non_persistent_ckpt") or kwargs.get("release"):
                    return save_checkpoint(iteration, *args, **kwargs)
                self.begin(iteration)
                self.saving = iteration
                self.unfinished.add(iteration)
                try:
                    result = save_checkpoint(iteration, *args, **kwargs)
                finally:
                    self.saving = None
                if not get_args().async_save:
                    self.complete(iteration)
                return result

        return call

    def schedule(self, schedule_async_save: Callable) -> Callable:
        """Wraps Megatron's ``schedule_async_save``, so that :meth:`complete` ends the save.

        That is the last thing done for a save in the background, by all ranks.
        """

        @functools.wraps(schedule_async_save)
        def call(request: Any) -> Any:
            if self.saving is not None:
                request.add_finalize_fn(functools.partial(self.complete, self.saving))
            return schedule_async_save(request)

        return call

    def finalize(self, maybe_finalize_async_save: Callable) -> Callable:
        """Wraps Megatron's ``maybe_finalize_async_save``, where the errors of saves in the background come up."""

        @functools.wraps(maybe_finalize_async_save)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.clear_errors():
                return maybe_finalize_async_save(*args, **kwargs)

        return call

    def tracker_name(self, get_checkpoint_tracker_filename: Callable) -> Callable:
        """Wraps Megatron's ``get_checkpoint_tracker_filename``, to keep the tracker during a save.

        During a save Megatron is given a file beside the tracker, because Megatron empties the file before it writes
        into it. When the save is complete, :meth:`complete` writes the tracker and deletes that file.
        """

        @functools.wraps(get_checkpoint_tracker_filename)
        def call(checkpoints_path: str) -> str:
            name = get_checkpoint_tracker_filename(checkpoints_path)
            return name + ".next" if self.unfinished and self.is_root(checkpoints_path) else name

        return call

    def is_root(self, folder: str | Path) -> bool:
        """Whether a folder is the one whose saves are completed here.

        Megatron writes to others, too: non-persistent checkpoints, and with ``--ckpt-convert-format`` what it converts.
        """
        return Path(folder) == self.root

    def begin(self, iteration: int) -> None:
        """Clears the checkpoint's folder; collective."""
        problem = None
        try:
            if torch.distributed.get_rank() == 0:
                make_way(iteration_folder(self.root, iteration))
        except OSError as error:
            problem = f"--save {self.root}: cannot clear {iteration_folder(self.root, iteration)} ({error})"
        raise_together(problem)

    def complete(self, iteration: int) -> None:
        """Manifest, tracker, then the deletion of old checkpoints; collective."""
        folder = iteration_folder(self.root, iteration)
        size = write_manifest(folder)
        problem = None
        if torch.distributed.get_rank() == 0:
            try:
                write_tracker(self.root, iteration)
                (self.root / (TRACKER + ".next")).unlink(missing_ok=True)
                settle(folder)
                if self.keep_last is not None:
                    deleted = delete_superseded(self.root, iteration, self.keep_last, self.keep_every, self.pinned)
                    if deleted:
                        notice(
                            f"> deleting the checkpoints of iterations {', '.join(map(str, deleted))} in {self.root}"
                        )
                free = shutil.disk_usage(self.root).free
                if free < size:
                    notice(
                        f"WARNING: --save {self.root}: {_megabytes(free)} free, and the last checkpoint took "
                        f"{_megabytes(size)}: the next one may not fit"
                    )
            except (OSError, DamagedCheckpoint) as error:
                problem = f"--save {self.root}: iteration {iteration} could not be completed ({error})"
        raise_together(problem)
        self.unfinished.discard(iteration)

    @contextmanager
    def clear_errors(self, iteration: int | None = None) -> Iterator[None]:
        """Turns the failure of a save into a UserError.

        Megatron raises on all ranks when one of them cannot write its part, and on the first rank alone where only that
        writes.
        """
        try:
            yield
        except (torch.distributed.checkpoint.CheckpointException, OSError) as error:
            alone = isinstance(error, OSError)
            if alone and torch.distributed.get_rank() != 0:
                raise  # only the first rank's errors are printed in one line
            complete = saved_iterations(self.root)
            before = "there is none before it"
            if iteration is not None and kept_aside(iteration_folder(self.root, iteration)):
                before = "what was there before is kept, and put back as the next run with --load there starts"
            elif complete:
                before = f"the last complete one, iteration {complete[-1]}, is untouched"
            free = _megabytes(shutil.disk_usage(self.root).free)
            problem = one_line(first_failure(error), typed=True)
            raise UserError(
                f"--save {self.root}: the checkpoint {f'of iteration {iteration} ' if iteration else ''}could not be "
                f"written ({free} free on that disk; {problem}); {before}: make room, start again"
            ) from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _checking_folders(setup_model_and_optimizer: Callable) -> Callable:
    @functools.wraps(setup_model_and_optimizer)
    def call(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, get_tokenizer

        checkpoint, _ = check_before_setup(get_args(), get_tokenizer())
        with _LOAD_CHECKPOINT.installed(checkpoint.flag if checkpoint is not None else "--load"):
            return setup_model_and_optimizer(*args, **kwargs)

    return call


def _loading_strictly(load_checkpoint: Callable, flag: str) -> Callable:
    @functools.wraps(load_checkpoint)
    def call(models: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        with strict_loading(models, flag):
            return load_checkpoint(models, *args, **kwargs)

    return call


_SETUP = patch(
    "megatron.training.training.setup_model_and_optimizer",
    _checking_folders,
    why="it builds everything before it looks at the folders to load from and save to",
    version="0.19.2",
    remove_when="Megatron checks both folders, files and settings, before it builds a model",
)
_LOAD_CHECKPOINT = patch(
    "megatron.training.training.load_checkpoint",
    _loading_strictly,
    why="where a strict load fails it takes what fits, and leaves the rest as it started; made while a model is set up",
    version="0.19.2",
    remove_when="a strict load that fails ends the run",
)
_LOAD = patch(
    "megatron.core.dist_checkpointing.load",
    _matching_tensors,
    why="it ignores tensors that the model lacks, and knows a norm by one of its two names; made while a model loads",
    version="0.19.2",
    remove_when="--dist-ckpt-strictness can refuse surplus tensors, and both specs give norms one name",
)
_SAVING = (
    patch(
        "megatron.training.training.save_checkpoint",
        lambda save_checkpoint, saver: saver.save(save_checkpoint),
        why="it writes no manifest, and deletes the previous checkpoint without a look at the new one",
        version="0.19.2",
        remove_when="Megatron completes a checkpoint before it names or deletes any",
    ),
    patch(
        "megatron.training.training.maybe_finalize_async_save",
        lambda maybe_finalize_async_save, saver: saver.finalize(maybe_finalize_async_save),
        why="a save in the background that fails is a traceback without the folder",
        version="0.19.2",
        remove_when="Megatron names the folder and the checkpoint before it",
    ),
    patch(
        "megatron.training.checkpointing.schedule_async_save",
        lambda schedule_async_save, saver: saver.schedule(schedule_async_save),
        why="nothing of ours would run at the end of a save in the background",
        version="0.19.2",
        remove_when="Megatron calls a script's function at the end of a save",
    ),
    patch(
        "megatron.training.checkpointing.get_checkpoint_tracker_filename",
        lambda get_checkpoint_tracker_filename, saver: saver.tracker_name(get_checkpoint_tracker_filename),
        why="the file that it names is emptied before it is written: a crash in between leaves it empty",
        version="0.19.2",
        remove_when="Megatron replaces the tracker file in one step",
    ),
)
