"""Reads the documents of text, JSON-lines and Parquet files.

Every tool gets the same texts from the same file. These functions serve the tools alone; checks.py checks what a
training is given. torch and Megatron are not needed, and no more than a document or a block is held, but for a text
file, which is one document.
"""

from __future__ import annotations

import argparse
import bz2
import errno
import fnmatch
import functools
import gzip
import io
import json
import lzma
import os
import posixpath
import shlex
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

from megatron_moa.errors import UserError, one_line, why_absent

JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
DECOMPRESSORS: dict[str, Callable[[BinaryIO], BinaryIO]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PARQUET_ENDING = ".parquet"
_NOT_READ = tuple(".zst .zstd .lz4 .lzma .7z .zip .rar .tar .tgz .tbz .tbz2 .txz".split())
_PARQUET_ROWS = 1024  # read at once
_JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", float: "a number"}


@dataclass(frozen=True)
class TextFile:
    """One input file: a document of its own, JSON lines or Parquet rows with a document each.

    Attributes:
        size: of the file, in bytes; 0 for a pipe.
        json_lines, parquet: what the file is; neither for a text file.
        flag: that named the file, for messages.
        key: of the text in a JSON line; the text's column in Parquet.
        errors: ``strict``, or ``replace`` for text that is not UTF-8.
        has_reading_flags: whether the command has the flags of :func:`add_reading_flags`, for messages.
    """

    path: str
    size: int
    json_lines: bool
    parquet: bool = False
    flag: str = "--input"
    key: str = "text"
    errors: str = "strict"
    has_reading_flags: bool = True

    @property
    def compressed(self) -> bool:
        """Whether its bytes are not the text's: such a file can only be read from its beginning."""
        return self.path.lower().endswith(tuple(DECOMPRESSORS))

    @property
    def named(self) -> str:
        """The flag and the path, for messages."""
        return f"{self.flag} {self.path}"


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which files to read, and how."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, JSON-lines files, Parquet files, or folders with --glob",
    )
    group.add_argument("--glob", metavar="PATTERN", help="which files of the folders to take, e.g. '**/*.py' (quoted)")
    group.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="files of the folders to leave out, e.g. 'test/*'"
    )
    add_reading_flags(group)


def add_reading_flags(group: Any) -> None:
    """Adds the flags that say how files become texts, to a parser or a group of its flags."""
    group.add_argument(
        "--json-key",
        metavar="KEY",
        help="every input is JSON lines and KEY holds the text (in Parquet the column KEY); without this flag files "
        f"named {', '.join(JSON_ENDINGS)} (compressed, too: {', '.join(DECOMPRESSORS)}) are JSON lines with the key "
        f"'text', those named {PARQUET_ENDING} have a column 'text', all others are plain text",
    )
    group.add_argument(
        "--errors", choices=["strict", "replace"], default="strict", help="what to do with text that is not UTF-8"
    )


def find_text_files(
    inputs: Sequence[str],
    glob: str | None = None,
    exclude: Sequence[str] = (),
    json_key: str | None = None,
    errors: str = "strict",
    compressed: bool = False,
) -> list[TextFile]:
    """Returns the input files in the order given, the files of a folder by name.

    Raises:
        UserError: a file cannot be read, or is compressed without ``compressed``.
    """
    files = []
    for name in inputs:
        if os.path.isdir(name):
            files += [_text_file(path, json_key, errors) for path in _files_of_folder(name, glob, exclude)]
        elif os.path.exists(name) and not os.path.isfile(name):
            raise UserError(f"--input {name}: not a regular file; write its content to a file first")
        elif os.path.isfile(name) and os.path.getsize(name) == 0:
            raise UserError(f"--input {name}: the file is empty; leave it out or put text into it")
        else:
            files.append(_text_file(name, json_key, errors))
    for file in files:
        _check_readable(file)
        if file.compressed and not compressed:
            raise UserError(
                f"{file.named}: compressed, and a sample is drawn from all over the text; decompress some of it "
                "first, e.g. gzip -dk"
            )
    _check_named_once(files)
    if not sum(file.size for file in files):
        raise UserError(f"--input {' '.join(inputs)}: all {len(files)} files are empty; give files with text")
    return files


