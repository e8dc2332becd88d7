"""Reads a Hugging Face folder as data: settings, and weights one tensor at a time; runs nothing in it.

What a stranger wrote is looked at before it is used: files have to lie in the folder, weights are safetensors (pickles
only if asked for, and then nothing but tensors is read of them), and every weight has to be one that the settings
promise, of the shape they promise.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from megatron_moa.checkpoints.files import HOLDS_ADAPTER
from megatron_moa.command_line.output_folder import is_unfinished
from megatron_moa.errors import UserError, one_line
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.families import FAMILIES, OWN, Family, family_of
from megatron_moa.hf.mapping import Entry, is_buffer
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM

# In the order in which transformers looks for them; an index stands for the files that it names.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LFS = b"version https://git-lfs.github.com/spec/"
_OUTPUT = "lm_head.weight"
# In generation_config.json: the tokens that end a text, which are read apart, and what it says of itself.
_NOT_GENERATION = ("eos_token_id", "transformers_version", "_from_model_config")


@dataclass(frozen=True)
class Stored:
    """The place of a stored weight: its file and its name there, with its shape and its dtype.

    ``dtype`` is None for a type that is not read; ``written`` names that type.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    written: str


@dataclass
class HuggingFaceFolder:
    """An opened folder; :func:`open_folder` makes it.

    Attributes:
        root: the folder.
        family: which of transformers' classes the model is of.
        config: the family's, from config.json.
        own: the same settings as this project has them.
        weights: by their names in :meth:`Family.entries`.
        pickled: whether the weights are pickles.
    """

    root: Path
    family: Family
    config: PreTrainedConfig
    own: GPTMoAConfig
    weights: dict[str, Stored]
    pickled: bool
    _opened: tuple[Path, Any] | None = field(default=None, repr=False)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the weights; buffers, which are always float32, aside."""
        return {stored.dtype for name, stored in self.weights.items() if not is_buffer(name)}

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a text, by generation_config.json or else by config.json.

        Ids beyond the vocabulary, which the model cannot write, are left out.

        Raises:
            UserError: generation_config.json cannot be read, or has something else than ids.
        """
        found = self._read_generation().get("eos_token_id")
        ends = _as_list(self.config.eos_token_id if found is None else found)
        if not all(type(end) is int for end in ends):
            path = self.root / "generation_config.json"
            raise UserError(f"{path}, eos_token_id {found!r}: is neither an id nor a list of ids; correct it")
        return [end for end in ends if 0 <= end < self.own.vocab_size]

    @property
    def generation(self) -> dict[str, Any]:
        """The further settings of generation_config.json.

        The first token and the padding are config.json's where that file names none.

        Raises:
            UserError: generation_config.json cannot be read, or has something else than ids for these two.
        """
        found = {name: value for name, value in self._read_generation().items() if name not in _NOT_GENERATION}
        for name in ("bos_token_id", "pad_token_id"):
            token = found.pop(name, None)
            token = getattr(self.config, name) if token is None else token
            if token is not None and type(token) is not int:
                raise UserError(f"{self.root / 'generation_config.json'}, {name} {token!r}: is no id; correct it")
            if token is not None and 0 <= token < self.own.vocab_size:
                found[name] = token
        return found

    @property
    def name(self) -> str:
        """The model's, for reading: the folder's, or in the hub's cache the repository's."""
        root = self.root.resolve()
        if root.parent.name == "snapshots":
            return root.parent.parent.name.removeprefix("models--").replace("--", "/")
        return root.name

    def _read_generation(self) -> dict[str, Any]:
        if not (self.root / "generation_config.json").exists():
            return {}
        return read_json(file_in(self.root, "generation_config.json", f"--hf {self.root}"))

    @property
    def entries(self) -> list[Entry]:
        """Megatron's parameters and what they are here."""
        return list(self.family.entries(self.own))

    def read(self, name: str) -> Tensor:
        """The weight of a name, as it lies in its file. Only one file is open at a time.

        Raises:
            UserError: its bytes cannot be read.
        """
        stored = self.weights[name]
        if self._opened is None or self._opened[0] != stored.file:
            self._opened = stored.file, _open(stored.file)
        tensors = self._opened[1]
        if isinstance(tensors, dict):
            return tensors[stored.name]
        try:
            return tensors.get_tensor(stored.name)
        except SafetensorError as error:
            raise UserError(
                f"{stored.file}: {stored.name} cannot be read ({one_line(error)}); fetch it again"
            ) from None

    def check_tied(self) -> None:
        """Tied models may have their output layer in the files too; it has to be the embedding then.

        Raises:
            UserError: it is another matrix.
        """
        embedding = _embedding(self.entries)
        if not self.own.tie_word_embeddings or _OUTPUT not in self.weights:
            return
        if not torch.equal(self.read(embedding), self.read(_OUTPUT)):
            raise UserError(
                f"{self.weights[_OUTPUT].file}: {_OUTPUT} differs from {embedding}, and config.json, "
                "tie_word_embeddings true, says they are one; set it to false"
            )


