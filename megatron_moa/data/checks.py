"""Checks the tokenizer, the datasets and the index cache of a training before it starts.

The tools that make datasets share these checks; corpus.py reads their texts. Nothing here imports torch or Megatron
until a function needs it, and no check reads a whole dataset.
"""

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import struct
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_moa.errors import UserError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
TRAIN, VALIDATION, TEST = "training", "validation", "test"


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, not {text}")
    return number


def check_output(flag: str, prefix: str, endings: Sequence[str], overwrite: bool) -> list[str]:
    """The files a prefix stands for; raises UserError if they cannot or must not be written."""
    for ending in endings:
        if ending and prefix.endswith(ending):
            raise UserError(f"{flag} {prefix}: a prefix without ending is wanted: {flag} {prefix.removesuffix(ending)}")
    # Megatron itself makes a folder PREFIX/cache, so that alone is no mistake
    is_folder = os.path.isdir(prefix) and not os.path.isdir(os.path.join(prefix, "cache"))
    if is_folder or not os.path.basename(prefix):
        raise UserError(f"{flag} {prefix}: a folder; add a name, e.g. {flag} {os.path.join(prefix, 'corpus')}")
    targets = [prefix + ending for ending in endings]
    existing = [target for target in targets if os.path.exists(target)]
    if existing and not overwrite:
        raise UserError(f"{flag} {prefix}: {existing[0]} exists; choose another name or add --overwrite")
    parent = os.path.dirname(os.path.abspath(prefix))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise UserError(f"{flag} {prefix}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {prefix}: the folder {parent} is not writable; choose another or chmod +w it")
    return targets


@contextmanager
def written_whole(flag: str, targets: Sequence[str]) -> Iterator[list[str]]:
    """Yields a temporary name beside each target. All are renamed at the end; if anything goes wrong none remains."""
    temporary = [f"{target}.{os.getpid()}.tmp" for target in targets]
    folder = os.path.dirname(os.path.abspath(targets[0]))
    created = []
    try:
        while not os.path.exists(folder):
            created.append(folder)
            folder = os.path.dirname(folder)
        os.makedirs(os.path.dirname(os.path.abspath(targets[0])), exist_ok=True)
        yield temporary
        for target in targets[1:]:  # so that a crash between two renames never leaves an old file beside a new one
            if os.path.exists(target):
                os.unlink(target)
        for source, target in zip(temporary, targets, strict=True):
            os.replace(source, target)
        created = []
    except OSError as error:
        raise UserError(
            f"{flag} {targets[0]}: cannot be written ({error.strerror}); free space or choose another place"
        ) from None
    finally:
        for path in temporary:
            if os.path.exists(path):
                os.unlink(path)
        for path in created:
            if os.path.isdir(path) and not os.listdir(path):
                os.rmdir(path)


def check_tokenizer(
    tokenizer_type: str | None,
    tokenizer_model: str | None,
    vocab_size: int | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
) -> None:
    """Raises UserError unless the files of ``--tokenizer-type`` are there and look like it. Never uses the network."""
    if tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing; for a tokenizer of tools/train_tokenizer.py add --tokenizer-type "
            "SentencePieceTokenizer --tokenizer-model PREFIX.model"
        )
    if tokenizer_type in ("NullTokenizer", "NullMultimodalTokenizer"):
        if not vocab_size:
            raise UserError(f"--tokenizer-type {tokenizer_type}: has no vocabulary of its own; add --vocab-size N")
    elif tokenizer_type in SENTENCEPIECE_TYPES:
        _check_sentencepiece(tokenizer_type, tokenizer_model)
    elif tokenizer_type == "HuggingFaceTokenizer":
        _check_huggingface(tokenizer_model)
    elif tokenizer_type == "TikTokenizer":
        _require_file("--tokenizer-model", tokenizer_model, tokenizer_type)
    elif tokenizer_type in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"):
        _require_file("--vocab-file", vocab_file, tokenizer_type)
        if tokenizer_type == "GPT2BPETokenizer":
            _require_file("--merge-file", merge_file, tokenizer_type)


