"""Reads and checks a Megatron dataset, PREFIX.bin and PREFIX.idx, without loading it."""

import os
import struct
from dataclasses import dataclass

import numpy

from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.errors import UserError, why_absent

TRAIN, VALIDATION, TEST = "training", "validation", "test"


_MAGIC = b"MMIDIDX\x00\x00"


_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents


_TOKEN_DTYPES = {1: numpy.uint8, 2: numpy.int8, 3: numpy.int16, 4: numpy.int32, 5: numpy.int64, 8: numpy.uint16}
DTYPE_NAMES = frozenset(numpy.dtype(dtype).name for dtype in _TOKEN_DTYPES.values())


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
    """Reads and checks the header of ``prefix.idx`` and the sizes of both files.

    Raises:
        UserError: with what is wrong, the flag and the remedy.
    """
    for ending in (".bin", ".idx"):
        if prefix.endswith(ending):
            raise UserError(f"{flag} {prefix}: a prefix without ending is wanted: {flag} {prefix.removesuffix(ending)}")
    for ending in (".bin", ".idx"):
        path = prefix + ending
        if not os.path.isfile(path):
            near = f"{prefix}_text_document"
            hint = f"did you mean {near}?" if os.path.isfile(near + ending) else "make it with tools/preprocess_data.py"
            raise UserError(f"{flag} {prefix}: {why_absent(path, 'no file')} {path}; check the path, or {hint}")
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
    """Raises UserError if a sample of the tokens has one outside the vocabulary.

    Such data is of another tokenizer.
    """
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