def open_folder(root: Path, allow_pickle: bool = False) -> HuggingFaceFolder:
    """Reads a folder's settings and its weights' names, shapes and dtypes, and checks that they agree.

    Args:
        root: as ``--hf`` names it.
        allow_pickle: whether weights may come from pickles (pytorch_model.bin); safetensors are taken where they are.

    Raises:
        UserError: anything that is not there, damaged, not supported, or that leads out of the folder.
    """
    if not root.is_dir():
        raise UserError(f"--hf {root}: no such folder; give one with config.json and weights, on this machine")
    _check_finished(root)
    family, config, own = _read_config(root)
    files, pickled = _weight_files(root, allow_pickle)
    weights = _named_by_family(family, _stored(root, files))
    folder = HuggingFaceFolder(root, family, config, own, weights, pickled)
    _check_weights(folder)
    return folder


def file_in(root: Path, name: str, named_by: str) -> Path:
    """Returns the path of a file of the folder.

    A link may lead to where the hub's cache keeps its files, and nowhere else.

    Args:
        named_by: who says so, for the message.

    Raises:
        UserError: the name leads out of the folder, the file is not there, or git-lfs has not fetched it.
    """
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise UserError(f"{named_by}: names the file {name!r}, and only files of this folder itself are read")
    path = root / name
    if not path.is_file():
        what = "a link to nothing" if path.is_symlink() else "not there"
        raise UserError(f"{named_by}: {name} is {what}; fetch the folder again")
    base = root.resolve()
    allowed = [base]
    if base.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/COMMIT: files are links into .../blobs
        allowed.append(base.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise UserError(f"{named_by}: {name} is a link that leaves the folder, to {path.resolve()}; put the file there")
    with open(path, "rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise UserError(f"{path}: is a pointer of git-lfs, not the file itself; fetch it with 'git lfs pull'")
    return path


def _check_finished(root: Path) -> None:
    if is_unfinished(root.resolve().name):
        raise UserError(f"--hf {root}: was left by a conversion that did not end; convert again")
    snapshots = root if root.resolve().name == "snapshots" else root / "snapshots"
    if not (root / "config.json").exists() and (whole := [path.parent for path in snapshots.glob("*/config.json")]):
        raise UserError(f"--hf {root}: is a part of the hub's cache; give the model's own folder: {_some(whole)}")
    # Where the hub's library and others leave them; the whole tree may be somebody's home.
    left = (*root.glob("*.incomplete"), *(root / ".cache" / "huggingface" / "download").rglob("*.incomplete"))
    unfinished = next(iter(left), None)
    if unfinished is not None:
        raise UserError(f"--hf {root}: its download has not ended ({unfinished.relative_to(root)}); fetch it again")
    if (root / "adapter_config.json").exists():
        raise UserError(f"--hf {root}: {HOLDS_ADAPTER}")


# Settings.


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder.

    Raises:
        UserError: it is none, has a key twice, or an endless number.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{path}: has {key!r} twice; take one out")
            found[key] = value
        return found

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise UserError(f"{path}: has the number {text}, which is none; correct it")
        return float(text)

    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=without_duplicates,
            parse_float=finite,
            parse_constant=finite,
        )
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)}); fetch or export it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; fetch or export it again")
    return value


