"""Makes a tokenizer and a dataset of real text that a fresh machine can get."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from megatron_moa.errors import UserError, one_line
from megatron_moa.research.study.values import Bound, Count, filled, fitting

_TOOLS = Path(__file__).resolve().parents[3] / "tools"
# Not in the text: Python's tests, installed packages, tables of data.
LEFT_OUT = ("test/*", "*/test*/*", "*/idle_test/*", "*-packages/*", "encodings/*", "pydoc_data/*")
_DOCUMENT = 4096  # characters after which a dictionary's next entry begins a new document
# As tools/train_tokenizer.py has it.
_Vocabulary = Annotated[
    int, Bound(lambda size: 260 <= size <= 10_000_000, "give 260 (the 256 bytes, and 4) to 10000000")
]


@dataclass(frozen=True)
class _Own:
    data: str
    tokenizer: str


@dataclass(frozen=True)
class _Python:
    source: str
    vocabulary: _Vocabulary
    glob: str = "**/*.py"


@dataclass(frozen=True)
class _Deb:
    source: str
    vocabulary: _Vocabulary
    url: str
    sha256: str
    member: str
    every: Count = 1


_SOURCES = {"python": _Python, "deb": _Deb}


@dataclass(frozen=True)
class Corpus:
    """A dataset and its tokenizer.

    Attributes:
        data: prefix of the .bin and .idx files.
        tokenizer: a sentencepiece model.
    """

    data: Path
    tokenizer: Path

    @cached_property
    def _vocabulary(self) -> list[str]:
        import sentencepiece  # here: what else is in this module serves machines without it

        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))
        return tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding, as Megatron pads it (``--make-vocab-size-divisible-by`` 128)."""
        return -(-len(self._vocabulary) // 128) * 128

    def content(self) -> dict[str, Any]:
        """Tells it from other text under its name: the bytes of its tokens, and a hash of the vocabulary."""
        digest = hashlib.sha256("\0".join(self._vocabulary).encode("utf-8", "surrogatepass")).hexdigest()
        return {"bytes": os.path.getsize(f"{self.data}.bin"), "vocabulary": digest[:16]}

    def flags(self) -> list[str]:
        """Of pretrain_gpt_moa.py."""
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.tokenizer)]
        return [*tokenizer, "--data-path", str(self.data)]


def check_settings(where: str, settings: Mapping[str, Any]) -> _Own | _Python | _Deb:
    """The settings of a corpus, see :func:`make_corpus`.

    Raises:
        UserError: a key or a value that does not fit.
    """
    if "data" in settings or "tokenizer" in settings:
        return filled(_Own, where, settings)
    if "source" not in settings:
        raise UserError(f"{where}: has neither source nor data; give source = 'python', or data and tokenizer")
    source = fitting(f"{where}.source", settings["source"], str)
    if source not in _SOURCES:
        raise UserError(f"{where}.source {source}: unknown; there are {' and '.join(_SOURCES)}")
    return filled(_SOURCES[source], where, settings)


def make_corpus(name: str, settings: Mapping[str, Any], folder: Path) -> Corpus:
    """Makes a corpus, once; a folder that is complete, and of these settings, is left alone.

    Args:
        name: for messages.
        settings: ``data`` and ``tokenizer``, to use what is there (``$NAME`` is of the environment); or ``vocabulary``
            and ``source``: ``python``, the library of this Python (``glob``: some of its files), or ``deb``, a file in
            a Debian package (``url``, ``sha256``, ``member``; ``every`` N: each N-th document of it).
        folder: to write into.

    Raises:
        UserError: settings that are unknown, or not those that a complete folder was made with; or a text that cannot
            be had.
    """
    known = check_settings(f"corpora.{name}", settings)
    if isinstance(known, _Own):
        return Corpus(_own_path(name, "data", known.data), _own_path(name, "tokenizer", known.tokenizer))
    corpus = Corpus(folder / "data", folder / "tokenizer.model")
    done = folder / "complete"
    if done.exists():
        made = done.read_text()  # empty: version 0.1's
        if made and json.loads(made) != settings:
            raise UserError(f"corpora.{name}: {folder} was made with {made}; take another --out, or delete that folder")
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(known, _Python):
        text = ["--input", sysconfig.get_paths()["stdlib"], f"--glob={known.glob}", "--exclude", *LEFT_OUT]
    else:
        documents = folder / "documents.jsonl"
        with documents.open("w", encoding="utf-8") as file:
            for document in islice(_entries(_from_package(name, known)), 0, None, known.every):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        text = ["--input", str(documents)]
    print(f"> corpus {name}: tokenizer and dataset", flush=True)
    tokenizer = ["--vocab-size", str(known.vocabulary), "--output", str(folder / "tokenizer"), "--overwrite"]
    _run(name, "train_tokenizer.py", [*text, *tokenizer], folder)
    dataset = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(corpus.tokenizer)]
    dataset += ["--shuffle-documents", "0", "--output-prefix", str(corpus.data), "--overwrite"]
    _run(name, "preprocess_data.py", [*text, *dataset], folder)
    new = done.with_suffix(".new")
    new.write_text(json.dumps(settings))
    new.rename(done)  # a kill leaves none, or a whole one
    return corpus


def _own_path(name: str, key: str, typed: str) -> Path:
    """A path of the user's, variables of the environment filled in."""
    path = os.path.expandvars(typed)
    file = f"{path}.bin" if key == "data" else path
    tool = "preprocess_data.py" if key == "data" else "train_tokenizer.py"
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        variable = unset[1].strip("{}")
        raise UserError(
            f"corpora.{name}.{key} {typed!r}: {variable} is not set; set it so that this is what tools/{tool} wrote"
        )
    if not Path(file).is_file():
        raise UserError(f"corpora.{name}.{key} {typed!r}: there is no file {file}; give what tools/{tool} wrote")
    return Path(path)


def _run(name: str, tool: str, flags: list[str], folder: Path) -> None:
    log = folder / f"{tool}.log"
    with log.open("w") as output:
        done = subprocess.run([sys.executable, str(_TOOLS / tool), *flags], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"corpora.{name}: {tool} ended with exit code {done.returncode} ({' '.join(last)}); see {log}")


def _from_package(name: str, settings: _Deb) -> str:
    """The text of one file in a Debian package, an ar archive of tar archives."""
    where = f"corpora.{name}.url {settings.url}"
    try:
        with urllib.request.urlopen(settings.url, timeout=60) as response:
            package = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{where}: cannot be fetched ({one_line(error)})") from None
    if hashlib.sha256(package).hexdigest() != settings.sha256:
        raise UserError(f"{where}: is not the file of that sha256")
    position = 8  # behind the ar archive's magic; members have headers of 60 bytes and even sizes
    while position < len(package):
        member, size = package[position : position + 16].decode().strip(), int(package[position + 48 : position + 58])
        if member.startswith("data.tar.xz"):
            content = lzma.decompress(package[position + 60 : position + 60 + size])
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                if settings.member not in archive.getnames():
                    raise UserError(f"corpora.{name}.member {settings.member}: is not in {settings.url}")
                return gzip.decompress(archive.extractfile(settings.member).read()).decode("utf-8", "replace")
        position += 60 + size + size % 2
    raise UserError(f"{where}: has no data.tar.xz")


def _entries(text: str) -> Iterator[str]:
    """A dictionary's entries, several together; an entry begins where a line is not indented."""
    document: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if length >= _DOCUMENT and line[:1].strip():
            yield "".join(document)
            document, length = [], 0
        document.append(line)
        length += len(line)
    yield "".join(document)
