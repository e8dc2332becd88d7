"""megatron_moa/data/corpus.py: one reader for all tools, exact texts, one-line errors with the row."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_moa.data import corpus
from megatron_moa.errors import UserError
from tools import generate

BOM = b"\xef\xbb\xbf"
ROWS = ["alpha\r\nbeta\n", "", " ", "gamma 😀 \ufeff</s>"]
LINES = (
    b'{"text": "alpha\\r\\nbeta\\n", "n": NaN}\r\n\n{"text": ""}\n  \n{"text": " "}\n'
    b'{"text": "gamma \xf0\x9f\x98\x80 \\ufeff</s>"}'
)


def texts(path: Path, key: str | None = None, errors: str = "strict") -> list[str]:
    return list(corpus.texts(corpus.text_file(str(path), "--text", key, errors)))


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def found_in(folder: Path, glob: str, exclude: Sequence[str] = ()) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in corpus.find_text_files([str(folder)], glob, exclude)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "ndjson", "JSONL", "Json", "NDJSON"])
@pytest.mark.parametrize(
    ("packed", "pack"), [("", bytes), (".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress)]
)
@pytest.mark.parametrize("mark", [b"", BOM])
def test_json_lines_are_read_alike_under_every_name(
    ending: str, packed: str, pack: Callable[[bytes], bytes], mark: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}{packed}"
    path.write_bytes(pack(mark + LINES))
    assert texts(path) == ROWS
    assert corpus.read_documents(path) == [row for row in ROWS if row]
    flags = generate.parse_flags(["--load", "x", "--prompts-file", str(path), "--num-samples", "2"])[0]
    assert generate.read_prompts(flags) == [row for row in ROWS for _ in range(2)]


@pytest.mark.parametrize(("packed", "pack"), [("", bytes), (".GZ", gzip.compress)])
def test_a_text_file_is_one_document_without_its_mark(
    packed: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(pack(BOM + "one\r\n\r\n \r\ntwo \ufeff".encode()))
    assert texts(path) == ["one\r\n\r\n \r\ntwo \ufeff"]
    flags = generate.parse_flags(["--load", "x", "--prompts-file", str(path)])[0]
    assert generate.read_prompts(flags) == ["one", "two \ufeff"]


def test_marks_of_files_put_together_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((BOM + b'{"text": "a"}\n') * 2 + BOM + b"\n")
    assert texts(path) == ["a", "a"]


def test_integers_of_any_length_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": ' + "9" * 5000 + ', "text": "a"}\n')
    assert texts(path) == ["a"]
    path.write_text('{"text": ' + "9" * 5000 + "}\n")
    assert "line 1 has a number under the key 'text', not text" in refusal(lambda: texts(path))


BAD_ROWS = [
    (b"5", "holds a number, not an object"),
    (b"9" * 5000, "holds a number, not an object"),
    (b"NaN", "holds a number, not an object"),
    (b"null", "holds null, not an object"),
    (b"true", "holds true or false, not an object"),
    (b'"text"', "holds a string, not an object"),
    (b'["text"]', "holds a list, not an object"),
    (b"{}", "has no key 'text' (it has none)"),
    (b'{"body": "b", "\\ud800": 1}', "has no key 'text' (it has 'body', '\\ud800')"),
    (b'{"text": null}', "has null under the key 'text', not text"),
    (b'{"text": 1.5}', "has a number under the key 'text', not text"),
    (b'{"text": -Infinity}', "has a number under the key 'text', not text"),
    (b'{"text": ["a"]}', "has a list under the key 'text', not text"),
    (b'{"text": {"text": "a"}}', "has an object under the key 'text', not text"),
    (b'{"text": "a"', "is not JSON (Expecting ',' delimiter)"),
    (b"[" * 100_000, "is not JSON (nested too deeply)"),
    (b'{"text": "\\udc00"}', "holds half a surrogate pair"),
    (b'{"text": "\xff"}', "is not UTF-8 (byte 10)"),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_a_bad_row_is_named_by_every_way_of_reading(row: bytes, expected: str, tmp_path: Path) -> None:
    """Whole, from the middle, and in blocks of a compressed file."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + row + b'\n{"text": "b"}\n')
    message = refusal(lambda: texts(path))
    assert message.startswith(f"--text {path}: line 3 {expected}")
    file = corpus.find_text_files([str(path)])[0]
    assert refusal(lambda: list(corpus.texts(file, 2, file.size))) == message.replace("--text", "--input")
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    file = corpus.find_text_files([str(packed)], compressed=True)[0]
    blocks = corpus.blocks_of_lines(file, 4)
    read = (text for start, lines, _ in blocks for text in corpus.texts(file, start, start + len(lines), lines))
    assert refusal(lambda: list(read)) == message.replace(f"--text {path}", f"--input {packed}")
    for tool in (["--load", "x", "--prompts-file", str(path)],):
        flags = generate.parse_flags(tool)[0]
        assert refusal(lambda flags=flags: generate.read_prompts(flags)).startswith(
            f"--prompts-file {path}: line 3 {expected}"
        )