def _read_config(root: Path) -> tuple[Family, PreTrainedConfig, GPTMoAConfig]:
    """Returns the family that config.json names, and config.json as its class and ours read it.

    ``auto_map`` and other names of code mean nothing here.
    """
    path = file_in(root, "config.json", f"--hf {root}")
    settings = read_json(path)
    architectures, kind = settings.get("architectures"), settings.get("model_type")
    if not architectures:  # old files name the type alone
        of_type = [family for family in (*FAMILIES, OWN) if family.config_class.model_type == kind]
        if not of_type:
            known = ", ".join(family.config_class.model_type for family in (*FAMILIES, OWN))
            raise UserError(f"{path}, model_type {kind}: is not supported; supported: {known}")
        family = of_type[0]
    elif isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str):
        family = family_of(architectures[0], f"{path}, architectures")
    else:
        raise UserError(f"{path}, architectures {architectures}: one name is wanted")
    if kind not in (None, family.config_class.model_type):
        wanted = family.config_class.model_type
        raise UserError(f"{path}, model_type {kind}: a {family.architecture} is of {wanted}; correct one of the two")
    try:
        family.check_sizes(settings)
        config = family.config_class.from_dict(settings)
        return family, config, family.to_own(config)
    except UserError as error:
        raise UserError(f"--hf {root}: {error}") from None
    except Exception as error:  # whatever an invalid value makes a library raise
        raise UserError(f"{path}: is no {family.config_class.__name__} ({one_line(error)})") from None


# Weights.


def _weight_files(root: Path, allow_pickle: bool) -> tuple[dict[Path, set[str] | None], bool]:
    """Returns the files of weights, and whether they are pickled.

    Each file comes with the names that an index promises there, or None without an index.
    """
    for names, pickled in ((_SAFETENSORS, False), (_PICKLES, True)):
        there = [name for name in names if (root / name).is_symlink() or (root / name).exists()]
        if not there:
            continue
        if pickled and not allow_pickle:
            raise UserError(
                f"--hf {root}: its weights are pickled ({there[0]}); add --allow-pickle, with which only tensors are "
                "read of them, or convert them to safetensors"
            )
        if len(there) > 1:
            raise UserError(f"--hf {root}: has {there[0]} and {there[1]}; take away the one that is not the model's")
        path = file_in(root, there[0], f"--hf {root}")
        return (indexed_files(root, path) if path.suffix == ".json" else {path: None}), pickled
    wanted = ", ".join((*_SAFETENSORS, *_PICKLES))
    raise UserError(f"--hf {root}: no weights there; one of these is wanted: {wanted}")


def indexed_files(root: Path, path: Path) -> dict[Path, set[str] | None]:
    """The files of weights that an index names, each with the names that it promises there.

    Raises:
        UserError: it is damaged, or names anything but files of weights in the folder itself.
    """
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path}: has no weight_map from names to files; fetch it again")
    suffix = ".bin" if path.name in _PICKLES else ".safetensors"
    by_file: dict[str, set[str]] = {}
    for name, file in names.items():
        by_file.setdefault(file, set()).add(name)
    for file in by_file:
        if not file.endswith(suffix):
            raise UserError(f"{path}: names the file {file!r}, which is no {suffix} file")
    return {file_in(root, file, str(path)): found for file, found in by_file.items()}


def _stored(root: Path, files: dict[Path, set[str] | None]) -> Iterator[Stored]:
    """All tensors of these files; from their headers, or from pickles without their bytes."""
    for file, promised in files.items():
        found = list(_tensors(file))
        if promised is not None:
            names = {stored.name for stored in found}
            for wrong, what in ((promised - names, "lacks"), (names - promised, "has, beside what the index names,")):
                if wrong:
                    raise UserError(f"{file}: {what} {_some(wrong)}; fetch the file and the index again")
        yield from found


