"""Tests tools/build_cache.py, and what the training script says about the index cache.

A run after the tool builds nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest

from megatron_moa.data import dataset_writer
from megatron_moa.runs.tiny_model import SWIGLU, TINY
from tests.support import launch
from tests.support.training import ROOT, Run

# Of the tiny model, on data and with an evaluation.
FLAGS = [word for word in TINY if word != "--mock-data"]
SPLIT = FLAGS.index("--split")
del FLAGS[SPLIT : SPLIT + 2]
FLAGS += [*SWIGLU, "--train-iters", "3", "--eval-iters", "1", "--eval-interval", "2"]
FOUND = "index cache: all {} files found, none built"
BUILT = "index cache: {} of {} files built"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets of a vocabulary of 63."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = numpy.random.default_rng(0)
    for name, documents in (("a", 40), ("b", 90), ("c", 60)):
        lengths = draw.integers(30, 200, documents).astype(numpy.int32)
        draw.integers(0, 63, lengths.sum()).astype(numpy.uint16).tofile(folder / f"{name}.bin")
        dataset_writer.write_index(str(folder / f"{name}.idx"), numpy.uint16, lengths)
    (folder / "blend.txt").write_text("0.3 a\n0.7 b\n")
    (folder / "blends.json").write_text('{"train": "1 a 2 b", "valid": "1 b 1 c", "test": null}')
    return folder


@pytest.fixture
def place(corpus: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the datasets; flags name them without it."""
    for path in corpus.iterdir():
        shutil.copy2(path, tmp_path)
    return tmp_path


def run(script: str, place: Path, *flags: object, processes: int = 1, code: int = 0) -> str:
    """The log of a script that ran in ``place`` and left with ``code``."""
    finished = Run(*launch.launch(launch.script, (str(ROOT / script), list(map(str, flags))), processes, place))
    assert finished.returncode == code, finished.log[-6000:]
    return finished.log


def build(place: Path, world_size: int, *flags: object, code: int = 0) -> str:
    return run("tools/build_cache.py", place, "--world-size", world_size, *FLAGS, *flags, code=code)


def train(place: Path, *flags: object, processes: int = 1, code: int = 0) -> str:
    return run("pretrain_gpt_moa.py", place, *FLAGS, *flags, processes=processes, code=code)