def _require_file(flag: str, path: str | None, tokenizer_type: str) -> str:
    if not path:
        raise UserError(f"--tokenizer-type {tokenizer_type}: needs a file; add {flag} FILE")
    if not os.path.exists(path):
        near = f"; did you mean {path}.model?" if os.path.exists(f"{path}.model") else "; check the path"
        raise UserError(f"{flag} {path}: no such file{near}")
    if not os.path.isfile(path):
        hint = " (for a folder of Hugging Face files use --tokenizer-type HuggingFaceTokenizer)"
        raise UserError(f"{flag} {path}: not a file; {tokenizer_type} wants one file{hint}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: not readable; change its permissions (chmod +r)")
    if os.path.getsize(path) == 0:
        raise UserError(f"{flag} {path}: the file is empty; copy or train the tokenizer again")
    return path


def _check_sentencepiece(tokenizer_type: str, tokenizer_model: str | None) -> None:
    path = _require_file("--tokenizer-model", tokenizer_model, tokenizer_type)
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path).get_piece_size()
    except (RuntimeError, OSError):
        pieces = 0
    if not pieces:
        raise UserError(
            f"--tokenizer-model {path}: not a sentencepiece model; give the .model of tools/train_tokenizer.py, or use "
            "--tokenizer-type HuggingFaceTokenizer for a folder with tokenizer.json"
        )


def _check_huggingface(tokenizer_model: str | None) -> None:
    if not tokenizer_model:
        raise UserError("--tokenizer-type HuggingFaceTokenizer: needs a folder; add --tokenizer-model FOLDER")
    if os.path.isfile(tokenizer_model):
        raise UserError(
            f"--tokenizer-model {tokenizer_model}: a file; HuggingFaceTokenizer wants the folder of tokenizer.json"
        )
    if os.path.isdir(tokenizer_model):
        if not any(Path(tokenizer_model, name).is_file() for name in _HUGGINGFACE_FILES):
            raise UserError(
                f"--tokenizer-model {tokenizer_model}: no tokenizer files in this folder "
                f"({', '.join(_HUGGINGFACE_FILES)}); save one there with tokenizer.save_pretrained(FOLDER)"
            )
    elif not _in_huggingface_cache(tokenizer_model):
        raise UserError(
            f"--tokenizer-model {tokenizer_model}: no such folder, and no tokenizer of that name in the local Hugging "
            "Face cache; check the path, or fetch it once where there is a network (hf download NAME)"
        )


