"""preprocess_data.py --part, merge_data.py: parts give the bytes of one process, or one line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from megatron_moa.data import dataset_writer, pieces, workers
from tests.support import launch
from tests.support.datasets import (
    ENVIRONMENT,
    command,
    documents,
    merge,
    one_line,
    preprocess,
    same_files,
    write_json_lines,
)
from tests.support.training import ROOT
from tools import merge_data

# The test process has other threads by then; a tool that was just started has none.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def mixed(corpus: Path, tmp_path: Path) -> list[object]:
    """Inputs of every kind: JSON lines, plain and compressed, and text files, empty ones at both ends."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_json_lines(folder, 100)
    (folder / "1.jsonl.gz").write_bytes(gzip.compress((folder / "1.jsonl").read_bytes()))
    for i, words in enumerate((0, 400, 3, 0)):
        (folder / f"{i}.txt").write_text("text without newline " * words)
    copy = shutil.copytree(folder, tmp_path / "copy")
    return ["--input", folder, corpus, copy, "--glob", "**/[0-9]*"]


@pytest.mark.parametrize("parts", [1, 2, 5, 60])
@pytest.mark.parametrize("shuffle", [[], ["--shuffle-documents", 5]])
def test_parts_merge_to_what_one_process_writes(
    parts: int, shuffle: list[object], mixed: list[object], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "TASK_BYTES", 3000)
    monkeypatch.setattr(dataset_writer, "SHUFFLE_BYTES", 4000)  # less than some documents have
    preprocess(model, tmp_path / "whole", *mixed, *shuffle, "--workers", 1)
    for number in range(parts, 0, -1):  # in any order
        preprocess(model, tmp_path / "d", *mixed, *shuffle, "--workers", 1, "--part", f"{number}/{parts}")
    sizes = [os.path.getsize(path) for path in tmp_path.glob("d.part-*.bin")]
    if parts in (2, 5):
        assert max(sizes) < 2 * sum(sizes) / parts
    merge(tmp_path / "d")
    same_files(tmp_path / "whole", tmp_path / "d")
    assert len(list(tmp_path.glob("d.part-*"))) == 3 * parts
    os.rename(tmp_path / "d.bin", tmp_path / "first.bin")
    os.rename(tmp_path / "d.idx", tmp_path / "first.idx")
    (tmp_path / "d.part-00001-of-00001x.bin").touch()  # no part
    Path(f"{tmp_path}/d.part-00001-of-{parts:05}.bin.77.tmp").touch()  # what a killed run leaves
    merge(tmp_path / "d", "--remove-parts")
    same_files(tmp_path / "whole", tmp_path / "d")
    assert [path.name for path in tmp_path.glob("d.part-*")] == ["d.part-00001-of-00001x.bin"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_part_without_documents_is_written(workers: int, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one text, which is in the first part\n")
    for part in ("1/2", "2/2"):
        preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", workers, "--part", part)
    assert sorted(os.path.getsize(path) > 0 for path in tmp_path.glob("d.part-*.bin")) == [False, True]
    merge(tmp_path / "d")
    assert len(documents(tmp_path / "d")) == 1


def test_two_nodes_write_what_one_process_does(model: str, tmp_path: Path) -> None:
    """As srun starts them: two commands at a time, told apart by Slurm's variables alone."""
    write_json_lines(tmp_path, 400)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--shuffle-documents", 2]
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", 2]
    made = command("preprocess_data", *inputs, *flags, "--output-prefix", tmp_path / "d", "--part", "slurm")
    with (tmp_path / "log").open("w") as log:
        started = [
            launch.Forked(
                made, cwd=ROOT, env={**ENVIRONMENT, "SLURM_PROCID": str(node), "SLURM_STEP_NUM_TASKS": "2"}, stdout=log
            )
            for node in range(2)
        ]
    codes = [process.wait(timeout=120) for process in started]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    merge(tmp_path / "d", "--remove-parts")
    preprocess(model, tmp_path / "whole", *inputs, "--workers", 1)
    same_files(tmp_path / "whole", tmp_path / "d")


def test_a_killed_part_is_made_again_alone(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json_lines(tmp_path, 200)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--workers", 2]
    preprocess(model, tmp_path / "whole", *inputs)
    for number in (1, 3):
        preprocess(model, tmp_path / "d", *inputs, "--part", f"{number}/3")
    with monkeypatch.context() as killed:
        killed.setattr(workers, "tokenize", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert "a worker was killed" in one_line(capsys, preprocess, model, tmp_path / "d", *inputs, "--part", "2/3")
    line = one_line(capsys, merge, tmp_path / "d")
    assert line.startswith(
        f"merge_data.py: error: --output-prefix {tmp_path / 'd'}: 1 of 3 parts missing (2); make each"
    )
    assert line.endswith("e.g. --part 2/3")
    assert not (tmp_path / "d.bin").exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("d.part-*")}
    assert len(times) == 6
    for number in (1, 2, 3):
        preprocess(model, tmp_path / "d", *inputs, "--part", f"{number}/3")
        assert ("skipped  " in capsys.readouterr().out) == (number != 2)
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    merge(tmp_path / "d")
    same_files(tmp_path / "whole", tmp_path / "d")


def other_model(model: str, tmp_path: Path) -> str:
    """A tokenizer whose file differs, although its ids are the same."""
    Path(tmp_path / "other.model").write_bytes(Path(model).read_bytes() + bytes.fromhex("f2060161"))
    sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/other.model")
    return f"{tmp_path}/other.model"


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (["--no-append-eod"], "append_eod"),
        (["--shuffle-documents", 1], "shuffle_documents"),
        (["--errors", "replace"], "errors"),
        (["--tokenizer-model", "{other}"], "tokenizer"),
        (["--input", "{tmp}/1.jsonl", "{tmp}/0.jsonl"], "input"),
        ("touch", "input"),
    ],
)
def test_parts_that_do_not_belong_together(
    change: list[object] | str, differing: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json_lines(tmp_path, 30)
    inputs = ["--input", tmp_path / "0.jsonl", tmp_path / "1.jsonl", "--workers", 1]
    preprocess(model, tmp_path / "d", *inputs, "--part", "1/2")
    if change == "touch":
        os.utime(tmp_path / "1.jsonl", (1, 1))
        changed = []
    else:
        names = {"{other}": other_model(model, tmp_path), "{tmp}": str(tmp_path)}
        changed = [str(word) for word in change]
        for name, value in names.items():
            changed = [word.replace(name, value) for word in changed]
    line = one_line(capsys, preprocess, model, tmp_path / "d", *inputs, *changed, "--part", "1/2")
    assert f"is of a part made with another {differing}; choose another --output-prefix, or add --overwrite" in line
    preprocess(model, tmp_path / "d", *inputs, *changed, "--part", "2/2")
    line = one_line(capsys, merge, tmp_path / "d")
    assert "d.part-00002-of-00002: does not belong to part 1, which was made with another " + differing + ";" in line
    preprocess(model, tmp_path / "d", *inputs, *changed, "--part", "1/2", "--overwrite")
    merge(tmp_path / "d")


def rewrite_manifest(path: Path, changes: dict[str, object]) -> None:
    """Changes a part's manifest: keys' values, "settings" by key, too."""
    manifest = json.loads(Path(f"{path}.json").read_text())
    settings = changes.get("settings")
    changes = changes | ({"settings": manifest["settings"] | settings} if isinstance(settings, dict) else {})
    Path(f"{path}.json").write_text(json.dumps(manifest | changes))


def overwrite_lengths(path: Path) -> None:
    """Puts other numbers where a part's .idx has its documents' lengths."""
    with open(f"{path}.idx", "r+b") as stream:
        stream.seek(34)
        stream.write(b"\xff" * 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "2"},
        {"parts": 2.5},
        {"documents": "30"},
        {"documents": -1},
        {"tokens": None},
        {"tokens": True},
        {"dtype": 5},
        {"dtype": "float64"},
        {"settings": []},
        {"settings": {"shuffle_documents": "1"}},
        {"settings": {"shuffle_documents": -1}},
        {"format": 2},
        {"further": 1},
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_manifest_that_is_none_is_one_line(
    changes: dict[str, object] | bytes, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    arguments = ["--input", tmp_path / "a.txt", "--workers", 1, "--part", "1/1"]
    preprocess(model, tmp_path / "d", *arguments)
    part = tmp_path / "d.part-00001-of-00001"
    if isinstance(changes, bytes):
        Path(f"{part}.json").write_bytes(changes)
    else:
        rewrite_manifest(part, changes)
    for line in (
        one_line(capsys, merge, tmp_path / "d"),
        one_line(capsys, preprocess, model, tmp_path / "d", *arguments),
    ):
        assert f"{part}.json: not the manifest of a part that this version writes; delete it" in line


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: os.truncate(f"{path}.bin", 10), ".bin: 10 bytes instead of "),
        (lambda path: os.unlink(f"{path}.bin"), ".bin: 0 bytes instead of "),
        (lambda path: os.truncate(f"{path}.idx", 34), ".idx: 34 bytes instead of "),
        (overwrite_lengths, ".idx: damaged, its lengths are not those of "),
        (lambda path: Path(f"{path}.json").write_text("{}"), ".json: not the manifest of a part"),
        (lambda path: os.rename(f"{path}.json", str(path)[:-1] + "3.json"), "parts of divisions into 2 and 3; delete"),
        (lambda path: os.unlink(f"{path}.json"), "1 of 2 parts missing (2)"),
        (lambda path: [os.unlink(file) for file in path.parent.glob("d.part*")], "no finished part there; make them"),
        (lambda path: (path.parent / "d.idx").touch(), "d.idx exists; choose another name or add --overwrite"),
    ],
)
def test_damaged_parts_are_not_merged(
    damage: object, expected: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json_lines(tmp_path, 30)
    for number in (1, 2):
        preprocess(model, tmp_path / "d", "--input", tmp_path / "0.jsonl", "--workers", 1, "--part", f"{number}/2")
    damage(tmp_path / "d.part-00002-of-00002")
    before = sorted(os.listdir(tmp_path))
    assert expected in one_line(capsys, merge, tmp_path / "d", "--remove-parts")
    assert sorted(os.listdir(tmp_path)) == before


def test_too_little_space_for_merging(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1, "--part", "1/1")
    monkeypatch.setattr(merge_data.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert "GB are needed, 0.0 GB are free; free space" in one_line(capsys, merge, tmp_path / "d")


def test_ctrl_c_behind_a_merge_says_that_the_dataset_is_whole(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1, "--part", "1/1")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt  # not the signal, which is ignored where the tests run in the background

    monkeypatch.setattr(merge_data.dataset_writer, "remove_parts", interrupt)
    with pytest.raises(SystemExit) as leaving:
        merge(tmp_path / "d", "--remove-parts")
    assert leaving.value.code == 130
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "merge_data.py: interrupted, the dataset is whole, parts may be left"
    )
    assert {"d.bin", "d.idx", "d.part-00001-of-00001.bin"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "slurm"])
def test_mistakes_in_the_part(part: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--part", part)
    assert f"argument --part: {part}: " in line
    assert ("start it with srun" if part == "slurm" else "K/N is wanted") in line