def written(place: Path) -> dict[Path, int]:
    """When each file below the folder was written."""
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("flags", "files"),
    [
        # A dataset has a description and three arrays for each part, a blend a description and two.
        pytest.param(["--data-path", "a", "--split", "80,10,10"], 12, marks=pytest.mark.full),
        (["--data-args-path", "blend.txt", "--split", "80,10,10", "--data-cache-path", "cache"], 2 * 12 + 3 * 3),
        pytest.param(
            ["--per-split-data-args-path", "blends.json", "--data-cache-path", "cache"],
            4 * 4 + 2 * 3,
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["--train-data-path", "a", "b", "--valid-data-path", "c", "--data-cache-path", "cache"],
            3 * 4 + 3,
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_run_after_it_builds_nothing(flags: list[object], files: int, place: Path) -> None:
    log = build(place, 2, *flags)
    assert BUILT.format(files, files) in log
    assert f"there now      {files} files" in log
    before = written(place)
    assert len([path for path in before if path.suffix in (".npy", ".txt")]) >= files
    assert FOUND.format(files) in train(place, *flags, processes=2)
    assert FOUND.format(files) in build(place, 2, *flags)
    assert written(place) == before


@pytest.mark.full
def test_other_flags_need_another_cache(place: Path) -> None:
    """So that the words "none built" mean something: each of these changes what Megatron looks for."""
    flags = ["--data-path", "a", "--split", "1,0,0", "--eval-iters", 0]
    build(place, 1, *flags)
    for change in (["--seed", 8], ["--train-iters", 5], ["--seq-length", 16]):
        assert BUILT.format(4, 4) in build(place, 1, *flags, *change)
    assert BUILT.format(4, 4) in train(place, *flags, "--global-batch-size", 8)
    assert FOUND.format(4) in build(place, 1, *flags)


@pytest.mark.full
@pytest.mark.distributed
def test_the_world_counts_where_it_decides_the_batch(place: Path) -> None:
    """Without --global-batch-size it is the micro-batches of all ranks."""
    flags = [*FLAGS, "--data-path", "a", "--split", "1,0,0", "--eval-iters", 0]
    place_of_batch = flags.index("--global-batch-size")
    del flags[place_of_batch : place_of_batch + 2]
    assert "training 6," in run("tools/build_cache.py", place, "--world-size", 1, *flags)
    assert "training 12," in run("tools/build_cache.py", place, "--world-size", 2, *flags)
    assert FOUND.format(4) in run("pretrain_gpt_moa.py", place, *flags, processes=2)


def test_flags_of_gpus_are_accepted(place: Path) -> None:
    """They need not be served where the cache is built, and nothing but the cache is written."""
    flags = ["--data-path", "a", "--split", "1,0,0", "--eval-iters", 0]
    run_flags = "--transformer-impl transformer_engine --attention-backend flash --bf16 --distributed-backend nccl"
    run_flags += " --use-distributed-optimizer --overlap-grad-reduce --tensor-model-parallel-size 2 --sequence-parallel"
    run_flags += " --context-parallel-size 2 --moa-backend triton --moa-overwrite-preactivation --save ckpt --load ckpt"
    run_flags += " --tensorboard-dir board --exit-signal-handler --fp8-format hybrid --global-batch-size 16"
    before = written(place)
    build(place, 16, *flags, *run_flags.split())
    assert {path.relative_to(place).parts[:2] for path in written(place).keys() - before} == {("a", "cache")}
    assert FOUND.format(4) in build(place, 1, *flags, "--global-batch-size", 16)


def test_the_flags_of_a_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"DATA_ARGS_PATH": "blend.txt", "DATA_CACHE_PATH": "cache", "TOKENIZER_TYPE": "NullTokenizer"}
    for name, value in {**variables, "TP": "2", "TOKENS": "5000000", "SPLIT": "80,10,10"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--recipe", "dense-0.12b", "moa", "--vocab-size", 63, "--seq-length", 32, "--max-position-embeddings", 32]
    log = run("tools/build_cache.py", place, "--world-size", 8, *flags)
    assert BUILT.format(33, 33) in log
    assert FOUND.format(33) in run("tools/build_cache.py", place, "--world-size", 8, *flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data-path", "nothing"], "--data-path nothing: no file nothing.bin; check the path, or make it with"),
        (["--mock-data"], "--mock-data: has no index cache; give --data-path PREFIX"),
        (["--data-path", "1", "a", "1", "b", "--split", "8,1,1"], "--data-cache-path is missing: without it Megatron"),
        (["--data-path", "a", "--use-checkpoint-args", "--load", "x"], "--use-checkpoint-args: no checkpoint is read"),
        (["--data-path", "a", "--split", "8,1,1", "--tensor-model-parallel-size", 3], "(--world-size 2, the run's fl"),
        (
            ["--data-path", "a", "b", "--split", "8,1,1", "--train-iters", 999, "--eval-interval", 500],
            "error: the training data, named without weights, are read once: ",
        ),
    ],
)
def test_mistakes(flags: list[object], expected: str, place: Path) -> None:
    log = build(place, 2, *flags, code=2)
    assert log.splitlines()[-1].startswith("build_cache.py: error: ")
    assert expected in log.splitlines()[-1]


def train_with_own_cache(flags: list[str]) -> None:
    """A target of launch(): ranks that each see a cache of their own, as nodes with disks of their own."""
    cache = f"cache{os.environ['RANK']}"
    sys.argv = ["", *flags, "--data-cache-path", cache]
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), sys.argv[1:])


@pytest.mark.full
@pytest.mark.distributed
def test_a_cache_that_one_node_does_not_see(place: Path) -> None:
    flags = ["--data-path", "a", "--split", "1,0,0", "--eval-iters", 0]
    for name in ("cache0", "cache1"):
        build(place, 2, *flags, "--data-cache-path", name)
    log = Run(*launch.launch(train_with_own_cache, ([str(word) for word in (*FLAGS, *flags)],), 2, place))
    assert log.returncode == 0, log.log[-6000:]
    assert FOUND.format(4) in log.log
    shutil.rmtree(place / "cache1")
    log = Run(*launch.launch(train_with_own_cache, ([str(word) for word in (*FLAGS, *flags)],), 2, place))
    assert log.returncode == 2
    expected = (
        r"rank 1: error: cache1/[\w-]+_index.npy: the first rank has this part of the index cache, this node has not"
    )
    assert len(re.findall(expected, log.log)) == 1
    assert "Traceback" not in log.log


@pytest.mark.parametrize("flag", ["--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap"])
def test_a_cache_that_must_be_there(flag: str, place: Path) -> None:
    flags = ["--train-data-path", "a", "--eval-iters", 0, "--data-cache-path", "cache", flag]
    log = train(place, *flags, code=2)
    assert re.search(rf"error: .*{flag}.*: cache/[\w.-]+ is not there; build the index cache beforehand", log)
    assert "Traceback" not in log
    assert BUILT.format(4, 4) in build(place, 1, *flags)
