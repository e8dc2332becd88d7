"""Damaged, half-written and superseded checkpoints; full and read-only disks."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest

from megatron_moa.checkpoints import files
from megatron_moa.checkpoints.files import (
    MANIFEST,
    TRACKER,
    Checkpoint,
    DamagedCheckpoint,
    delete_superseded,
    find_damage,
    iteration_folder,
    kept_aside,
    last_complete_before,
    make_way,
    put_back,
    read_manifest,
    read_tracker,
    saved_iterations,
    settle,
    write_manifest,
    write_tracker,
)
from megatron_moa.checkpoints.guard import find_checkpoint, read_saved_settings
from megatron_moa.errors import UserError
from tests.support import launch
from tests.support.training import ROOT, SWIGLU, TINY, Run, train

SHARD = "__0_0.distcp"


def make_checkpoint(root: Path, iteration: int, complete: bool = True) -> Path:
    folder = iteration_folder(root, iteration)
    (folder / "below").mkdir(parents=True)
    (folder / SHARD).write_bytes(bytes(range(256)) * 20)
    (folder / "below" / "more").write_bytes(b"")
    if complete:
        write_manifest(folder)
    return folder


def damage(folder: Path, kind: str) -> Path:
    """Does to a checkpoint what disks and operators do, and says to which file."""
    path = folder / (MANIFEST if kind == "manifest" else SHARD)
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-20])
    return path


@pytest.mark.parametrize("kind", ["cut", "flipped", "missing", "manifest"])
def test_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    folder = make_checkpoint(tmp_path, 5)
    assert set(read_manifest(folder)) == {SHARD, "below/more"}
    assert find_damage(folder) is None
    path = damage(folder, kind)
    assert str(path) in find_damage(folder)
    assert (find_damage(folder, checksums=False) is None) == (kind == "flipped")


def test_without_a_manifest_nothing_is_compared(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5, complete=False)
    assert read_manifest(folder) is None
    assert find_damage(folder) is None
    assert saved_iterations(tmp_path) == []


def test_the_last_complete_checkpoint_is_found(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        make_checkpoint(tmp_path, iteration, complete=iteration != 30)
    damage(iteration_folder(tmp_path, 20), "cut")
    assert last_complete_before(Checkpoint("--load", tmp_path, 40)) == Checkpoint("--load", tmp_path, 10)
    assert last_complete_before(Checkpoint("--load", tmp_path, 10)) is None


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "pinned", "left"),
    [
        (1, None, None, [50, 60]),
        (2, None, None, [40, 50, 60]),
        (9, None, None, [10, 20, 30, 40, 50, 60]),
        (1, 20, None, [20, 40, 50, 60]),
        (2, 30, 10, [10, 30, 40, 50, 60]),
    ],
)
def test_old_checkpoints_are_deleted(
    tmp_path: Path, keep_last: int, keep_every: int | None, pinned: int | None, left: list[int]
) -> None:
    """50 has just been saved; 60 is what an earlier training, which went further, left."""
    for iteration in (10, 20, 30, 40, 50, 60):
        make_checkpoint(tmp_path, iteration)
    deleted = delete_superseded(tmp_path, 50, keep_last, keep_every, pinned)
    assert saved_iterations(tmp_path) == left
    assert sorted(deleted + left) == [10, 20, 30, 40, 50, 60]


def test_deleted_folders_go_and_nothing_else(tmp_path: Path) -> None:
    for iteration in (10, 20, 50):
        make_checkpoint(tmp_path, iteration, complete=iteration != 10)
    elsewhere = make_checkpoint(tmp_path / "elsewhere", 30)
    iteration_folder(tmp_path, 30).symlink_to(elsewhere)
    shutil.copytree(elsewhere, tmp_path / "iter_0000040_mine")
    (tmp_path / "iter_0000005.deleted").mkdir()  # a deletion that was interrupted
    delete_superseded(tmp_path, 50, 1, None, None)
    for thread in files.threading.enumerate():
        if thread.name == "deletes checkpoints":  # others are other tests' and never end
            thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {
        "iter_0000010",  # never completed, or another program's
        "iter_0000030",
        "iter_0000040_mine",
        "iter_0000050",
        "elsewhere",
    }


def test_nothing_is_deleted_before_the_new_one_is_whole(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        make_checkpoint(tmp_path, iteration, complete=iteration != 30)
    assert delete_superseded(tmp_path, 30, 1, None, None) == []
    write_manifest(iteration_folder(tmp_path, 30))
    damage(iteration_folder(tmp_path, 30), "cut")
    with pytest.raises(DamagedCheckpoint):
        delete_superseded(tmp_path, 30, 1, None, None)
    assert saved_iterations(tmp_path) == [10, 20, 30]


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for iteration in (10, 20):
        make_checkpoint(tmp_path, iteration)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert delete_superseded(tmp_path, 20, 1, None, None) == []
    assert f"WARNING: could not delete the checkpoint {iteration_folder(tmp_path, 10)}" in capsys.readouterr().out


def test_a_complete_checkpoint_outlives_its_replacement(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 10)
    make_way(folder)
    assert not folder.exists()
    make_checkpoint(tmp_path, 10, complete=False)
    make_way(folder)  # the first replacement was never finished
    replaced = tmp_path / "iter_0000010.replaced"
    assert not folder.exists()
    assert find_damage(replaced) is None
    assert (replaced / SHARD).exists()
    settle(folder)
    assert not replaced.exists()


def written_again(root: Path, moment: str) -> Path:
    """A checkpoint whose second writing was ended: before it began, or half way; or while it was put back."""
    folder = make_checkpoint(root, 10)
    write_tracker(root, 10)
    make_way(folder)
    if moment == "half written":
        make_checkpoint(root, 10, complete=False)
    return folder


def searching(load: Path, **changes: object) -> argparse.Namespace:
    """What find_checkpoint looks at."""
    names = ("save", "pretrained_checkpoint", "ckpt_step", "non_persistent_ckpt_type", "non_persistent_global_ckpt_dir")
    args = argparse.Namespace(load=str(load), exit_on_missing_checkpoint=False, moa_load_last_complete=False)
    vars(args).update(dict.fromkeys(names), **changes)
    return args


@pytest.mark.parametrize("moment", ["empty", "half written"])
def test_what_was_to_be_replaced_is_put_back(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    folder = written_again(tmp_path, moment)
    with pytest.raises(UserError, match=f"mv {tmp_path}/iter_0000010.replaced {folder}"):
        find_checkpoint(searching(tmp_path))  # another training may be writing there
    args = searching(tmp_path, save=str(tmp_path))
    assert find_checkpoint(args) == Checkpoint("--load", tmp_path, 10)
    assert "iteration 10 was not written again to its end; what it was is put back" in capsys.readouterr().out
    assert find_damage(folder) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, TRACKER]
    assert find_checkpoint(args) == Checkpoint("--load", tmp_path, 10)
    assert not capsys.readouterr().out


def test_every_iteration_is_put_back_whichever_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    folder = written_again(tmp_path, "half written")
    for iteration in (5, 20):
        newest = make_checkpoint(tmp_path, iteration)
    write_tracker(tmp_path, 20)
    assert find_checkpoint(searching(tmp_path)) == Checkpoint("--load", tmp_path, 20)  # another's 10 is left alone
    assert not (folder / MANIFEST).exists()
    found = find_checkpoint(searching(tmp_path, save=str(tmp_path)))
    assert found == Checkpoint("--load", tmp_path, 20)
    assert find_damage(folder) is None
    damage(newest, "cut")
    assert last_complete_before(found).iteration == 10


@pytest.mark.parametrize("tracker", ["missing", "unreadable"])
def test_what_is_kept_is_found_without_a_tracker(tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    written_again(tmp_path, "empty")
    if tracker == "missing":
        (tmp_path / TRACKER).unlink()
    else:
        (tmp_path / TRACKER).write_text("")
    with pytest.raises(UserError, match=f"mv {tmp_path}/iter_0000010.replaced"):
        find_checkpoint(searching(tmp_path))
    with pytest.raises(UserError, match="the last complete checkpoint is iteration 10: write 10"):
        find_checkpoint(searching(tmp_path, save=str(tmp_path)))  # and does not begin anew
    args = searching(tmp_path, save=str(tmp_path), moa_load_last_complete=True)
    assert find_checkpoint(args) == Checkpoint("--load", tmp_path, 10)


def test_other_ranks_wait_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written_again(tmp_path, "half written")
    kept = kept_aside(folder)
    monkeypatch.setenv("RANK", "1")
    waits = []

    def first_rank(seconds: float) -> None:
        waits.append(seconds)
        monkeypatch.setenv("RANK", "0")
        put_back(folder, kept)

    monkeypatch.setattr(files.time, "sleep", first_rank)
    assert not put_back(folder, kept)
    assert len(waits) == 1
    assert find_damage(folder) is None
    assert kept_aside(folder) is None


def test_a_first_rank_that_does_not_put_it_back_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_again(tmp_path, "half written")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(files, "_PATIENCE", -1)
    with pytest.raises(UserError, match=r"iteration 10: cannot be .*\(the first rank has not put it back\); move it"):
        find_checkpoint(searching(tmp_path, save=str(tmp_path)))


def test_what_is_damaged_itself_is_not_put_back(tmp_path: Path) -> None:
    folder = written_again(tmp_path, "half written")
    damage(tmp_path / "iter_0000010.replaced", "cut")
    assert kept_aside(folder) is None


def test_the_tracker_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tracker(tmp_path, 10)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_tracker(tmp_path, 20)
    assert read_tracker(tmp_path) == 10


@pytest.mark.parametrize("text", ["", "12x", "-3"])
def test_a_tracker_that_is_no_iteration(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(DamagedCheckpoint, match=TRACKER):
        read_tracker(tmp_path)


def denied(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_may_not_be_entered_or_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--load {tmp_path}/file/x: no checkpoint there; "):
        find_checkpoint(searching(tmp_path / "file" / "x"))
    non_persistent = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": str(tmp_path / "file")}
    with pytest.raises(UserError, match=f"--non-persistent-global-ckpt-dir {tmp_path}/file: not a folder"):
        find_checkpoint(searching(tmp_path, **non_persistent))
    with monkeypatch.context() as context:
        context.setattr(os, "stat", denied)
        with pytest.raises(UserError, match=r"--load .*: cannot be read \(Permission denied\); give a folder"):
            find_checkpoint(searching(tmp_path))


def test_a_tracker_that_cannot_be_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    (tmp_path / TRACKER).mkdir()
    expected = rf"{TRACKER} cannot be read \(Is a directory\); the last complete checkpoint is iteration 10"
    with pytest.raises(UserError, match=expected):
        find_checkpoint(searching(tmp_path))
    with pytest.raises(UserError, match=r"and it cannot be written there \(Is a directory\); load a copy"):
        find_checkpoint(searching(tmp_path, moa_load_last_complete=True))


def test_a_lost_tracker_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, 10)
    monkeypatch.setattr(files, "_write_atomically", denied)
    args = searching(tmp_path, moa_load_last_complete=True)
    assert find_checkpoint(args) == Checkpoint("--load", tmp_path, 10)
    assert args.ckpt_step == 10  # by which Megatron finds it
    assert find_checkpoint(args) == Checkpoint("--load", tmp_path, 10)
    with pytest.raises(UserError, match="cannot be written there"):
        find_checkpoint(searching(tmp_path, moa_load_last_complete=True, pretrained_checkpoint=str(tmp_path)))


def test_a_damaged_checkpoint_without_another_has_a_remedy(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 10, complete=False)
    args = searching(tmp_path)
    with pytest.raises(UserError, match=f"no complete one before it: give another --load, or delete {folder} and"):
        read_saved_settings(args, Checkpoint("--load", tmp_path, 10))
    with pytest.raises(UserError, match=f"a non-persistent one, delete {tmp_path}/elsewhere to go on from the last"):
        read_saved_settings(args, Checkpoint("--load", tmp_path / "elsewhere", 10))


# Whole runs.

MIXTURE = [*SWIGLU, "--moa-mixing", "la", "--moa-backend", "eager", "--save-interval", "2"]
ON = [*MIXTURE, "--override-opt-param-scheduler"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 2, 4 and 6."""
    root = tmp_path_factory.mktemp("checkpoints") / "trained"
    train(*MIXTURE, "--train-iters", "6", "--save", root)
    assert saved_iterations(root) == [2, 4, 6]
    assert read_tracker(root) == 6
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copied"))


