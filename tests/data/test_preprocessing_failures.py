"""Tests failures of tools/preprocess_data.py, which leave one line and no files.

They are mistakes, full disks, and runs that are killed or interrupted.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_moa.data import dataset_writer, workers
from tests.support.datasets import (
    ENVIRONMENT,
    command,
    documents,
    merge,
    one_line,
    preprocess,
)
from tools import blend, train_tokenizer

SENTENCEPIECE = "SentencePieceTokenizer"

# The test process has other threads by then; a tool that was just started has none.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--input", "{tmp}/nothing"], "--input {tmp}/nothing: no such file or folder; check the path"),
        (["--input", "{tmp}/empty"], "--input {tmp}/empty: the file is empty"),
        (["--input", "{tmp}/folder"], "--input {tmp}/folder: a folder; say which of its files to take, e.g. --glob"),
        (["--input", "{tmp}/folder", "--glob", "*"], "all 1 files are empty"),
        (["--input", "{tmp}/folder", "--glob", "*.md"], "--glob *.md: matches no file in {tmp}/folder"),
        (["--input", "{tmp}/latin1"], "--input {tmp}/latin1: line 2 is not UTF-8 (byte 1); convert"),
        (["--tokenizer-model", "{tmp}/no.model"], "--tokenizer-model {tmp}/no.model: no such file; check the path"),
        (
            ["--tokenizer-model", "{tmp}/there"],
            "--tokenizer-model {tmp}/there: no such file; did you mean {tmp}/there.m",
        ),
        (["--tokenizer-model", "{tmp}/empty"], "--tokenizer-model {tmp}/empty: the file is empty"),
        (["--tokenizer-model", "{tmp}/text"], "--tokenizer-model {tmp}/text: not a sentencepiece model"),
        (["--tokenizer-model", "{tmp}/folder"], "not a file; SentencePieceTokenizer wants one file"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "a file; HuggingFaceTokenizer wants the folder"),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tmp}/folder"],
            "--tokenizer-model {tmp}/folder: no tokenizer files in this folder",
        ),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "someone/something"],
            "someone/something: no such folder, and no tokenizer of that name in the local Hugging Face cache",
        ),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tmp}/broken"],
            "--tokenizer-model {tmp}/broken: HuggingFaceTokenizer cannot load it (",
        ),
        (["--tokenizer-type", "Wordy"], "argument --tokenizer-type: invalid choice: 'Wordy' (choose from"),
        (["--output-prefix", "{tmp}/there"], "{tmp}/there.bin exists; choose another name or add --overwrite"),
        (["--output-prefix", "{tmp}/x.bin"], "a prefix without ending is wanted: --output-prefix {tmp}/x"),
        (["--output-prefix", "{tmp}/folder/"], "--output-prefix {tmp}/folder/: a folder; add a name"),
        (["--output-prefix", "{tmp}/text/x"], "{tmp}/text is a file, not a folder; choose another place"),
        (["--output-prefix", "/proc/x"], "--output-prefix /proc/x"),
        (["--workers", "0"], "argument --workers: a number from 1 to 1024 is wanted, not 0"),
        (["--workers", "9" * 20], "--workers: a number from 1 to 1024 is wanted, not 9999"),
        (["--shuffle-documents", "-1"], "--shuffle-documents: a number of 0 or more is wanted, not -1"),
        (["--wrokers", "2"], "unrecognized arguments: --wrokers 2"),
    ],
)
def test_mistakes_in_preprocessing_flags(
    flags: list[str], expected: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "nothing.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "there.bin").touch()
    (tmp_path / "there.model").touch()
    (tmp_path / "latin1").write_bytes("ab\ncé".encode("latin-1"))
    before = sorted(os.listdir(tmp_path))
    arguments = ["--input", tmp_path / "text", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)]
    line = one_line(capsys, preprocess, model, tmp_path / "new" / "data", *arguments)
    assert line.startswith("preprocess_data.py: error: ")
    assert expected.replace("{tmp}", str(tmp_path)) in line
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("tool", "made", "name"),
    [
        ("preprocess", "d.bin", "d.bin"),
        ("preprocess", "d.idx", "folder/../d.idx"),
        ("preprocess", "d.bin", "link"),
        ("preprocess", "d.bin", "hard"),
        ("part", "d.part-00001-of-00001.json", "link"),
        ("tokenizer", "d.vocab", "link"),
        ("tokenizer_model", "d.bin", "link"),
    ],
)
def test_what_is_read_is_not_overwritten(
    tool: str, made: str, name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / made).write_bytes(Path(model).read_bytes() if tool == "tokenizer_model" else b'{"text": "a"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "hard").hardlink_to(tmp_path / made)
    (tmp_path / "text").write_text("some text")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    path = tmp_path / name
    if tool == "tokenizer":
        flags = ["--input", str(path), "--output", str(tmp_path / "d"), "--overwrite"]
        line = one_line(capsys, train_tokenizer.main, flags)
    elif tool == "tokenizer_model":
        line = one_line(capsys, preprocess, str(path), tmp_path / "d", "--input", tmp_path / "text", "--overwrite")
    else:
        flags = ["--input", path, "--overwrite", *(["--part", "1/1"] if tool == "part" else [])]
        line = one_line(capsys, preprocess, model, tmp_path / "d", *flags)
    assert f" {tmp_path / made}: is the file {path} that is read; choose another name" in line
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_printed_commands_can_be_pasted(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "a.txt").write_text("text " * 200)
    own = str(folder / "tok.model")
    Path(own).write_bytes(Path(model).read_bytes())

    def said(word: str) -> list[str]:
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(word)]
        return shlex.split(line)

    preprocess(own, folder / "d", "--input", folder / "a.txt", "--workers", 1)
    assert {str(folder / "d"), own} < set(said("use it with"))
    preprocess(own, folder / "e", "--input", folder / "a.txt", "--workers", 1, "--part", "1/1")
    assert said("next")[-1] == str(folder / "e")
    merge(folder / "e")
    assert said("kept")[-1] == f"{folder / 'e'}.part-*-of-*.*"
    flags = ["--input", str(folder / "a.txt"), "--output", str(folder / "t"), "--vocab-size", "265"]
    train_tokenizer.main(flags)
    assert said("use it with")[-1] == f"{folder / 't'}.model"
    (tmp_path / "plain").symlink_to(folder)
    blend.main(["--data", f"{tmp_path}/plain/d", "--split", "1,0,0", "--output", str(folder / "blend.txt")])
    assert str(folder / "blend.txt") in said("use it with")


def test_tokenizer_without_end_of_document(
    huggingface: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(huggingface / "without_eos")
    line = one_line(capsys, preprocess, folder, tmp_path / "d", "--input", corpus, "--glob", "**/*.py")
    assert "has no end-of-document token (eos)" in line
    assert "--no-append-eod" in line
    preprocess(folder, tmp_path / "d", "--input", corpus, "--glob", "**/*.py", "--no-append-eod")
    assert len(documents(tmp_path / "d")) > 1


def test_a_failed_overwrite_keeps_the_old_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt")
    before = [(tmp_path / f"d{ending}").read_bytes() for ending in (".bin", ".idx")]
    one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "bad.txt", "--overwrite")
    assert [(tmp_path / f"d{ending}").read_bytes() for ending in (".bin", ".idx")] == before
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "bad.txt", "d.bin", "d.idx"]


def test_full_disk_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_writer, "write_index", full)
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1)
    assert "d.bin: cannot be written (No space left on device)" in line
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("flags", [[], ["--shuffle-documents", "1"]])
def test_last_bytes_that_do_not_fit_are_one_line(flags: list[str], model: str, tmp_path: Path) -> None:
    """They are less than a buffer, and written as the file is closed."""
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x5000))))  # three bytes each: 3 KB of tokens
    arguments = ["--input", tmp_path / "a.txt", "--tokenizer-model", model, "--tokenizer-type", SENTENCEPIECE]
    done = subprocess.run(
        command("preprocess_data", *arguments, "--output-prefix", tmp_path / "d", "--workers", 1, *flags),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "d.bin: cannot be written (File too large); free space" in done.stderr
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_worker_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    start = workers.start_worker

    def start_deaf(settings: object) -> None:
        """As a worker is that was just forked: the pool's SIGTERM is lost on it."""
        start(settings)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(workers, "start_worker", start_deaf)
    monkeypatch.setattr(workers, "tokenize", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 2)
    assert "--workers 2: a worker was killed, probably for memory; use fewer workers" in line
    assert os.listdir(tmp_path) == ["a.txt"]