def tokenizer_digest(tokenizer_model: str) -> str:
    """A fingerprint (SHA-256, hexadecimal) of the files that decide token ids, wherever they lie.

    Args:
        tokenizer_model: ``--tokenizer-model``, checked by :func:`check_tokenizer`: a file, a Hugging Face folder, or
            a name in the local Hugging Face cache.
    """
    path = Path(tokenizer_model)
    if path.is_file():
        files = {"model": path}  # whatever its name
    elif path.is_dir():
        patterns = ("*.model", "*.py", "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*")
        files = {found.name: found for pattern in patterns for found in path.glob(pattern) if found.is_file()}
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = {name: try_to_load_from_cache(tokenizer_model, name) for name in _HUGGINGFACE_FILES}
        files = {name: Path(found) for name, found in cached.items() if isinstance(found, str)}
    digest = hashlib.sha256()
    for name, found in sorted(files.items()):
        digest.update(f"{name} {hashlib.sha256(found.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


_HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _in_huggingface_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _HUGGINGFACE_FILES)
    except HFValidationError:  # a path, not a name
        return False


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keeps Megatron's warnings about the absent Transformer Engine, Apex and CUDA out of a tool's output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer for its own flags, without initialising Megatron; what fails is a UserError.

    Args:
        args: Megatron's namespace, or one with only some of the attributes of its TokenizerConfig.
    """
    with quiet_imports():
        from megatron.core.tokenizers.utils import build_tokenizer as megatron

        settings = copy.copy(args)
        for name, default in _TOKENIZER_DEFAULTS.items():
            if not hasattr(settings, name):
                setattr(settings, name, default)
        settings.pad_vocab_size = False  # the padded size depends on the parallel layout and is not wanted here
        try:
            return megatron.build_tokenizer(settings)
        except Exception as error:  # third-party loaders raise anything, and users must get one line
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tokenizer-model {args.tokenizer_model}: {args.tokenizer_type} cannot load it ({reason}); check "
                "--tokenizer-type and the files"
            ) from None


_TOKENIZER_DEFAULTS = {
    "vocab_size": None,
    "vocab_file": None,
    "merge_file": None,
    "metadata_path": None,
    "special_tokens": None,
    "chat_template": None,
    "trust_remote_code": False,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_hf_no_include_special_tokens": False,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
}


class ProgressLines:
    """A progress bar for log files: a plain line on stderr now and then."""

    def __init__(self, total: int, title: str, seconds: float = 30) -> None:
        """Counts up to ``total`` bytes; a line at most every ``seconds``."""
        self.total, self.title, self.seconds = total, title, seconds
        self.done = 0
        self.start = self.printed = time.monotonic()

    def update(self, count: int) -> None:
        """Adds bytes that are done."""
        self.done += count
        now = time.monotonic()
        if now - self.printed < self.seconds or not self.done:
            return
        self.printed = now
        elapsed = now - self.start
        left = elapsed * max(0, self.total - self.done) / self.done
        print(
            f"{self.title}: {self.done / max(1, self.total):.1%}, {self.done / 1e6:,.0f} of "
            f"{self.total / 1e6:,.0f} MB, {self.done / elapsed / 1e6:.1f} MB/s, {left / 60:,.1f} minutes left",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        """Prints nothing: what follows says that it is done."""


def progress_bar(total: int, title: str) -> Any:
    """Bytes done of ``total``: a bar on a terminal, in a log file a line every half minute (both on stderr)."""
    if not sys.stderr.isatty():
        return ProgressLines(total, title)
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread besides the workers' fork
    return tqdm(total=total, unit="B", unit_scale=True, desc=title, file=sys.stderr, leave=False)


_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_TOKEN_DTYPES = {1: numpy.uint8, 2: numpy.int8, 3: numpy.int16, 4: numpy.int32, 5: numpy.int64, 8: numpy.uint16}


def index_header(dtype: type, sequences: int) -> bytes:
    """How an .idx begins that holds one sequence a document."""
    code = next(code for code, known in _TOKEN_DTYPES.items() if known == dtype)
    return _HEADER.pack(_MAGIC, 1, code, sequences, sequences + 1)


@dataclass(frozen=True)
class DatasetIndex:
    """What an .idx file says; Megatron's "sequence" is what the tools here write once per document."""

    prefix: str
    dtype: type
    sequences: int
    pointers: numpy.ndarray  # [sequences], the byte offset of each sequence in the .bin, memory-mapped
    tokens: int

    def tokens_between(self, begin: int, end: int) -> int:
        """Tokens of the sequences ``begin`` to ``end - 1``, from two offsets."""
        offsets = [self.tokens if i >= self.sequences else int(self.pointers[i]) // self.itemsize for i in (begin, end)]
        return offsets[1] - offsets[0]

    @property
    def itemsize(self) -> int:
        """Bytes a token takes."""
        return numpy.dtype(self.dtype).itemsize


def read_index(prefix: str, flag: str = "--data-path") -> DatasetIndex:
    """Reads and checks the header of ``prefix.idx`` and the sizes of both files; raises UserError for what is wrong."""
    for ending in (".bin", ".idx"):
        if prefix.endswith(ending):
            raise UserError(f"{flag} {prefix}: a prefix without ending is wanted: {flag} {prefix.removesuffix(ending)}")
    for ending in (".bin", ".idx"):
        path = prefix + ending
        if not os.path.isfile(path):
            near = f"{prefix}_text_document"
            hint = f"did you mean {near}?" if os.path.isfile(near + ending) else "make it with tools/preprocess_data.py"
            raise UserError(f"{flag} {prefix}: no file {path}; check the path, or {hint}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{flag} {prefix}: {path} is not readable; change its permissions (chmod +r)")
        if os.path.getsize(path) == 0:
            raise UserError(f"{flag} {prefix}: {path} is empty; copy it again or run tools/preprocess_data.py")
    index_path, index_size = prefix + ".idx", os.path.getsize(prefix + ".idx")
    with open(index_path, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{flag} {prefix}: {index_path} is not a Megatron index; make it with tools/preprocess_data.py")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1 or code not in _TOKEN_DTYPES:
        raise UserError(
            f"{flag} {prefix}: {index_path} has version {version} and number type {code}, which Megatron does not read "
            "as tokens; make it again with tools/preprocess_data.py"
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if index_size < expected:
        raise UserError(
            f"{flag} {prefix}: {index_path} is cut off, {index_size} bytes of {expected}; copy it again or run "
            "tools/preprocess_data.py"
        )
    if sequences == 0:
        raise UserError(f"{flag} {prefix}: holds no document; run tools/preprocess_data.py on text that is not empty")
    dtype = _TOKEN_DTYPES[code]
    lengths = numpy.memmap(index_path, numpy.int32, "r", _HEADER.size, (sequences,))
    pointers = numpy.memmap(index_path, numpy.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    itemsize = numpy.dtype(dtype).itemsize
    data_expected = int(pointers[-1]) + int(lengths[-1]) * itemsize
    data_size = os.path.getsize(prefix + ".bin")
    if data_size != data_expected:
        problem = "cut off" if data_size < data_expected else "longer than its index says"
        raise UserError(
            f"{flag} {prefix}: {prefix}.bin is {problem}, {data_size} bytes instead of {data_expected}; copy .bin "
            "and .idx again, both from the same run"
        )
    return DatasetIndex(prefix, dtype, sequences, pointers, data_expected // itemsize)


def check_dataset(
    prefix: str,
    sequence_length: int,
    split: str | None,
    needs_validation: bool,
    flag: str = "--data-path",
    needs_training: bool = True,
) -> None:
    """Raises UserError unless Megatron can draw sequences from ``prefix.bin`` and ``prefix.idx``.

    Megatron cuts the documents by the shares of ``--split``, rounded, and repeats a part that is too short. A part with
    a share but without a document makes it count epochs for ever (even with ``--eval-iters 0``), so that is refused; so
    is a training (or, if needed, validation) part without the ``sequence_length + 1`` tokens of one sequence.

    Args:
        prefix: the path without .bin and .idx.
        sequence_length: ``--seq-length``.
        split: ``--split``, or None where the whole dataset serves one purpose (``--train-data-path`` and the like).
        needs_validation: whether the validation part will be used.
        flag: the flag that named the prefix, for the message.
        needs_training: whether the training part will be used.
    """
    index = read_index(prefix, flag)
    needed = sequence_length + 1  # the labels are the tokens moved by one
    if split is None:
        parts = {TRAIN: (0, index.sequences)}
        needs_training = True
    else:
        parts = split_bounds(split, index.sequences)
    if needs_training and TRAIN not in parts:
        raise UserError(f"--split {split}: gives nothing to training; use e.g. --split 99,1,0")
    for name, (begin, end) in parts.items():
        tokens = index.tokens_between(begin, end)
        where = f"the {name} split" if split is not None else "it"
        if tokens == 0:
            raise UserError(
                f"{flag} {prefix}: its {index.sequences} documents leave none to the {name} part of --split {split}, "
                f"for which Megatron would wait for ever; use {_split_remedy(index.sequences)}"
            )
        if tokens < needed and ((name == TRAIN and needs_training) or (name == VALIDATION and needs_validation)):
            more = " or use --eval-iters 0" if name == VALIDATION else ""
            share = ", give it a larger share with --split" if split is not None and index.sequences > 1 else ""
            raise UserError(
                f"{flag} {prefix}: {tokens} tokens in {where}, shorter than one sequence of --seq-length "
                f"{sequence_length} (and one token more); add text{share}, lower --seq-length{more}"
            )


def split_bounds(split: str, sequences: int) -> dict[str, tuple[int, int]]:
    """The first and last-plus-one sequence of each part with a share, by Megatron's own arithmetic."""
    with quiet_imports():
        from megatron.core.datasets import blended_megatron_dataset_config as megatron

    try:
        with numpy.errstate(invalid="raise", divide="raise"):
            matrix = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(split))
    except (AssertionError, ValueError, FloatingPointError):
        raise UserError(f"--split {split}: not one to three shares; use e.g. --split 99,1,0") from None
    return {
        name: (round(share[0] * float(sequences)), round(share[1] * float(sequences)))
        for name, share in zip((TRAIN, VALIDATION, TEST), matrix, strict=True)
        if share is not None
    }


def _split_remedy(sequences: int) -> str:
    if sequences == 1:
        return "--split 1,0,0 with --eval-iters 0, or cut the text into more documents"
    validation = max(1, sequences // 20)
    return f"--split {sequences - validation},{validation},0 (documents for training, validation, test)"


def check_token_ids(prefix: str, vocab_size: int, flag: str = "--data-path", sample: int = 1 << 20) -> None:
    """Raises UserError if a sample of the tokens has one outside the vocabulary: data of another tokenizer."""
    index = read_index(prefix, flag)
    tokens = numpy.memmap(prefix + ".bin", index.dtype, "r", 0, (index.tokens,))
    windows = 64
    width = max(1, sample // windows)
    if index.tokens <= sample:
        starts = [0]
        width = index.tokens
    else:
        starts = [(index.tokens - width) * i // (windows - 1) for i in range(windows)]
    highest = max(int(tokens[start : start + width].max()) for start in starts)
    lowest = min(int(tokens[start : start + width].min()) for start in starts)
    if highest >= vocab_size or lowest < 0:
        raise UserError(
            f"{flag} {prefix}: holds the token {highest if highest >= vocab_size else lowest}, but the tokenizer has "
            f"the tokens 0 to {vocab_size - 1}; give the --tokenizer-model the data was made with, or make it again"
        )


def check_index_cache(prefix: str, cache_path: str | None, flag: str = "--data-path") -> None:
    """Raises UserError if Megatron's cached sample indices cannot be written, or are older than the data.

    Megatron finds a cached index by path, split and sequence length, not by content: after the data were made again it
    would silently use document numbers and offsets of the old ones.
    """
    folder = _cache_folder(prefix, cache_path)
    written = os.path.getmtime(prefix + ".idx")
    for path in sorted(folder.glob("*-description.txt")) if folder.is_dir() else []:
        try:
            described = json.loads(path.read_text()).get("dataset_path")
        except (OSError, ValueError, AttributeError):
            continue
        if described == prefix and path.stat().st_mtime < written:
            raise UserError(f"{flag} {prefix}: the index cache is older than the data; delete it: rm -r {folder}")
    if folder.is_dir() and any(folder.glob("*_index.npy")):
        return  # it may be all that the run needs; if not, index_cache.build says so
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        where = f"--data-cache-path {cache_path}" if cache_path else f"{flag} {prefix}"
        raise UserError(
            f"{where}: Megatron cannot write its index cache below {existing}; add --data-cache-path with a writable "
            "folder that all nodes see"
        )


def _cache_folder(prefix: str, cache_path: str | None) -> Path:
    return Path(cache_path) if cache_path else Path(prefix, "cache", "GPTDataset_indices")


def check_cached_arrays(folder: Path) -> None:
    """Raises UserError if an array of Megatron's index cache is cut off: it takes any file of the right name for a
    finished one, also what a run left that was killed while it wrote.
    """
    for path in sorted(folder.glob("*_index.npy")):
        problem = _damage_of_array(path)
        if problem is not None:
            raise UserError(
                f"{path}, part of the index cache, {problem}; unless another run is writing it now, delete the cache, "
                f"it is made again: rm -r {folder}"
            )


def _damage_of_array(path: Path) -> str | None:
    """What is wrong with a .npy file by its header and size, None for nothing."""
    try:
        with open(path, "rb") as stream:
            version = numpy.lib.format.read_magic(stream)
            read_header = {
                (1, 0): numpy.lib.format.read_array_header_1_0,
                (2, 0): numpy.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(stream)
            expected = stream.tell() + math.prod(shape) * dtype.itemsize
    except FileNotFoundError:
        return None  # deleted meanwhile: it is made again
    except (OSError, ValueError, KeyError):
        return "is not an array of numbers"
    size = path.stat().st_size
    return None if size == expected else f"is cut off or damaged, {size} bytes instead of {expected}"


def check_data_files(args: argparse.Namespace) -> list["_Source"]:
    """Checks that the tokenizer's files and the datasets are there and can be read, which takes neither torch nor
    Megatron.

    Args:
        args: Megatron's parsed namespace, or what it says about data and tokenizer.

    Returns:
        The datasets; none for mock data.

    Raises:
        UserError: with the flag, its value and the remedy.
    """
    check_tokenizer(
        getattr(args, "tokenizer_type", None),
        getattr(args, "tokenizer_model", None),
        getattr(args, "vocab_size", None),
        getattr(args, "vocab_file", None),
        getattr(args, "merge_file", None),
    )
    sources = _data_sources(args)
    for source in sources:
        for where, prefix in source.prefixes:
            if not is_remote(prefix):
                read_index(prefix, where)
    return sources


def is_remote(prefix: str) -> bool:
    """Whether a dataset lies in an object store, whose files are not checked."""
    return prefix.startswith(("s3://", "msc://"))


def check_data_arguments(args: argparse.Namespace) -> None:
    """Checks what Megatron's flags say about data and tokenizer, before Megatron initialises.

    Args:
        args: Megatron's parsed namespace.

    Raises:
        UserError: with the flag, its value and the remedy.
    """
    sources = check_data_files(args)
    _check_full_validation(args, sources)
    if not sources:
        return
    sequence_length = getattr(args, "seq_length", None)
    if not sequence_length:
        raise UserError("--seq-length is missing; add e.g. --seq-length 1024")
    evaluates = bool(getattr(args, "eval_iters", None)) or bool(getattr(args, "full_validation", False))
    skips_training = bool(getattr(args, "skip_train", False))
    vocab_size = build_tokenizer(args).vocab_size
    cache_path, cache_folders = getattr(args, "data_cache_path", None), set()
    for source in sources:
        for where, prefix in source.prefixes:
            if is_remote(prefix):
                continue
            if source.part == TRAIN or evaluates:
                length = sequence_length
            else:
                length = 0  # not drawn from, but Megatron opens it and needs a token
            check_dataset(prefix, length, source.split, evaluates, where, needs_training=not skips_training)
            check_token_ids(prefix, vocab_size, where)
            check_index_cache(prefix, cache_path, where)
            cache_folders.add(_cache_folder(prefix, cache_path))
        if not evaluates and len(source.prefixes) > 1:
            _check_unused_parts(source)
    if evaluates:
        _check_validation(sources)
    for folder in sorted(cache_folders):
        check_cached_arrays(folder)


def _check_validation(sources: Sequence["_Source"]) -> None:
    """Megatron evaluates at the end at the latest, and without validation data the run would be lost there."""
    split = sources[0].split
    if split is None and not any(source.part == VALIDATION for source in sources):
        raise UserError("--valid-data-path is missing: a part for validation; add it, or use --eval-iters 0")
    if split is not None and VALIDATION not in split_bounds(split, 1):
        raise UserError(f"--split {split}: leaves nothing to validation; use e.g. --split 99,1,0, or --eval-iters 0")


def _check_full_validation(args: argparse.Namespace, sources: Sequence["_Source"]) -> None:
    """Megatron's full validation takes several validation sets, and falls over at the first evaluation without them;
    several sets without full validation it does not know.
    """
    pair = ("full_validation", "multiple_validation_sets")
    given = [name for name in pair if getattr(args, name, False)]
    if len(given) == 1:
        other = next(name for name in pair if name not in given)
        raise UserError(f"{_flag(given[0])}: Megatron takes it only with {_flag(other)}; add that, or drop this flag")
    if not given:
        return
    if not any(source.part == VALIDATION for source in sources):
        raise UserError("--full-validation: needs a dataset of its own to go through; add --valid-data-path PREFIX…")
    if any(source.part == TEST for source in sources):
        raise UserError("--full-validation: Megatron cannot evaluate test data beside it; drop --test-data-path")


def _check_unused_parts(source: "_Source") -> None:
    """Without an evaluation Megatron builds no sample of a blend's validation part, and cannot load that."""
    if source.split is None and source.part != TRAIN:
        where = source.prefixes[0][0].removesuffix(":")
        raise UserError(f"{where}: with --eval-iters 0 Megatron cannot load a {source.part} blend; leave it out")
    if source.split is not None and set(split_bounds(source.split, 1)) - {TRAIN}:
        raise UserError(
            f"--split {source.split}: with --eval-iters 0 Megatron cannot load a blend's validation and test parts; "
            "use --split 1,0,0"
        )


@dataclass(frozen=True)
class _Source:
    """The datasets that serve one purpose first, and how they are split (None: not at all)."""

    prefixes: list[tuple[str, str]]  # where each was named (a flag; a file and its line), and the prefix
    split: str | None
    part: str


def _data_sources(args: argparse.Namespace) -> list[_Source]:
    """The datasets that the flags name, read as Megatron reads them; empty for mock data."""
    flags = ["data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path"]
    given = {name: getattr(args, name, None) for name in [*flags, "per_split_data_args_path"]}
    shared = [name for name in ("data_path", "data_args_path") if given[name] is not None]
    separate = [name for name in flags[2:] if given[name] is not None]
    per_split = ["per_split_data_args_path"] if given["per_split_data_args_path"] is not None else []
    kinds = [[name] for name in shared] + ([separate] if separate else []) + ([per_split] if per_split else [])
    if getattr(args, "mock_data", False):
        if kinds:
            raise UserError(f"--mock-data: contradicts {_flag(kinds[0][0])}; drop one of them")
        return []
    if not kinds:
        raise UserError(
            "--data-path is missing; add --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"
        )
    if len(kinds) > 1:
        raise UserError(f"{_flag(kinds[0][0])} and {_flag(kinds[1][0])}: two ways to name the data; drop one of them")
    split = getattr(args, "split", None)
    if shared:
        if given["data_path"] is not None:
            prefixes = _prefixes("--data-path", given["data_path"])
            split = split or "969, 30, 1"  # what Megatron falls back to
        else:
            prefixes = read_blend_file("--data-args-path", given["data_args_path"])
            if split is None:
                raise UserError(f"--data-args-path {given['data_args_path']}: needs shares; add e.g. --split 99,1,0")
        return [_Source(prefixes, split, TRAIN)]
    if split is not None:
        raise UserError(f"--split {split}: contradicts {_flag(kinds[0][0])}, which names each part; drop --split")
    if per_split:
        named = read_blends_file("--per-split-data-args-path", given["per_split_data_args_path"])
        missing = f"--per-split-data-args-path {given['per_split_data_args_path']}: names no training data; add some"
    else:
        flags = {part: f"--{key}-data-path" for part, key in _KEYS.items()}
        lists = {part: given[f"{key}_data_path"] for part, key in _KEYS.items()}
        named = {part: _prefixes(flags[part], words) for part, words in lists.items() if words is not None}
        missing = "--train-data-path names no training data; add --train-data-path PREFIX"
    if TRAIN not in named and not getattr(args, "skip_train", False):
        raise UserError(missing)
    return [_Source(prefixes, None, part) for part, prefixes in named.items()]


_KEYS = {TRAIN: "train", VALIDATION: "valid", TEST: "test"}


def _flag(attribute: str) -> str:
    return "--" + attribute.replace("_", "-")


def _prefixes(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """The prefixes among a flag's weights and prefixes, each with the flag."""
    if not words:
        raise UserError(f"{flag}: names no data; add a prefix made by tools/preprocess_data.py")
    return _without_weights([(flag, word) for word in words], flag, f"{flag} {' '.join(words)}:")


def read_blend_file(flag: str, path: str) -> list[tuple[str, str]]:
    """The prefixes of a blend file (words: prefixes, or a weight before each), each with its place in the file.

    Raises:
        UserError: the file cannot be read or is empty, a weight is missing or none, with the line.
    """
    lines = _read_text(flag, path).splitlines()
    words = [(f"{flag} {path}, line {i}:", word) for i, line in enumerate(lines, 1) for word in line.split()]
    for where, word in words:
        if word.startswith("#"):
            raise UserError(f"{where} {word}: no comments, Megatron reads each word as a weight or a prefix; drop it")
    if not words:
        raise UserError(f"{flag} {path}: the file is empty; write one with tools/blend.py")
    return _without_weights(words, flag)


def read_blends_file(flag: str, path: str) -> dict[str, list[tuple[str, str]]]:
    """The same for a JSON object of blends for train, valid and test (null: none), by the part they serve."""
    try:
        named = json.loads(_read_text(flag, path))
        lists = {part: named[key] for part, key in _KEYS.items()}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f"{flag} {path}: not a JSON object with the keys train, valid and test; write one, with null for a part "
            "without data"
        ) from None
    blends = {}
    for part, given in lists.items():
        where = f"{flag} {path}, {_KEYS[part]}:"
        words = given.split() if isinstance(given, str) else given
        if words is None:
            continue
        if not isinstance(words, list) or not all(isinstance(word, str | int | float) for word in words) or not words:
            raise UserError(f"{where} {given!r}: neither null nor a blend; write weights and prefixes, or null")
        blends[part] = _without_weights([(where, str(word)) for word in words], flag)
    return blends


def _without_weights(words: Sequence[tuple[str, str]], flag: str, shown: str = "") -> list[tuple[str, str]]:
    """The prefixes of a blend, where all or none have a weight before them, as Megatron reads it.

    Args:
        words: where each word stands, and the word.
        shown: what a message begins with, instead of the place and the word.
    """
    weights = [_as_number(word) for _, word in words]
    if len(words) == 1 or not any(weight is not None for weight in weights):
        return list(words)
    for i, ((where, word), weight) in enumerate(zip(words, weights, strict=True)):
        is_last_weight = weight is not None and i == len(words) - 1
        if (weight is None) == (i % 2 == 0) or is_last_weight:
            example = f"{flag} 0.7 web 0.3 code" if shown else "0.7 web 0.3 code"
            raise UserError(f"{shown or f'{where} {word}:'} give prefixes, or a weight before each, e.g. {example}")
    for (where, word), weight in zip(words[::2], weights[::2], strict=True):
        if not 0 < weight < math.inf:
            problem = "the weights must be positive; change them, or leave out a dataset that shall give nothing"
            raise UserError(f"{shown or f'{where} {word}:'} {problem}")
    if not 0 < min(weights[::2]) / sum(weights[::2]) <= 1:  # as Megatron divides them
        raise UserError(f"{shown or words[0][0]} the weights are too large or too far apart; give shares of 1")
    return list(words[1::2])


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read_text(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"{flag} {path}: {reason}; check the path") from None


def dataset_documents(prefix: str, split: str, part: str, flag: str = "--data-path") -> list[list[int]]:
    """The tokens of a dataset's documents in one part of a split, in their order.

    Args:
        prefix: the path without .bin and .idx.
        split: as ``--split``.
        part: :data:`TRAIN`, :data:`VALIDATION` or :data:`TEST`.
        flag: that named the prefix, for messages.

    Raises:
        UserError: a damaged dataset, or no document in that part.
    """
    index = read_index(prefix, flag)
    begin, end = split_bounds(split, index.sequences).get(part, (0, 0))
    if begin == end:
        raise UserError(f"{flag} {prefix}: --split {split} leaves no document to the {part} part; take another part")
    tokens = numpy.memmap(prefix + ".bin", index.dtype, "r", 0, (index.tokens,))
    starts = (index.pointers[begin:] // index.itemsize).tolist() + [index.tokens]
    return [tokens[starts[i] : starts[i + 1]].tolist() for i in range(end - begin)]