def error_of(run: Run) -> str:
    assert run.returncode == 2, run.log[-4000:]
    (line,) = [line for line in run.log.splitlines() if line.startswith("pretrain_gpt_moa.py: error: ")]
    assert "Traceback" not in run.log
    return line.removeprefix("pretrain_gpt_moa.py: error: ")


@pytest.mark.parametrize(
    ("kind", "processes"), [("missing", 1), pytest.param("flipped", 2, marks=pytest.mark.distributed)]
)
def test_a_damaged_checkpoint_is_refused_or_passed_over(copied: Path, kind: str, processes: int) -> None:
    path = damage(iteration_folder(copied, 6), kind)
    flags = [*ON, "--train-iters", "7", "--load", copied]
    text = error_of(train(*flags, processes=processes, check=False))
    assert text.startswith(f"--load {copied}: iteration 6 is damaged: {path} ")
    assert "iteration 4: add --ckpt-step 4, or --moa-load-last-complete" in text
    run = train(*flags, "--moa-load-last-complete", processes=processes)
    assert f"iteration 6 is damaged: {path} " in run.log
    assert sorted(run.losses) == [5, 6, 7]


def test_what_the_error_proposes_works(copied: Path) -> None:
    damage(iteration_folder(copied, 6), "cut")
    run = train(*ON, "--train-iters", "7", "--load", copied, "--ckpt-step", "4")
    assert sorted(run.losses) == [5, 6, 7]
    text = error_of(train(*ON, "--train-iters", "7", "--load", copied, "--ckpt-step", "5", check=False))
    assert text.endswith("iteration 5, named by --ckpt-step 5, is not there; complete checkpoints there: 2, 4, 6")