def test_workers_that_cannot_be_started_are_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    forks = iter([os.fork, os.fork])

    def fork() -> int:
        if (real := next(forks, None)) is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real()

    monkeypatch.setattr(os, "fork", fork)
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 9)
    assert "--workers 9: cannot be started (Resource temporarily unavailable); use fewer, e.g. --workers 1" in line
    assert os.listdir(tmp_path) == ["a.txt"]
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("flags", "made", "expected"),
    [
        ([], "d.bin", "d.bin exists; choose another name"),
        (["--part", "1/1"], "d.part-00001-of-00001.json", "--part 1/1: another run has written"),
    ],
)
def test_a_dataset_that_another_run_wrote_meanwhile_is_kept(
    flags: list[str],
    made: str,
    expected: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.txt").write_text("text")
    write = dataset_writer.write_index

    def write_with_another(*arguments: object) -> None:
        (tmp_path / made).write_text("another run's")
        write(*arguments)

    monkeypatch.setattr(dataset_writer, "write_index", write_with_another)
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1, *flags)
    assert expected in line
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", made])
    assert (tmp_path / made).read_text() == "another run's"


def start_long_run(source: Path, folder: Path, model: str) -> subprocess.Popen:
    """Starts preprocessing with two workers and returns as soon as a temporary file is there."""
    source.write_text((json.dumps({"text": "some words and some more " * 40}) + "\n") * 60_000)  # 60 MB, some seconds
    folder.mkdir()
    arguments = ["--input", source, "--output-prefix", folder / "d", "--tokenizer-model", model, "--workers", 2]
    process = subprocess.Popen(
        command("preprocess_data", *arguments, "--tokenizer-type", SENTENCEPIECE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not os.listdir(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_an_interrupted_run_leaves_nothing(stop: signal.Signals, model: str, tmp_path: Path) -> None:
    """The signal comes while the workers are being forked, the worst moment."""
    process = start_long_run(tmp_path / "in.jsonl", tmp_path / "out", model)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if stop == signal.SIGINT else 143)
    assert os.listdir(tmp_path / "out") == []
    assert errors == ("preprocess_data.py: interrupted, nothing written\n" if stop == signal.SIGINT else "")


@pytest.mark.full
def test_workers_end_with_a_killed_parent(model: str, tmp_path: Path) -> None:
    """SIGKILL lets nobody clean up, but no worker may stay behind."""
    process = start_long_run(tmp_path / "in.jsonl", tmp_path / "out", model)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children.read_text().split()) >= 2
    process.kill()
    process.communicate(timeout=60)  # ends only when the last worker has closed the pipes