def check_not_overwritten(inputs: Iterable[str], flag: str, targets: Iterable[str]) -> None:
    """Raises UserError where a file that is read is one of those that will be written, under any name."""
    written = {(found.st_dev, found.st_ino): target for target in targets if (found := _stat(target)) is not None}
    for path in inputs:
        found = _stat(path)
        if found is not None and (target := written.get((found.st_dev, found.st_ino))) is not None:
            raise UserError(f"{flag} {target}: is the file {path} that is read; choose another name")


def _check_named_once(files: Iterable[TextFile]) -> None:
    """Raises UserError for a file that is there twice, through links as well.

    Hard links pass: each is a file of its own, and on some file systems numbers do not tell files apart.
    """
    paths: dict[str, str] = {}
    real_folder = functools.cache(os.path.realpath)
    for file in files:
        real = _real_path(file.path, real_folder)
        if real in paths:
            raise UserError(
                f"{file.named}: the same file as {paths[real]}; name it once, or leave one out with --exclude"
            )
        paths[real] = file.path


def _real_path(path: str, real_folder: Callable[[str], str]) -> str:
    """A file's path without links; each folder is looked up once if ``real_folder`` remembers."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(real_folder(folder), name)


def _stat(path: str) -> os.stat_result | None:
    return os.stat(path) if os.path.exists(path) else None


def _files_of_folder(folder: str, glob: str | None, exclude: Sequence[str]) -> list[str]:
    if not glob:
        raise UserError(f"--input {folder}: a folder; say which of its files to take, e.g. --glob '**/*.txt'")
    parts = posixpath.normpath(glob).split("/")
    if parts[0] in ("", ".", ".."):
        raise UserError(f"--glob {glob}: not below the folder; give a pattern relative to it, e.g. '**/*.txt'")
    found = sorted(_matches(folder, parts, exclude))
    kept = [name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)]
    if not found:
        raise UserError(
            f"--glob {glob}: matches no file in {folder}{' but what --exclude names' if exclude else ''}; "
            "'**/*.txt' reaches into subfolders, '*.txt' does not"
        )
    if not kept:
        raise UserError(f"--exclude {' '.join(exclude)}: leaves none of the {len(found)} files of --glob {glob}")
    return [os.path.join(folder, name) for name in _each_once(folder, kept)]


def _each_once(folder: str, names: Iterable[str]) -> list[str]:
    """One name for each file: that without links if it is among them, or else the first."""
    own = os.path.realpath(folder)
    kept: dict[str, str] = {}
    real_folder = functools.cache(os.path.realpath)
    for name in names:
        real = _real_path(os.path.join(folder, name), real_folder)
        if real not in kept or real == os.path.join(own, name):
            kept[real] = name
    return sorted(kept.values())


def _matches(folder: str, parts: Sequence[str], exclude: Sequence[str]) -> Iterator[str]:
    """Yields the files below a folder that match the parts of a pattern, relative to it.

    Folders come before links to folders. A link is not followed back up, nor to a folder in which the same rest of the
    pattern was looked for already, so that folders linked to each other do not multiply.

    Raises:
        UserError: what may hold such files cannot be read, or is a broken link with the name of one, and no pattern of
            ``exclude`` names it.
    """
    none_above: frozenset[tuple[int, int]] = frozenset()
    folders = deque([("", _places({0}, parts), none_above, False)])
    links: deque[tuple[str, frozenset[int], frozenset[tuple[int, int]], bool]] = deque()
    searched = set()
    while folders or links:
        below, places, above, linked = (folders or links).popleft()
        try:
            found = os.stat(os.path.join(folder, below))
            own = (found.st_dev, found.st_ino)
            if linked and (own in above or (own, places) in searched):
                continue
            entries = sorted(os.listdir(os.path.join(folder, below)))
        except OSError as error:
            _check_excluded(folder, below, exclude, error)
            continue
        searched.add((own, places))
        for entry in entries:
            after = _places_after(entry, places, parts)
            matches, after = len(parts) in after, after - {len(parts)}
            if not after and not matches:
                continue
            name = f"{below}{entry}"
            path = os.path.join(folder, name)
            try:
                mode = os.stat(path).st_mode
            except OSError as error:
                if matches or not _is_broken(error):
                    _check_excluded(folder, name, exclude, error)
                continue
            if after and stat.S_ISDIR(mode) and not _leaves_out(exclude, name):
                is_link = os.path.islink(path)
                (links if is_link else folders).append((f"{name}/", after, above | {own}, linked or is_link))
            elif matches and stat.S_ISREG(mode):
                yield name


def _leaves_out(exclude: Sequence[str], folder: str) -> bool:
    """Whether a pattern names a folder: as ``name``, ``name/`` or ``name/*``."""
    return any(
        fnmatch.fnmatch(folder, pattern) or fnmatch.fnmatch(folder, pattern.rstrip("*").removesuffix("/"))
        for pattern in exclude
    )


def _is_broken(error: OSError) -> bool:
    """Whether it says that a link leads nowhere."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def _check_excluded(folder: str, name: str, exclude: Sequence[str], error: OSError) -> None:
    """Raises UserError for what cannot be looked at below a folder, unless it is to be left out."""
    name = name.rstrip("/")
    path = os.path.join(folder, name)
    if name and _leaves_out(exclude, name):
        return
    reason = "a broken link" if isinstance(error, FileNotFoundError) and os.path.islink(path) else error.strerror
    remedy = (
        f"mend that, or leave it out with --exclude {shlex.quote(escape(name))}" if name else "change its permissions"
    )
    raise UserError(f"--input {path}: {reason}; {remedy}")


def _places(places: set[int], parts: Sequence[str]) -> frozenset[int]:
    """Adds the places after each ``**`` but the last part, as it may stand for no folder."""
    for place in range(len(parts) - 1):
        if place in places and parts[place] == "**":
            places.add(place + 1)
    return frozenset(places)


def _places_after(name: str, places: Iterable[int], parts: Sequence[str]) -> frozenset[int]:
    """Which parts of a pattern may come after a name that is at one of these places.

    ``len(parts)`` is among them if the pattern may end there.
    """
    after = set()
    for place in places:
        if parts[place] == "**":
            after |= {place, place + 1} if place == len(parts) - 1 else {place}
        elif fnmatch.fnmatchcase(name, parts[place]):
            after.add(place + 1)
    return _places(after, parts)


def text_file(
    path: str, flag: str, json_key: str | None = None, errors: str = "strict", has_reading_flags: bool = True
) -> TextFile:
    """A file that is read once from its beginning, a pipe as well. Raises UserError if it cannot be read."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: a folder; name the files in it")
    file = _text_file(path, json_key, errors, flag, has_reading_flags)
    _check_readable(file)
    return file


def _text_file(
    path: str, json_key: str | None, errors: str, flag: str = "--input", has_reading_flags: bool = True
) -> TextFile:
    name, ending = os.path.splitext(path.lower())
    name = name if ending in DECOMPRESSORS else path.lower()
    parquet = name.endswith(PARQUET_ENDING)
    json_lines = not parquet and (json_key is not None or name.endswith(JSON_ENDINGS))
    size = os.path.getsize(path) if os.path.exists(path) else 0
    key = "text" if json_key is None else json_key
    return TextFile(path, size, json_lines, parquet, flag, key, errors, has_reading_flags)


def _check_readable(file: TextFile) -> None:
    if not os.path.exists(file.path):
        what = "no such file or folder" if file.flag == "--input" else "no such file"
        raise UserError(f"{file.named}: {why_absent(file.path, what)}; check the path")
    if not os.access(file.path, os.R_OK):
        raise UserError(f"{file.named}: not readable; change its permissions (chmod +r) or leave it out")
    name, ending = os.path.splitext(file.path.lower())
    ending = os.path.splitext(name)[1] if ending in DECOMPRESSORS else ending
    if ending in _NOT_READ:
        packed = " ".join(DECOMPRESSORS)
        raise UserError(f"{file.named}: {ending} cannot be read here; unpack it, or compress each file to {packed}")
    if file.parquet:
        if file.compressed:
            raise UserError(f"{file.named}: Parquet compresses its columns itself; decompress the file first")
        _pyarrow(file)


@contextmanager
def _reading(file: TextFile) -> Iterator[None]:
    """Turns what goes wrong with a file while it is read into a UserError."""
    try:
        yield
    except MemoryError:
        raise too_large(file) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file.named}: cut off or damaged ({error}); copy or compress it again") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{file.named}: {reason}; check the file and its permissions") from None


def too_large(file: TextFile) -> UserError:
    """Returns the error for a document that memory does not hold."""
    return UserError(f"{file.named}: memory does not hold a document of it; cut it into smaller ones")


@contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text's bytes as a stream, decompressed if the name says so, and the file's own."""
    open_text = DECOMPRESSORS.get(os.path.splitext(path)[1].lower())
    with open(path, "rb") as file:
        if open_text is None:
            yield file, file
        else:
            with open_text(file) as stream:
                yield stream, file


def texts(file: TextFile, start: int = 0, end: int | None = None, lines: bytes | None = None) -> Iterator[str]:
    """Yields the text of each document; blank JSON lines are none.

    Args:
        start, end: bytes between which JSON lines begin, or row groups of Parquet; default: the whole file. A text
            file is not cut.
        lines: what lies from ``start`` on in a compressed file of JSON lines, which cannot be read from its middle.

    Raises:
        UserError: the file, or a row of it, cannot be read; the row's number is named.
    """
    if file.parquet:
        yield from _parquet_texts(file, start, end)
    elif not file.json_lines:
        with _reading(file), _opened(file.path) as (stream, _):
            yield without_bom(decode(stream.read(), file))
    elif end is None:
        with _reading(file), _opened(file.path) as (stream, _):
            for number, line in enumerate(stream, 1):
                yield from _json_text(line, file, lambda number=number: number)
    else:
        found = lines_between(file, start, end) if lines is None else _lines_of(lines, start)
        with _reading(file):
            for offset, line in found:
                yield from _json_text(line, file, functools.partial(line_number, file, offset))


def lines_between(file: TextFile, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yields ``(byte offset, line)`` for the lines that begin in ``[start, end)``.

    Ranges that follow each other yield each line exactly once.
    """
    with _reading(file), open(file.path, "rb") as stream:
        offset = start
        if start:
            stream.seek(start - 1)
            offset += len(stream.readline()) - 1  # the line that began before belongs to the range before
        while offset < end and (line := stream.readline()):
            yield offset, line
            offset += len(line)


def blocks_of_lines(file: TextFile, size: int) -> Iterator[tuple[int, bytes, int]]:
    """Yields ``(byte offset, whole lines of about size bytes, bytes read of the file for them)``: for a
    compressed file, which can only be read from its beginning.
    """
    with _reading(file), _opened(file.path) as (stream, compressed):
        offset = position = 0
        rest = b""
        while block := stream.read(size):
            lines, newline, rest_of_block = block.rpartition(b"\n")
            if newline:
                lines = rest + lines + newline
                yield offset, lines, compressed.tell() - position
                offset, position, rest = offset + len(lines), compressed.tell(), rest_of_block
            else:
                rest += block
        yield offset, rest, os.path.getsize(file.path) - position


def _lines_of(block: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yields ``(byte offset, line)`` for the lines of a block.

    The block begins at ``offset``, in bytes of its file's text.
    """
    for line in io.BytesIO(block):
        yield offset, line
        offset += len(line)


def line_number(file: TextFile, offset: int) -> int:
    """Returns the number (from 1) of the line that begins at a byte offset.

    Only errors need the number, so only they count lines.
    """
    count = 1
    if offset == 0:
        return count
    with _opened(file.path) as (stream, _):
        while offset > 0 and (block := stream.read(min(offset, 1 << 24))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def decode(data: bytes, file: TextFile, number: Callable[[], int] = lambda: 1, rows: str = "line") -> str:
    """UTF-8 bytes as text, byte for byte: no newline is translated.

    Args:
        number: of the line where the bytes begin, for messages.
        rows: what is counted.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8", file.errors)
    except UnicodeDecodeError as error:
        line = number() + data.count(b"\n", 0, error.start) * (rows == "line")
        place = error.start - (data.rfind(b"\n", 0, error.start) + 1) * (rows == "line")
        raise UserError(
            f"{file.named}: {rows} {line} is not UTF-8 (byte {place}); convert the file to UTF-8{_or_replace(file)}"
        ) from None


def without_bom(text: str) -> str:
    """A file's text without the byte-order mark that some editors put before it."""
    return text.removeprefix("\ufeff")


def _or_replace(file: TextFile) -> str:
    return ", or use --errors replace" if file.has_reading_flags else ""


def _json_text(line: bytes, file: TextFile, number: Callable[[], int]) -> Iterator[str]:
    """Yields the text of one JSON line; nothing for a blank line.

    Raises:
        UserError: with file and line number.
    """
    source = without_bom(decode(line, file, number))  # in any line: files with marks may have been put together
    if not source.strip():
        return
    example = f'{{{json.dumps(file.key, ensure_ascii=False)}: "…"}}'
    try:
        # Integers are read as floats: Python refuses to read integers of more than 4300 digits.
        record = json.loads(source, parse_int=float)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise UserError(
            f"{file.named}: line {number()} is not JSON ({reason}); each line must be one object such as {example}"
        ) from None
    if not isinstance(record, dict):
        problem = f"holds {_kind(record)}, not an object"
    elif file.key not in record:
        names = ", ".join(repr(name[:40]) for name in list(record)[:8])
        problem = f"has no key {file.key!r} (it has {names or 'none'})"
    elif not isinstance(record[file.key], str):
        problem = f"has {_kind(record[file.key])} under the key {file.key!r}, not text"
    else:
        yield _without_surrogates(record[file.key], file, number)
        return
    remedy = ", or name the text's key with --json-key" if file.has_reading_flags else ""
    raise UserError(f"{file.named}: line {number()} {problem}; write {example}{remedy}")


def _kind(value: object) -> str:
    return "null" if value is None else _JSON_KINDS[type(value)]


def _without_surrogates(text: str, file: TextFile, number: Callable[[], int]) -> str:
    """JSON can escape half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        if file.errors == "replace":
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise UserError(
            f"{file.named}: line {number()} holds half a surrogate pair, which is not Unicode text; "
            f"repair it{_or_replace(file)}"
        ) from None
    return text


def _pyarrow(file: TextFile) -> Any:
    """The module pyarrow with its part for Parquet. Raises UserError without it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file.named}: Parquet needs pyarrow; pip install pyarrow, or write the texts as JSON lines"
        ) from None
    return pyarrow


@contextmanager
def _opened_parquet(file: TextFile) -> Iterator[Any]:
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            yield parquet
    except MemoryError:  # pyarrow's own are such, too
        raise too_large(file) from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{file.named}: not Parquet, or damaged ({reason}); copy or write it again") from None


def row_groups(file: TextFile) -> int:
    """How many parts a Parquet file has that can be read apart. Raises UserError if it is damaged."""
    with _opened_parquet(file) as parquet:
        return parquet.metadata.num_row_groups


def _parquet_texts(file: TextFile, start: int, end: int | None) -> Iterator[str]:
    """Yields the texts of the row groups ``start`` to ``end - 1``.

    Raises:
        UserError: with file and row number.
    """
    types = _pyarrow(file).types
    with _opened_parquet(file) as parquet:
        groups = range(start, parquet.metadata.num_row_groups if end is None else end)
        _check_column(file, parquet.schema_arrow, types)
        number = 1 + sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        # No threads: the caller may be one of many processes.
        batches = parquet.iter_batches(_PARQUET_ROWS, list(groups), [file.key], use_threads=False)
        for batch in batches:
            column = batch.column(file.key)  # not the first: a.b also names what is called b within a
            if types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for data in column.cast("large_binary").to_pylist():  # as bytes: Parquet files can hold invalid UTF-8
                if data is None:
                    remedy = ", or name another column with --json-key" if file.has_reading_flags else ""
                    raise UserError(
                        f"{file.named}: row {number} has null in the column {file.key!r}, not text; fill it{remedy}"
                    )
                yield decode(data, file, lambda row=number: row, rows="row")
                number += 1


def _check_column(file: TextFile, schema: Any, types: Any) -> None:
    remedy = "name the text's column with --json-key" if file.has_reading_flags else "name the text's column so"
    if file.key not in schema.names:
        names = ", ".join(repr(name[:40]) for name in schema.names[:8])
        raise UserError(f"{file.named}: has no column {file.key!r} (it has {names or 'none'}); {remedy}")
    if schema.names.count(file.key) > 1:
        raise UserError(f"{file.named}: has {schema.names.count(file.key)} columns {file.key!r}; rename all but one")
    kind = schema.field(file.key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{file.named}: its column {file.key!r} holds {kind}, not text; {remedy}")


def read_documents(
    path: Path,
    flag: str = "--text",
    json_key: str | None = None,
    errors: str = "strict",
    has_reading_flags: bool = False,
) -> list[str]:
    """Returns the documents of a file that have any text.

    A text file is one document; so is a JSON line or a row of Parquet.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    file = text_file(str(path), flag, json_key, errors, has_reading_flags)
    documents = [text for text in texts(file) if text]
    if not documents:
        raise UserError(f"{file.named}: is empty; give a file with text")
    return documents
