"""Reads torch_dist checkpoints tensor by tensor, without Megatron or a model.

The files are not trusted. A checkpoint's ``.metadata`` and the settings in it are pickles, which can run what they
like when they are read. Here they cannot: classes they name are not loaded. What a checkpoint needs gets a
:class:`StandIn`, anything else is an error. Tensors are read by torch's own restricted reader, each chunk from its own
bytes of its file.
"""

from __future__ import annotations

import argparse
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moa.checkpoints.files import (
    NO_CHECKPOINT,
    Checkpoint,
    DamagedCheckpoint,
    mistaken_folder,
    read_tracker,
    saved_iterations,
)
from megatron_moa.checkpoints.names import EXTRA_STATE, take_stored_names
from megatron_moa.checkpoints.unpickling import MetadataUnpickler, StandIn, describe_problem, load_archive
from megatron_moa.errors import UserError

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.models.gpt.gpt_model import GPTModel


OPTIMIZER = ("optimizer.", "chained_")  # how the keys of its state start


_COMMON_STATE = "common_state/shard_0_1"  # Megatron's settings, iteration, schedule


_LEGACY_COMMON_STATE = "common.pt"  # where they were before megatron-core 0.19


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where it lies.

    Attributes:
        offset: of its first element in the tensor.
        shape: its size along each axis.
        file: name of the file in the checkpoint's folder.
        position: of its first byte there.
        length: in bytes, with what torch.save writes around the elements.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True)