@pytest.mark.parametrize("tracker", ["", pytest.param("six", marks=pytest.mark.full), None])
def test_a_lost_tracker(copied: Path, tracker: str | None) -> None:
    if tracker is None:
        (copied / TRACKER).unlink()
    else:
        (copied / TRACKER).write_text(tracker)
    flags = [*ON, "--train-iters", "7", "--load", copied]
    text = error_of(train(*flags, check=False))
    assert TRACKER in text
    assert "the last complete checkpoint is iteration 6: write 6 into that file" in text
    run = train(*flags, "--moa-load-last-complete")
    assert sorted(run.losses) == [7]
    assert read_tracker(copied) == 6


def test_a_half_written_checkpoint_is_none(copied: Path) -> None:
    """As a kill in the middle of saving iteration 8 leaves it: the tracker still says 6."""
    folder = make_checkpoint(copied, 8, complete=False)
    run = train(*ON, "--train-iters", "8", "--load", copied, "--save", copied)
    assert sorted(run.losses) == [7, 8]
    assert read_tracker(copied) == 8
    assert "below/more" not in read_manifest(folder)
    assert not (folder / "below").exists()


def test_a_conversion_leaves_the_checkpoint_that_it_reads(copied: Path, tmp_path: Path) -> None:
    """Megatron converts what it has loaded and writes that elsewhere, whatever --save says."""
    folders = ["--load", copied, "--save", copied, "--ckpt-convert-save", tmp_path / "converted"]
    train(*ON, "--train-iters", "8", *folders, "--ckpt-convert-format", "torch")
    assert saved_iterations(copied) == [2, 4, 6]
    assert read_tracker(copied) == 6
    losses = [
        train(*ON, "--train-iters", "7", "--load", root).losses for root in (copied, tmp_path / "converted" / "torch")
    ]
    assert sorted(losses[0]) == [7]
    assert losses[0] == losses[1]