def _tensors(file: Path) -> Iterator[Stored]:
    tensors = _open(file)
    if isinstance(tensors, dict):
        for name, tensor in tensors.items():
            dtype = tensor.dtype if tensor.dtype in _DTYPES.values() else None
            yield Stored(file, name, tuple(tensor.shape), dtype, str(tensor.dtype))
        return
    for name in tensors.keys():  # noqa: SIM118 - not a dict
        part = tensors.get_slice(name)
        kind = part.get_dtype()
        yield Stored(file, name, tuple(part.get_shape()), _DTYPES.get(kind), kind)


def _open(file: Path) -> Any:
    """Opens a file of weights: safetensors, or a pickle as a dictionary of tensors.

    A pickle's tensors are mapped from the file where torch can.
    """
    if file.suffix == ".safetensors":
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or cut off ({one_line(error)}); fetch it again") from None
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        what = re.sub(r"^.*?(?=Unsupported|GLOBAL|WeightsUnpickler)", "", one_line(error))[:160]
        raise UserError(f"{file}: holds more than tensors ({what}); nothing of it was run") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged or cut off ({one_line(error)[:160]}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{file}: holds something else than tensors by name; give a model's state_dict")
    return tensors


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


# One against the other.


def _named_by_family(family: Family, stored: Iterable[Stored]) -> dict[str, Stored]:
    weights: dict[str, Stored] = {}
    for tensor in stored:
        name = family.stored_name(tensor.name)
        if name is None:
            continue  # of whatever type: masks of old GPT-2 files are of bytes
        if name in weights:
            raise UserError(f"{tensor.file}: {tensor.name} is in {weights[name].file} too; take one of them away")
        if tensor.dtype is None:
            raise UserError(
                f"{tensor.file}: {tensor.name} is of {tensor.written}; float32, bfloat16 and float16 are read, "
                "quantised weights are not"
            )
        weights[name] = tensor
    return weights


def _check_weights(folder: HuggingFaceFolder) -> None:
    """Every weight that config.json promises is there, of its shape, and no other is."""
    layers, experts = folder.own.num_hidden_layers, folder.own.num_experts
    if max(layers, experts) > len(folder.weights):  # before a model of such a size is thought up
        promised = f"{layers} layers and {experts} experts"
        raise UserError(
            f"--hf {folder.root}: config.json promises {promised}, and there are {len(folder.weights)} weights"
        )
    shapes = expected_shapes(folder.family, folder.own)
    for name, shape in shapes.items():
        stored = folder.weights.get(name)
        if stored is None:
            raise UserError(f"--hf {folder.root}: {name} is not among the weights, and config.json promises it")
        if stored.shape != shape:
            there, wanted = list(stored.shape), list(shape)
            raise UserError(f"{stored.file}: {stored.name} is {there}, and by config.json it would be {wanted}")
    surplus = folder.weights.keys() - shapes.keys()
    if folder.own.tie_word_embeddings:
        surplus = surplus - {_OUTPUT}
        output = folder.weights.get(_OUTPUT)
        if output is not None and output.shape != shapes[_embedding(folder.entries)]:
            raise UserError(f"{output.file}: {_OUTPUT} is {list(output.shape)}, and it is tied to another shape")
    if surplus:
        raise UserError(f"--hf {folder.root}: {folder.family.architecture} has no place for {_some(surplus)}")


def expected_shapes(family: Family, own: GPTMoAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights as they lie in the files of a family."""
    try:
        with torch.device("meta"):
            state = GPTMoAForCausalLM(own).state_dict()
    except UserError:
        raise
    except Exception as error:  # invalid sizes and settings raise whatever they like
        raise UserError(f"config.json: no model can be built from it ({one_line(error)[:160]})") from None
    shapes = {}
    for ours, theirs in zip(OWN.entries(own), family.entries(own), strict=True):
        megatron = ours.join(tuple(state[name] for name in ours.hf))
        shapes |= {name: tuple(tensor.shape) for name, tensor in zip(theirs.hf, theirs.split(megatron), strict=True)}
    return shapes


def _embedding(entries: Iterable[Entry]) -> str:
    return next(entry.hf[0] for entry in entries if entry.megatron == "embedding.word_embeddings.weight")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _some(names: Iterable[str | Path]) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
