"""Records what a training computed, exactly and by global name, and compares two such records.

The two trainings may have been split in different ways.

    torchrun --nproc-per-node 2 -m megatron_moa.research.compare_runs --to FOLDER pretrain_gpt_moa.py ARGS...

runs any script that trains through Megatron's ``pretrain`` and leaves in FOLDER, one file a rank: loss and gradient
norm of every step at full precision, the gradients of the first step as the optimizer gets them (summed over all ranks,
not clipped), and all parameters at the start and at the end. ``--start-from`` another such folder starts from that
run's first parameters instead of drawing them: other splits draw others. ``tools/compare_parallel.py`` compares two.
"""

from __future__ import annotations

import argparse
import functools
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moa import startup
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.megatron_fixes.patching import RECORDING, patch


@dataclass(frozen=True)
class TensorPiece:
    """What one rank holds of a global tensor.

    Attributes:
        key: the parameter's name in a checkpoint, with the layer's (and the expert's) index where layers are stacked.
        shape: of the whole tensor.
        offset: of this piece in it.
        data: this piece's values.
        rank: that holds it.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor
    rank: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The same part of a whole tensor."""
        return whole[
            tuple(slice(start, start + size) for start, size in zip(self.offset, self.data.shape, strict=True))
        ]


@dataclass(frozen=True)
class RecordedStep:
    """One training step. ``losses`` is empty on ranks that are not on the last pipeline stage."""

    iteration: int
    losses: dict[str, float]
    grad_norm: float