def test_a_newer_non_persistent_checkpoint_is_the_one_that_is_loaded(trained: Path, tmp_path: Path) -> None:
    """Megatron takes it if it is not older; its settings must be compared, not those of the other one."""
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    root.mkdir()
    args = argparse.Namespace(load=str(root), save=str(root), pretrained_checkpoint=None, ckpt_step=None)
    vars(args).update(exit_on_missing_checkpoint=False, non_persistent_ckpt_type="global")
    args.non_persistent_global_ckpt_dir = None
    assert find_checkpoint(args) is None
    shutil.copytree(trained, root / "non_persistent")
    newest = Checkpoint("--load", root / "non_persistent", 6)
    assert find_checkpoint(args) == newest
    for iteration, expected in ((4, newest), (6, newest), (8, Checkpoint("--load", root, 8))):
        make_checkpoint(root, iteration)
        write_tracker(root, iteration)
        assert find_checkpoint(args) == expected
    args.non_persistent_global_ckpt_dir = str(elsewhere)
    assert find_checkpoint(args) == Checkpoint("--load", root, 8)
    args.load = None
    shutil.copytree(trained, elsewhere)
    assert find_checkpoint(args) == Checkpoint("--load", elsewhere, 6)


def test_without_a_manifest_a_checkpoint_loads_with_a_notice(copied: Path) -> None:
    (iteration_folder(copied, 6) / MANIFEST).unlink()
    run = train(*ON, "--train-iters", "7", "--load", copied)
    assert "iteration 6 has no manifest" in run.log
    assert sorted(run.losses) == [7]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load run/iter_0000006", "--load run/iter_0000006: a single checkpoint, not the folder of them; give run"),
        ("--load run/iter_0000006 --save run/iter_0000006", "a single checkpoint, not the folder of them; give run"),
        ("--pretrained-checkpoint run/iter_0000006", "--pretrained-checkpoint run/iter_0000006: a single checkpoint"),
        (
            "--load export",
            "--load export: a Hugging Face folder; make a checkpoint of it with tools/",
        ),
        ("--load export --save export", "--load export: a Hugging Face folder; "),
        ("--load export --save out --pretrained-checkpoint absent", "--load export: a Hugging Face folder; "),
        ("--load adapter", "--load adapter: holds an adapter (adapter_config.json); merge it into its model first"),
        ("--pretrained-checkpoint export", "--pretrained-checkpoint export: a Hugging Face folder; "),
        (
            "--load typo",
            "give the folder that training's --save named, or drop --load to begin without",
        ),
        ("--load typo --save out", "--load typo: no checkpoint there; give "),
        ("--load out --save out --pretrained-checkpoint typo", "--pretrained-checkpoint typo: no checkpoint there; "),
        ("--load out --save out --exit-on-missing-checkpoint", "--load out: no checkpoint there; give "),
        ("--load ./out --save out", None),
        ("--load empty --save empty", None),
        ("--load typo --save out --pretrained-checkpoint run", None),
        ("--save out", None),
    ],
)
def test_training_begins_anew_only_where_that_was_meant(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str | None
) -> None:
    """Megatron trains from random weights in all of these, or leaves with exit code 0."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(trained)
    Path("empty").mkdir()
    Path("export").mkdir()
    Path("export", "config.json").write_text("{}")
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("{}")
    names = ("load", "save", "pretrained_checkpoint", "ckpt_step", "non_persistent_ckpt_type")
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}")
    parser.add_argument("--exit-on-missing-checkpoint", action="store_true")
    args = parser.parse_args(flags.split())
    if message is None:
        find_checkpoint(args)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            find_checkpoint(args)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--moa-keep-last", "0", "--save", "x"], "--moa-keep-last 0: would keep none"),
        (["--moa-keep-last", "2"], "--moa-keep-last 2: nothing is saved"),
        (["--load", "msc://x/y"], "--load msc://x/y: checkpoints in object stores are not supported; name a folder"),
        (["--save", "s3://x", "--save-interval", "2"], "--save s3://x: checkpoints in object stores are not supported"),
        (["--moa-load-last-complete", "--ckpt-step", "4"], "--moa-load-last-complete: contradicts --ckpt-step 4"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], part: str) -> None:
    assert part in error_of(train(*MIXTURE, "--train-iters", "2", *flags, check=False))


@pytest.mark.parametrize("flags", [["--moa-keep-last", "1", "--save-retain-interval", "4"], ["--moa-keep-last", "2"]])
def test_a_run_keeps_what_it_is_told_to(tmp_path: Path, flags: list[str]) -> None:
    train(*MIXTURE, "--train-iters", "6", "--save", tmp_path, *flags)
    assert saved_iterations(tmp_path) == [4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "iter_0000006", TRACKER]


@pytest.mark.distributed
@pytest.mark.slow
def test_saves_in_the_background_are_completed_too(tmp_path: Path) -> None:
    asynchronous = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    train(*MIXTURE, *asynchronous, "--train-iters", "6", "--save", tmp_path, "--moa-keep-last", "1", processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000006", TRACKER]
    folder = iteration_folder(tmp_path, 6)
    assert {SHARD, "__1_0.distcp", ".metadata", "metadata.json"} == set(read_manifest(folder))
    assert find_damage(folder) is None
    assert read_tracker(tmp_path) == 6


def short_of_space(flags: list[str], megabytes: float) -> None:
    """The training script where no file can be larger than that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
    launch.script(str(ROOT / "pretrain_gpt_moa.py"), flags)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.distributed, pytest.mark.full])])