class TensorInfo:
    """The shape and dtype of a checkpoint's tensor, and its chunks in order of their offsets."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @cached_property
    def _reach(self) -> int:
        return max((chunk.shape[0] for chunk in self.chunks), default=0)

    def chunks_near(self, first: int, length: int) -> Sequence[Chunk]:
        """Returns the chunks that may have elements in these places of the first axis.

        A tensor of many layers or experts has thousands of chunks.
        """
        start = bisect_left(self.chunks, first - self._reach + 1, key=lambda chunk: chunk.offset[0])
        return self.chunks[start : bisect_left(self.chunks, first + length, key=lambda chunk: chunk.offset[0])]


class CheckpointTensors:
    """The tensors of one checkpoint, whatever split it was saved under.

    Args:
        folder: of one iteration, ``iter_NNNNNNN`` (or ``release``), in the format torch_dist.

    Attributes:
        folder: as given.
        tensors: what there is of each, by the checkpoint's names. Parameters of layers that are alike are one tensor
            there, with an axis of layers in front, ``decoder.layers.mlp.linear_fc2.weight`` [layers, h, f]; those of
            experts have one of experts, too.

    Raises:
        UserError: not such a folder, or a damaged or hostile ``.metadata``: whatever is wrong, nothing has been run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._check_format()
        index = self._read_index()
        self.tensors: dict[str, TensorInfo] = {}
        self._bytes: dict[str, Chunk] = {}
        self._sizes: dict[str, int] = {}
        try:
            self._take(index)
        except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(
                f"is not what torch.distributed.checkpoint writes ({describe_problem(error)})"
            ) from None

    # Opening.

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder / '.metadata'}: {what}; take a whole checkpoint from a source you trust")

    def _check_format(self) -> None:
        path = self.folder / "metadata.json"
        try:
            backend = json.loads(path.read_text())["sharded_backend"]
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}: no torch_dist checkpoint there (metadata.json is missing); give a folder that a "
                "training with --ckpt-format torch_dist saved"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({describe_problem(error)}); take a whole checkpoint") from None
        if backend != "torch_dist":
            raise UserError(f"{self.folder}: is of the format {backend!r}; only torch_dist is read here")

    def _read_index(self) -> Any:
        path = self.folder / ".metadata"
        try:
            with open(path, "rb") as stream:
                return MetadataUnpickler(stream).load()
        except FileNotFoundError:
            raise UserError(f"{path}: is missing, the checkpoint was not written to its end; take another") from None
        # A damaged pickle raises whatever it likes.
        except Exception as error:
            raise self._damaged(f"cannot be read ({describe_problem(error)})") from None

    def _take(self, index: Any) -> None:
        """Fills the tables from .metadata.

        Whatever is not as it must be raises one of the errors __init__ expects.
        """
        places: dict[tuple[str, tuple[int, ...] | None], StandIn] = {}
        for place, where in index.storage_data.items():
            offset = getattr(place, "offset", None)
            places[place.fqn, None if offset is None else _size(offset)] = where
        for key, entry in index.state_dict_metadata.items():
            if not isinstance(key, str) or not key.isprintable():
                raise ValueError(f"a tensor is named {key!r}")
            kind = entry.path.rpartition(".")[2]
            if kind == "BytesStorageMetadata":
                self._bytes[key] = self._chunk((), (), places[key, None])
            elif kind == "TensorStorageMetadata":
                self.tensors[key] = self._tensor(key, entry, places)
            else:
                raise ValueError(f"{key} is a {kind}")

    def _tensor(self, key: str, entry: Any, places: dict) -> TensorInfo:
        shape, dtype = _size(entry.size), entry.properties.state[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} is of dtype {dtype!r}")
        chunks = []
        for chunk in entry.chunks:
            offset, size = _size(chunk.offsets), _size(chunk.sizes)
            if len(offset) != len(shape) or len(size) != len(shape):
                raise ValueError(f"a chunk of {key} has {len(size)} axes, not {len(shape)}")
            if any(first + length > whole for first, length, whole in zip(offset, size, shape, strict=True)):
                raise ValueError(f"a chunk of {key} reaches out of the tensor")
            chunks.append(self._chunk(offset, size, places[key, offset]))
            # Else a small file could ask for any amount of memory.
            if math.prod(size) * dtype.itemsize > chunks[-1].length:
                raise ValueError(f"a chunk of {key} has more elements than bytes in its file")
        if sum(math.prod(chunk.shape) for chunk in chunks) < math.prod(shape):
            raise self._damaged(f"lacks chunks of {key}")
        return TensorInfo(shape, dtype, tuple(sorted(chunks, key=lambda chunk: chunk.offset)))

    def _chunk(self, offset: tuple[int, ...], shape: tuple[int, ...], where: Any) -> Chunk:
        name, position, length = where.relative_path, where.offset, where.length
        if not isinstance(name, str) or not name.isprintable() or Path(name).name != name or name == "..":
            raise self._damaged(f"names the file {name!r}, which does not lie in the checkpoint's folder")
        if getattr(where, "transform_descriptors", None):
            raise self._damaged("says that tensors are compressed, which Megatron's are not")
        if name not in self._sizes:
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path}: is missing; take a whole checkpoint")
            self._sizes[name] = path.stat().st_size
        position, length = _size((position, length))
        if position + length > self._sizes[name]:
            raise UserError(
                f"{self.folder / name}: has {self._sizes[name]} bytes, .metadata promises {position + length}; it was "
                "cut off: take a whole checkpoint"
            )
        return Chunk(offset, shape, name, position, length)

    # Reading.

    @property
    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files that hold something."""
        return dict(self._sizes)

    def read(self, key: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """A box of a tensor, by default all of it; only chunks that overlap it are read.

        Args:
            offset: of the box, one number an axis.
            shape: of the box.

        Raises:
            UserError: no such tensor; chunks that leave a part of the box out, or are not what .metadata says.
        """
        info = self._info(key)
        offset = tuple(offset if offset is not None else (0 for _ in info.shape))
        if shape is None:
            shape = tuple(whole - first for whole, first in zip(info.shape, offset, strict=True))
        assert len(offset) == len(shape) == len(info.shape)
        assert all(o >= 0 and o + s <= w for o, s, w in zip(offset, shape, info.shape, strict=True)), (key, shape)
        result = torch.empty(shape, dtype=info.dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for chunk in info.chunks_near(offset[0], shape[0]) if shape else info.chunks:
            if (chunk.offset, chunk.shape) == (offset, tuple(shape)):
                return self._load(key, info, chunk)
            here, there = [], []  # the overlap, as seen from the box and from the chunk
            for first, length, other, size in zip(offset, shape, chunk.offset, chunk.shape, strict=True):
                start, end = max(first, other), min(first + length, other + size)
                here.append(slice(start - first, end - first))
                there.append(slice(start - other, end - other))
                if end <= start:
                    break
            else:
                result[tuple(here)] = self._load(key, info, chunk)[tuple(there)]
                covered[tuple(here)] = True
        if not covered.all():
            raise self._damaged(f"lacks chunks of {key}")
        return result

    def bytes(self, key: str) -> bytes:
        """What is stored under a name that is no tensor's, as torch.save wrote it.

        Raises:
            UserError: no such name.
        """
        if key not in self._bytes:
            raise UserError(f"{self.folder}: has no {key!r}; take a checkpoint saved by Megatron 0.19 or this project")
        return self._raw(self._bytes[key])

    @cached_property
    def has_fp8_scales(self) -> bool:
        """Whether Transformer Engine's modules have saved scales of fp8; else their extra states are empty.

        One state of each size is read: all empty ones are alike.
        """
        by_size = {chunk.length: key for key, chunk in self._bytes.items() if EXTRA_STATE in key}
        return any(self._has_content(key) for key in by_size.values())

    def _has_content(self, key: str) -> bool:
        try:
            states = load_archive(self.bytes(key), key)
        except UserError:  # as Transformer Engine wrote it before 2.0, which is not what the restricted reader admits
            return True
        return any(isinstance(state, Tensor) and state.numel() for state in states)

    def _info(self, key: str) -> TensorInfo:
        if key not in self.tensors:
            raise UserError(f"{self.folder}: has no tensor {key}; load it with the settings it was saved with")
        return self.tensors[key]

    def _raw(self, chunk: Chunk) -> bytes:
        path = self.folder / chunk.file
        try:
            with open(path, "rb") as stream:
                stream.seek(chunk.position)
                raw = stream.read(chunk.length)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); take a whole checkpoint") from None
        if len(raw) != chunk.length:
            raise UserError(f"{path}: was cut off while it was read; take a whole checkpoint")
        return raw

    def _load(self, key: str, info: TensorInfo, chunk: Chunk) -> Tensor:
        tensor = load_archive(self._raw(chunk), f"{self.folder / chunk.file}: {key}")
        found = (tuple(tensor.shape), tensor.dtype) if type(tensor) is Tensor else type(tensor).__name__
        if found != (chunk.shape, info.dtype):
            raise UserError(
                f"{self.folder / chunk.file}: has {found} for {key}, .metadata promises {(chunk.shape, info.dtype)}; "
                "take a whole checkpoint"
            )
        return tensor

    # Settings.

    @cached_property
    def common_state(self) -> dict[str, Any]:
        """What Megatron keeps beside tensors: ``args``, ``iteration``, ``optimizer`` (its settings), ….

        Objects of Megatron's own classes are :class:`StandIn`.

        Raises:
            UserError: it is not there, damaged or hostile.
        """
        legacy = self.folder / _LEGACY_COMMON_STATE
        if legacy.is_file():
            raw, where = legacy.read_bytes(), str(legacy)
        else:
            raw, where = self.bytes(_COMMON_STATE), f"{self.folder}: common_state"
        state = load_archive(raw, where, settings=True)
        if isinstance(state, list) and len(state) == 1:
            state = state[0]  # Megatron's wrapping
        if not isinstance(state, dict):
            raise UserError(f"{where}: is a {type(state).__name__}, not Megatron's state; take a whole checkpoint")
        return state

    @property
    def content_metadata(self) -> dict[str, Any]:
        """Returns how Megatron laid the tensors out; empty where the checkpoint does not say.

        Megatron gives this description to ``sharded_state_dict``.

        Raises:
            UserError: as :attr:`common_state`.
        """
        metadata = self.common_state.get("content_metadata") or {}
        if not isinstance(metadata, dict):
            raise UserError(f"{self.folder}: its content_metadata is a {type(metadata).__name__}; take another")
        return metadata

    @property
    def args(self) -> argparse.Namespace:
        """The settings it was saved with.

        Raises:
            UserError: as :attr:`common_state`, or it holds none.
        """
        args = self.common_state.get("args")
        if not isinstance(args, argparse.Namespace) or not all(isinstance(name, str) for name in vars(args)):
            raise UserError(f"{self.folder}: holds no settings; take a checkpoint saved by a training")
        return args


def _size(values: Any) -> tuple[int, ...]:
    values = tuple(values)
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return values


def check_pickles(root: Path, iteration: int | None) -> None:
    """Reads what is pickled in a checkpoint by rules that admit no code.

    Call it before Megatron, which reads the same pickles without such rules.

    Args:
        root: what training's ``--save`` named.
        iteration: None for the latest.

    Raises:
        UserError: no such iteration; a damaged or hostile file.
    """
    try:
        checkpoint = Checkpoint("--load", root, iteration or read_tracker(root))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--load {root}: {mistaken_folder(root) or NO_CHECKPOINT}") from None
    except DamagedCheckpoint as error:
        raise UserError(f"--load {root}: {error}; give --iteration N") from None
    if not checkpoint.path.is_dir():
        there = ", ".join(map(str, saved_iterations(root))) or "none"
        raise UserError(f"--iteration {iteration}: is not in {root}; complete checkpoints there: {there}")
    _ = CheckpointTensors(checkpoint.path).args


class ModelTensors(Mapping[str, Tensor]):
    """The parameters and buffers of a model from a checkpoint, by their names in ``model.state_dict()``.

    A tensor is read when it is asked for, and none is kept. Where it lies in the checkpoint is asked of the model
    itself (``sharded_state_dict``), so that the names, the layout and the dtype are Megatron's for every kind of layer.
    Embedding and output layer have as many rows as they have in the checkpoint, where the vocabulary may be padded to
    another size than the model's.
    """

    def __init__(self, folder: Path, model: GPTModel) -> None:
        """Finds all of them and reads none.

        Args:
            folder: as for :class:`CheckpointTensors`.
            model: the whole model, on one process; on the meta device it takes no memory.

        Raises:
            UserError: a tensor that the checkpoint or the model lacks, or that has another shape there.
        """
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

        self._checkpoint = checkpoint = CheckpointTensors(folder)
        self._wanted = {
            # A factory's tensor lies in the checkpoint as several (the halves of a gated fc1).
            name: (entry.build(), entry.merge_fn) if isinstance(entry, ShardedTensorFactory) else (entry, None)
            for name, entry in model.sharded_state_dict(metadata=dict(checkpoint.content_metadata)).items()
            if not name.endswith(EXTRA_STATE)
        }
        names = {name for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        assert names == set(self._wanted), names.symmetric_difference(self._wanted)
        parts = [part for entry, _ in self._wanted.values() for part in nested_values([entry])]
        take_stored_names(parts, checkpoint.tensors)
        for part in parts:
            assert isinstance(part, ShardedTensor), part
            shape, other = checkpoint._info(part.key).shape, tuple(part.global_shape)
            rows = part.prepend_axis_num + 1 if part.allow_shape_mismatch else 0
            if len(shape) != len(other) or shape[rows:] != other[rows:]:
                raise UserError(
                    f"{folder}: {part.key} is {shape} there and {other} in the model; take its own settings"
                )
        surplus = {key for key in checkpoint.tensors if not key.startswith(OPTIMIZER) and not key.endswith(EXTRA_STATE)}
        if surplus := sorted(surplus - {part.key for part in parts}):
            raise UserError(f"{folder}: has {len(surplus)} tensors that the model lacks ({', '.join(surplus[:3])})")
        if checkpoint.has_fp8_scales:
            print(f"WARNING: --load {folder}: its fp8 scales are dropped; what is made of it has none", flush=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, name: str) -> Tensor:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace

        entry, merge = self._wanted[name]
        tensors = dict_list_map_outplace(self._read, [entry])[0]
        return tensors if merge is None else merge(tensors)

    def _read(self, part: ShardedTensor) -> Tensor:
        shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
        if part.allow_shape_mismatch:
            axis = part.prepend_axis_num
            shape = (*shape[:axis], self._checkpoint.tensors[part.key].shape[axis], *shape[axis + 1 :])
        tensor = self._checkpoint.read(part.key, tuple(part.global_offset), shape)
        return tensor.reshape(shape[part.prepend_axis_num :])