@dataclass
class Record:
    """What one run left: the pieces of all ranks, and the steps as the last pipeline stage saw them."""

    start: list[TensorPiece] = field(default_factory=list)
    gradients: list[TensorPiece] = field(default_factory=list)
    end: list[TensorPiece] = field(default_factory=list)
    steps: list[RecordedStep] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads all ranks' files.

        Raises:
            UserError: there is no record, or some rank's is missing.
        """
        files = sorted(folder.glob("rank*.pt"))
        ranks = [torch.load(file, weights_only=True) for file in files]
        if not ranks or len(ranks) != ranks[0]["world_size"]:
            raise UserError(f"{folder}: {len(ranks)} ranks' records there; a finished run leaves one of every rank")
        record = cls()
        for rank, saved in enumerate(ranks):
            for name in ("start", "gradients", "end"):
                getattr(record, name).extend(TensorPiece(*piece, rank=rank) for piece in saved[name])
            steps = [RecordedStep(*step) for step in saved["steps"]]
            if any(step.losses for step in steps):
                record.steps = steps
        return record


def assemble(pieces: list[TensorPiece]) -> dict[str, Tensor]:
    """Whole tensors by name, from the first copy of every part."""
    whole: dict[str, Tensor] = {}
    for piece in reversed(pieces):
        if piece.key not in whole:
            whole[piece.key] = torch.full(piece.shape, torch.nan, dtype=piece.data.dtype)
        piece.of(whole[piece.key]).copy_(piece.data)
    return whole


@dataclass(frozen=True)
class RunComparison:
    """How far record b is from record a.

    Attributes:
        losses: by iteration: the loss in a, the loss in b, and their difference relative to a's.
        gradients: by parameter: a's largest entry, and the largest difference of any rank's part relative to it.
        missing: parameters that only one of the two has.
        replicated: how many tensors of b lie on more than one rank.
        differing: names of those whose copies are not bit-equal at the end.
    """

    losses: dict[int, tuple[float, float, float]]
    gradients: dict[str, tuple[float, float]]
    missing: list[str]
    replicated: int
    differing: list[str]

    @classmethod
    def of(cls, a: Record, b: Record, steps: int | None = None) -> RunComparison:
        """Compares two runs of the same model and data; losses over the first ``steps`` (None: all)."""
        expected = {step.iteration: step.losses["lm loss"] for step in a.steps}
        losses = {}
        for step in b.steps[:steps]:
            loss, reference = step.losses["lm loss"], expected[step.iteration]
            losses[step.iteration] = (reference, loss, abs(loss - reference) / abs(reference))
        whole = assemble(a.gradients)
        gradients: dict[str, tuple[float, float]] = {}
        for piece in b.gradients:
            if piece.key in whole:
                largest = whole[piece.key].abs().max().item()
                difference = (piece.data - piece.of(whole[piece.key])).abs().max().item()
                # An expert without tokens has no gradient at all, and none is what it must have in b.
                relative = difference / largest if largest else (0.0 if difference == 0 else float("inf"))
                gradients[piece.key] = (largest, max(relative, gradients.get(piece.key, (0, 0.0))[1]))
        copies_of = group_copies(b.end)
        return cls(
            losses=losses,
            gradients=gradients,
            missing=sorted(set(whole) ^ {piece.key for piece in b.gradients}),
            replicated=len(copies_of),
            differing=[key for key, first, *others in copies_of if any(not torch.equal(first, o) for o in others)],
        )

    def within(self, tolerance: float) -> bool:
        """Whether losses and gradients agree to a relative tolerance, and all copies are equal."""
        differences = [d for *_, d in self.losses.values()] + [d for _, d in self.gradients.values()]
        return all(d <= tolerance for d in differences) and not self.missing and not self.differing


def group_copies(pieces: list[TensorPiece]) -> list[tuple[str, *tuple[Tensor, ...]]]:
    """The name and the values of every part of a parameter that several ranks hold."""
    parts: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}
    for piece in pieces:
        parts.setdefault((piece.key, piece.offset), []).append(piece.data)
    return [(key, *values) for (key, _), values in parts.items() if len(values) > 1]


class Recorder:
    """Hooks itself into Megatron's training loop and writes this rank's part of the record.

    Args:
        folder: where to; made if missing.
        start: whole tensors by name to start from; None: as the run itself starts.
    """

    def __init__(self, folder: Path, start: dict[str, Tensor] | None = None) -> None:
        self.folder = folder
        self.start = start
        self.record = Record()

    def install(self) -> None:
        """Wraps the functions of Megatron's training loop that build the model, take a step, and train."""
        for change in _PATCHES:
            change.install(self)

    def after_setup(self, setup: Callable) -> Callable:
        """Wraps Megatron's ``setup_model_and_optimizer``: keeps the parameters at the start."""

        @functools.wraps(setup)
        def call(*args: Any, **kwargs: Any) -> Any:
            models, optimizer, scheduler = setup(*args, **kwargs)
            self.models, self.optimizer = models, optimizer
            if self.start is not None:
                self._start_from(self.start)
            self.record.start = copies(pieces_of(models))
            self._take_gradients_once()
            return models, optimizer, scheduler

        return call

    @torch.no_grad()
    def _start_from(self, start: dict[str, Tensor]) -> None:
        for piece in pieces_of(self.models):
            if piece.key not in start:
                raise UserError(f"--start-from: {piece.key} is not in that record; take one of the same model")
            if tuple(start[piece.key].shape) != piece.shape:
                raise UserError(
                    f"--start-from: {piece.key} is {tuple(start[piece.key].shape)} there, {piece.shape} here "
                    "(the padded vocabulary depends on the split: see --make-vocab-size-divisible-by)"
                )
            piece.data.copy_(piece.of(start[piece.key]))
        self.optimizer.reload_model_params()

    def _take_gradients_once(self) -> None:
        step = self.optimizer.step

        def first_step() -> Any:
            self.optimizer.step = step
            gather_sharded_gradients(self.models)
            self.record.gradients = copies(pieces_of(self.models, lambda parameter: parameter.main_grad))
            return step()

        self.optimizer.step = first_step

    def each_step(self, train_step: Callable) -> Callable:
        """Wraps Megatron's ``train_step``: keeps losses and gradient norms."""

        @functools.wraps(train_step)
        def call(*args: Any, **kwargs: Any) -> Any:
            from megatron.training import get_args

            result = train_step(*args, **kwargs)
            losses = {name: float(value) for name, value in result[0].items()}
            self.record.steps.append(RecordedStep(get_args().curr_iteration + 1, losses, float(result[5] or 0.0)))
            return result

        return call

    def around_training(self, train: Callable) -> Callable:
        """Wraps Megatron's ``train``: keeps the parameters at the end, and writes the record."""

        @functools.wraps(train)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            finally:  # it may end by sys.exit, with --exit-interval for one
                self.record.end = copies(pieces_of(self.models))
                self._write()

        return call

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        saved: dict[str, Any] = {"world_size": torch.distributed.get_world_size()}
        for name in ("start", "gradients", "end"):
            saved[name] = [(p.key, p.shape, p.offset, p.data) for p in getattr(self.record, name)]
        saved["steps"] = [(step.iteration, step.losses, step.grad_norm) for step in self.record.steps]
        torch.save(saved, self.folder / f"rank{torch.distributed.get_rank():05d}.pt")