def test_a_full_disk(copied: Path, processes: int) -> None:
    flags = [*TINY, *ON, "--train-iters", "8", "--load", copied, "--save", copied]
    run = Run(*launch.launch(short_of_space, (list(map(str, flags)), 0.1), processes, ROOT))
    text = error_of(run)
    assert text.startswith(f"--save {copied}: the checkpoint of iteration 8 could not be written (")
    assert "the last complete one, iteration 6, is untouched" in text
    assert read_tracker(copied) == 6
    assert saved_iterations(copied) == [2, 4, 6]
    assert find_damage(iteration_folder(copied, 6)) is None


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = train(*MIXTURE, "--train-iters", "2", "--save", tmp_path / "file" / "x", processes=2, check=False)
    assert error_of(run).startswith(f"--save {tmp_path / 'file' / 'x'}: cannot be written to (Not a directory);")
    assert not run.losses
    assert "> mixture of activations" not in run.log


def test_the_manifest_is_read_as_documented(trained: Path) -> None:
    folder = iteration_folder(trained, 2)
    entry = json.loads((folder / MANIFEST).read_text())["files"][SHARD]
    assert entry["size"] == os.path.getsize(folder / SHARD)
    assert int(entry["crc32"], 16) == files.zlib.crc32((folder / SHARD).read_bytes())
