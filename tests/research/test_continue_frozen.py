"""examples/studies/continue_frozen.sh and research/gates/continued.py: training on, paired by seed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moa.research.gates import continued
from tests.support.training import ROOT

SCRIPT = ROOT / "examples" / "studies" / "continue_frozen.sh"


def continue_frozen(*arguments: str | Path, code: int = 0, **variables: str) -> str:
    """What examples/studies/continue_frozen.sh prints, stdout and stderr."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("DATA_PATH", "LR", "SEEDS", "OUT")}
    result = subprocess.run(
        [SCRIPT, *map(str, arguments)],
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == code, result.stdout
    return result.stdout


def test_a_dry_run_prints_what_would_be_run(tmp_path: Path) -> None:
    variables = {"DATA_PATH": "data/corpus", "LR": "4e-4", "SEEDS": "5", "OUT": str(tmp_path / "new")}
    printed = continue_frozen("runs/moa", "--dry-run", "--clip-grad", "0.5", **variables).replace("\\\n", "")
    collapse, *trainings = [line.split() for line in printed.splitlines()]
    assert collapse[1:] == [
        *(str(ROOT / "tools" / "analyze_gates.py"), "runs/moa", "data/corpus"),
        *("--part", "training", "--no-ablate", "--write-la", str(tmp_path / "new" / "la-start")),
    ]
    starts = ["runs/moa", "runs/moa", str(tmp_path / "new" / "la-start")]
    assert [words[words.index("--pretrained-checkpoint") + 1] for words in trainings] == starts
    assert ["--moa-freeze-gates" in words for words in trainings] == [False, True, False]
    differing = ("--moa-freeze-gates", "--pretrained-checkpoint", *starts)
    rest = [[word for word in words if word not in differing and "-seed5" not in word] for words in trainings]
    assert rest[0] == rest[1] == rest[2]
    assert rest[0][-2:] == ["--clip-grad", "0.5"]
    assert rest[0][rest[0].index("--lr") + 1] == "4e-4"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {}, "needs a CHECKPOINT, such as: "),
        (["--dry-run"], {}, "needs a CHECKPOINT, such as: "),
        (["runs/moa"], {"LR": "1e-3"}, "DATA_PATH is not set: set it to the prefix of what tools/preprocess_data.py"),
        (["runs/moa"], {"DATA_PATH": "d"}, "LR is not set: set it to the peak learning rate of training on, such as"),
        (["runs/moa"], {"DATA_PATH": "d", "LR": "1", "ITERATIONS": "0"}, "ITERATIONS 0: not a whole number above 0"),
        (["runs/moa", "--seed=2"], {"DATA_PATH": "d", "LR": "1"}, "--seed: is set by SEEDS here; set that, and leave"),
        (["runs/moa", "--train-iters", "9"], {"DATA_PATH": "d", "LR": "1"}, "--train-iters: is set by ITERATIONS here"),
    ],
)
def test_mistakes_before_training_on_are_one_line(
    arguments: list[str], variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    printed = continue_frozen(*arguments, code=2, **{"OUT": str(tmp_path / "new"), **variables})
    assert printed.startswith(f"continue_frozen.sh: {words}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_trainings_of_other_settings_are_kept_out(tmp_path: Path) -> None:
    out = tmp_path / "new"
    (out / "la-start").mkdir(parents=True)
    variables = {"DATA_PATH": "data/corpus", "LR": "4e-4", "OUT": str(out)}
    printed = continue_frozen("runs/moa", "--dry-run", code=2, **variables)
    where = f"continue_frozen.sh: OUT {out}: "
    assert printed == f"{where}has no file settings, so what it holds cannot be gone on with; take another OUT\n"
    settings = ["CHECKPOINT runs/moa", "DATA_PATH data/corpus", "LR 4e-4", "ITERATIONS 200", "BATCH 16", "SPLIT 99,1,0"]
    (out / "settings").write_text("\n".join([*settings, "EVAL_ITERS 40", "flags --bf16"]) + "\n")
    continue_frozen("runs/moa", "--bf16", "--dry-run", **variables)
    for checkpoint, flags, change, began in (
        ("runs/moa", ["--bf16"], {"LR": "1e-3"}, "LR 4e-4"),
        ("runs/other", ["--bf16"], {}, "CHECKPOINT runs/moa"),
        ("runs/moa", [], {}, "flags --bf16"),
        ("runs/moa", ["--bf16"], {"BATCH": "8"}, "BATCH 16"),
    ):
        printed = continue_frozen(checkpoint, *flags, "--dry-run", code=2, **{**variables, **change})
        assert printed == f"{where}was begun with {began}; give that again, or take another OUT\n"


def write_log(folder: Path, loss: float, complete: bool = True) -> None:
    """What gate_continued reads of a training's log."""
    folder.mkdir(parents=True)
    settings = {"global_batch_size": 16, "lr": 0.0008, "seq_length": 128}
    text = "".join(f"  {name} {'.' * (48 - len(name))} {value}\n" for name, value in settings.items())
    text += " iteration       20/      20 | elapsed time per iteration (ms): 3.0 | lm loss: 3.5E+00 |\n"
    if complete:
        text += f" validation loss at iteration 20 on validation set | lm loss value: {loss:E} | lm loss PPL: 1E+01 |\n"
    (folder / "train.log").write_text(text)


def test_ends_of_trainings_are_paired_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        for way, loss in (("la", 3.2), ("gates", 3.0), ("frozen", 3.0 + 0.01 * seed)):
            write_log(tmp_path / f"{way}-seed{seed}", loss + seed)
    write_log(tmp_path / "la-seed3", 9.0)  # its partners are still to be trained
    continued.main([str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "continued.jsonl").read_text().splitlines()]
    assert [(line["way"], line["seed"]) for line in lines] == [
        *((way, seed) for seed in (1, 2) for way in ("gates", "frozen", "la")),
        ("la", 3),
    ]
    assert lines[1] == {
        "way": "frozen",
        "seed": 1,
        "loss": 4.01,
        "iterations": 20,
        "tokens": 20 * 16 * 128,
        "lr": 8e-4,
        "difference": 0.01,
    }
    assert "difference" not in lines[-1]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[:7] == lines
    assert printed[8]["difference"] == pytest.approx(0.015)
    # Student's t with one degree of freedom: 12.706 standard errors, 0.005 each.
    assert printed[8]["interval"] == pytest.approx([0.015 - 12.706 * 0.005, 0.015 + 12.706 * 0.005], abs=1e-5)
    assert (printed[9]["difference"], printed[9]["loss"]) == (pytest.approx(0.2), pytest.approx((4.2 + 5.2 + 9) / 3))


def test_trainings_that_have_not_ended_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("has no training of examples/studies/continue_frozen.sh", "has no validation loss after the last"):
        with pytest.raises(SystemExit) as left:
            continued.main([str(tmp_path)])
        assert left.value.code == 2
        assert words in capsys.readouterr().err
        if not (tmp_path / "la-seed1").exists():
            write_log(tmp_path / "la-seed1", 3.0, complete=False)
    assert not (tmp_path / "continued.jsonl").exists()


@pytest.mark.slow
@pytest.mark.full
def test_a_checkpoint_trains_on_in_three_ways(trained: Path, tmp_path: Path) -> None:
    variables = {"DATA_PATH": str(trained / "corpus"), "LR": "1e-2", "SPLIT": "90,10,0", "SEEDS": "1", "BATCH": "2"}
    variables |= {"OUT": str(tmp_path / "new"), "ITERATIONS": "20", "EVAL_ITERS": "2"}
    flags = ["--tokenizer-model", str(trained / "tok.model")]
    printed = continue_frozen(trained / "dense", *flags, **variables)
    lines = [json.loads(line) for line in printed.splitlines()[:3]]
    assert [(line["way"], line["tokens"]) for line in lines] == [
        (way, 20 * 2 * 32) for way in ("gates", "frozen", "la")
    ]
    assert len({line["loss"] for line in lines}) == 3
    logs = [(tmp_path / "new" / f"{way}-seed1" / "train.log").read_text() for way in ("gates", "frozen", "la")]
    assert [bool(re.search(r"moa_freeze_gates \.+ True", log)) for log in logs] == [False, True, False]
    assert re.search(r"moa_mixing \.+ la", logs[2])
    # Started again it trains nothing: it says the same, in the time of one start of Python.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").glob("*/*.log")}
    assert continue_frozen(trained / "dense", *flags, **variables) == printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