def test_replaced_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_bytes(b'{"text": "x\xfe"}\n{"text": "y\\ud800z"}\n')
    assert texts(path, errors="replace") == ["x\ufffd", "y\ufffdz"]


def test_remedies_name_flags_that_the_command_has(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "b"}\n')
    assert refusal(lambda: corpus.read_documents(path, "TEXT")).endswith('; write {"text": "…"}')
    assert refusal(lambda: texts(path)).endswith(", or name the text's key with --json-key")
    assert texts(path, "body") == ["b"]


def test_invalid_utf8_is_named_by_line_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree")
    assert "line 3 is not UTF-8 (byte 2); convert the file" in refusal(lambda: texts(path))


@pytest.mark.parametrize(
    ("name", "ending"), [("a.jsonl.zst", ".zst"), ("a.txt.ZST", ".zst"), ("a.tar", ".tar"), ("a.tar.gz", ".tar")]
)
def test_archives_are_refused(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"text")
    assert f"{name}: {ending} cannot be read here; unpack it" in refusal(lambda: texts(path))
    assert f"{ending} cannot be read here" in refusal(lambda: corpus.find_text_files([str(path)], compressed=True))


@pytest.mark.parametrize("name", ["OpenSubtitles.br-en.br", "a.z"])
def test_endings_that_may_be_text_are_read(name: str, tmp_path: Path) -> None:
    """OPUS ends files with their language, such as Breton."""
    path = tmp_path / name
    path.write_bytes(b"text")
    assert texts(path) == ["text"]


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("a.txt")
    path, link = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    line = refusal(lambda: corpus.find_text_files([path, link]))
    assert line.startswith(f"--input {link}: the same file as {path}; name it once")
    assert f"the same file as {path}" in refusal(lambda: corpus.find_text_files([path, path]))
    assert f"the same file as {path}" in refusal(lambda: corpus.find_text_files([str(tmp_path), link], "*.txt"))


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    """Tools that save space make them of equal files."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").hardlink_to(tmp_path / "a.txt")
    assert found_in(tmp_path, "*.txt") == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_that_memory_does_not_hold_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(LINES)
    file = corpus.find_text_files([str(path)])[0]

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(corpus, "decode", full)
    for read in (lambda: texts(path), lambda: list(corpus.texts(file, 0, file.size))):
        assert refusal(read).endswith(f"{path}: memory does not hold a document of it; cut it into smaller ones")


@pytest.mark.parametrize("kind", ["folder", "absent", "damaged.jsonl.gz", "damaged.parquet"])
def test_what_is_no_text_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(b"PAR1 no such format")
    expected = {
        "folder": "a folder; name the files in it",
        "absent": "no such file; check the path",
        "damaged.jsonl.gz": "cut off or damaged",
        "damaged.parquet": "not Parquet, or damaged",
    }
    assert refusal(lambda: texts(path)).startswith(f"--text {path}: {expected[kind]}")


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
)
def test_parquet_rows_are_documents(kind: pyarrow.DataType, tmp_path: Path) -> None:
    path = tmp_path / "a.Parquet"
    column = pyarrow.array(ROWS * 3).cast(kind)
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(12), "text": column, "body": ROWS * 3}), path, row_group_size=5
    )
    assert texts(path) == texts(path, "body") == ROWS * 3
    file = corpus.find_text_files([str(path)])[0]
    assert corpus.row_groups(file) == 3
    assert [len(list(corpus.texts(file, group, group + 1))) for group in range(3)] == [5, 5, 2]


def test_bad_parquet_rows_and_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", None], "invalid": invalid, "n": [1, 2]}), path, row_group_size=1
    )
    assert "row 2 has null in the column 'text', not text" in refusal(lambda: texts(path))
    assert "row 2 is not UTF-8 (byte 0)" in refusal(lambda: texts(path, "invalid"))
    assert texts(path, "invalid", "replace") == ["a", "\ufffd"]
    assert "its column 'n' holds int64, not text; name" in refusal(lambda: texts(path, "n"))
    assert "has no column 'body' (it has 'text', 'invalid', 'n'); name" in refusal(lambda: texts(path, "body"))
    file = corpus.find_text_files([str(path)])[0]
    assert "row 2 has null" in refusal(lambda: list(corpus.texts(file, 1, 2)))


def test_parquet_columns_of_like_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([{"text": "nested"}]), pyarrow.array(["flat"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    table = pyarrow.Table.from_arrays(columns, ["meta", "meta.text", "text", "text"])
    pyarrow.parquet.write_table(table, path)
    assert texts(path, "meta.text") == ["flat"]
    assert "a.parquet: has 2 columns 'text'; rename all but one" in refusal(lambda: texts(path))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    expected = f"{path}: Parquet needs pyarrow; pip install pyarrow, or write the texts as JSON lines"
    assert refusal(lambda: texts(path)) == f"--text {expected}"
    assert refusal(lambda: corpus.find_text_files([str(path)])) == f"--input {expected}"


def test_a_folders_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("folder/a.txt", "folder/.b.txt", "folder/sub/deep/c.txt", "folder/sub/d.md", "elsewhere/e.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "folder" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to("../folder")

    def found(glob: str) -> list[str]:
        return found_in(tmp_path / "folder", glob)

    assert found("**/*.txt") == [".b.txt", "a.txt", "linked/e.txt", "sub/deep/c.txt"]
    assert found("*.txt") == [".b.txt", "a.txt"]
    assert found("./*/*") == ["linked/e.txt", "sub/d.md"]
    assert found("sub/**/[cd].*") == ["sub/d.md", "sub/deep/c.txt"]
    assert found("**/deep/*") == ["sub/deep/c.txt"]
    assert "--glob ../*: not below the folder; give a pattern relative to it" in refusal(lambda: found("../*"))


@pytest.mark.parametrize(
    ("links", "glob", "expected"),
    [
        ({"1": "2"}, "**/*.txt", ["2/a.txt", "3/x/b.txt"]),
        ({"1": "2/a.txt", "0.txt": "2/a.txt"}, "**/*.txt", ["2/a.txt", "3/x/b.txt"]),
        ({"1": "elsewhere", "4": "elsewhere/c"}, "**/*.txt", ["1/c/c.txt", "2/a.txt", "3/x/b.txt"]),
        ({"0": "elsewhere/c", "1": "elsewhere"}, "**/*.txt", ["0/c.txt", "2/a.txt", "3/x/b.txt"]),
        ({"1": "3/x"}, "*/*.txt", ["1/b.txt", "2/a.txt"]),
        ({"3/src": "2"}, "**/src/*.txt", ["3/src/a.txt"]),
        ({"3/up": "."}, "3/**/*.txt", ["3/x/b.txt"]),
    ],
)
def test_a_file_that_links_reach_is_taken_once(
    links: dict[str, str], glob: str, expected: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    for name in ("2/a.txt", "3/x/b.txt", "../elsewhere/c/c.txt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("text")
    for link, target in links.items():
        (folder / link).symlink_to(tmp_path / target if target.startswith("elsewhere") else folder / target)
    assert found_in(folder, glob) == expected


def test_folders_linked_to_each_other_are_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths through them are more than can be walked."""
    listed = []
    list_folder = os.listdir

    def listdir(path: str) -> list[str]:
        listed.append(path)
        assert len(listed) < 100
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    numbers = range(12)
    for number in numbers:
        (tmp_path / "all" / str(number)).mkdir(parents=True)
        (tmp_path / "all" / str(number) / "a.txt").write_text("text")
        for other in set(numbers) - {number}:
            (tmp_path / "all" / str(number) / f"to{other}").symlink_to(f"../{other}")
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "0").symlink_to("../all/0")
    assert found_in(tmp_path / "all", "**/*.txt") == sorted(f"{number}/a.txt" for number in numbers)
    assert len(found_in(tmp_path / "entry", "**/*.txt")) == 12