_PATCHES = tuple(
    patch(
        f"megatron.training.training.{name}",
        wrapper,
        why="parameters, gradients and losses are recorded there",
        version="0.19.2",
        remove_when="pretrain() takes callbacks",
        where=RECORDING,
    )
    for name, wrapper in (
        ("setup_model_and_optimizer", lambda setup, recorder: recorder.after_setup(setup)),
        ("train_step", lambda train_step, recorder: recorder.each_step(train_step)),
        ("train", lambda train, recorder: recorder.around_training(train)),
    )
)


def pieces_of(
    models: list[torch.nn.Module], values: Callable[[torch.nn.Parameter], Tensor] | None = None
) -> Iterator[TensorPiece]:
    """This rank's parameters as pieces of the global ones, as Megatron's checkpoints place them.

    Args:
        models: the pipeline stages' model chunks on this rank, wrapped or not.
        values: what to take of each trained parameter; None: the parameters themselves, frozen ones too.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
    from megatron.core.utils import unwrap_model

    for model in unwrap_model(models):
        parameters = {id(parameter): parameter for parameter in model.parameters()}
        sharded = list(nested_values(extract_sharded_tensors_and_factories(model.sharded_state_dict())[0]))
        placed = {id(tensor.data) for tensor in sharded}
        for name, parameter in model.named_parameters():
            # The last stage's copy of a tied embedding is saved by the first.
            if id(parameter) not in placed and not getattr(parameter, "shared", False):
                raise RuntimeError(f"{name} is in no checkpoint: the model's sharded_state_dict lacks it")
        taken = {}
        for index, tensor in enumerate(sharded):
            parameter = parameters.get(id(tensor.data))
            if parameter is None or (values is not None and not parameter.requires_grad):
                continue
            data = parameter.detach() if values is None else values(parameter)
            taken[index] = make_sharded_optimizer_tensor(tensor, data, prefix="")
        apply_factories(taken)
        for tensor in nested_values(taken):
            assert isinstance(tensor, ShardedTensor)
            stacked = tensor.prepend_axis_num
            where = ".".join(map(str, tensor.global_offset[:stacked]))
            key = tensor.key.removeprefix(".") + (f"[{where}]" if stacked else "")
            yield TensorPiece(
                key, tuple(tensor.global_shape[stacked:]), tuple(tensor.global_offset[stacked:]), tensor.data
            )


def copies(pieces: Iterator[TensorPiece]) -> list[TensorPiece]:
    """The pieces with their values copied, on the CPU."""
    return [TensorPiece(p.key, p.shape, p.offset, p.data.detach().cpu().clone()) for p in pieces]


def gather_sharded_gradients(models: list[torch.nn.Module]) -> None:
    """Fetches the sums of the other ranks' shards into the gradient buffers.

    With the distributed optimizer each rank has the sum of its own shard only. Nobody else reads the buffers any more
    in this step.
    """
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for model in models:
        if not model.ddp_config.use_distributed_optimizer:
            continue
        for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = shard_buffer(bucket.grad_data, ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def run(script: str, arguments: list[str], to: Path, start_from: Path | None = None) -> None:
    """Runs a training script in this process, recorded.

    Raises:
        UserError: ``start_from`` holds no record.
    """
    startup.prepare()
    Recorder(to, None if start_from is None else assemble(Record.read(start_from).start)).install()
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """``python -m megatron_moa.research.compare_runs --to FOLDER SCRIPT ARGS...``"""
    program = "python -m megatron_moa.research.compare_runs"
    parser = OneLineParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the record goes")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="a record whose first parameters to start from"
    )
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    with one_line_errors(program):
        run(options.script, options.arguments, options.to, options.start_from)


if __name__ == "__main__":
    main()