@pytest.mark.parametrize("pattern", ["old", "old/", "old/*", "old/**", "o*d", "*ld"])
def test_excluded_folders_are_not_entered(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old/sub/a.txt", "older/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    list_folder = os.listdir

    def listdir(path: str) -> list[str]:
        assert "old/" not in path
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert found_in(tmp_path, "**/*.txt", [pattern]) == ["older/b.txt"]
    line = refusal(lambda: found_in(tmp_path, "old/**/*.txt", [pattern]))
    assert f"matches no file in {tmp_path} but what --exclude names; " in line


def test_patterns_of_files_leave_their_folder_in(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "old" / name).write_text("text")
    assert found_in(tmp_path, "**/*", ["old/*.md", "old?"]) == ["old/a.txt"]


def test_a_broken_link_of_another_name_is_passed_over(tmp_path: Path) -> None:
    """Emacs locks a file by such a link."""
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / ".#notes.org").symlink_to("user@host.1234:1700000000")
    (tmp_path / "loop").symlink_to("loop")
    assert found_in(tmp_path, "**/*.txt") == ["notes.txt"]
    (tmp_path / ".#notes.txt").symlink_to("user@host.1234:1700000000")
    assert "/.#notes.txt: a broken link; mend that" in refusal(lambda: found_in(tmp_path, "**/*.txt"))


def test_the_remedy_leaves_out_names_with_glob_characters(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.txt").write_text("text")
    line = refusal(lambda: found_in(tmp_path, "**/*.txt"))
    command = line.partition("leave it out with ")[2]
    assert command == "--exclude 'a[[]1]/b.txt'"
    assert found_in(tmp_path, "**/*.txt", shlex.split(command)[1:]) == ["c.txt"]


def test_what_cannot_be_looked_at_in_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("folder", "folder/locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "a.txt").write_text("text")
    (tmp_path / "folder" / "locked" / "b.txt").write_text("text")
    (tmp_path / "folder" / "broken.txt").symlink_to("nowhere")
    (tmp_path / "folder" / "loop.txt").symlink_to("loop.txt")
    list_folder = os.listdir

    def listdir(path: str) -> list[str]:
        if path.endswith("locked/"):  # root may read it
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "listdir", listdir)
    folder, left_out = str(tmp_path / "folder"), []
    assert [file.path for file in corpus.find_text_files([folder], "[a]*.txt")] == [f"{folder}/a.txt"]
    reasons = {
        "broken.txt": "a broken link",
        "loop.txt": "Too many levels of symbolic links",
        "locked": "Permission denied",
    }
    for _ in reasons:
        line = refusal(lambda: corpus.find_text_files([folder], "**/*.txt", left_out))
        (name,) = [name for name in reasons if f"{folder}/{name}:" in line]
        assert line == f"--input {folder}/{name}: {reasons[name]}; mend that, or leave it out with --exclude {name}"
        left_out.append(name)
    assert [file.path for file in corpus.find_text_files([folder], "**/*.txt", left_out)] == [f"{folder}/a.txt"]
    line = refusal(lambda: corpus.find_text_files([f"{folder}/loop.txt/a.txt"]))
    assert line == f"--input {folder}/loop.txt/a.txt: Too many levels of symbolic links; check the path"


def test_ranges_cut_a_file_into_its_lines(tmp_path: Path) -> None:
    """Whatever the ranges, each line is read once; offsets and line numbers fit."""
    content = b"\nab\n\n\ncdefgh\nx\r\nlast"
    path = tmp_path / "f"
    path.write_bytes(content)
    file = corpus.find_text_files([str(path)])[0]
    whole = list(corpus.lines_between(file, 0, len(content)))
    assert b"".join(line for _, line in whole) == content
    assert [corpus.line_number(file, offset) for offset, _ in whole] == [1, 2, 3, 4, 5, 6, 7]
    for width in range(1, len(content) + 2):
        parts = [
            part
            for start in range(0, len(content), width)
            for part in corpus.lines_between(file, start, min(start + width, len(content)))
        ]
        assert parts == whole
