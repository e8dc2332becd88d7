"""examples/: every recipe's command, its training scaled down, data, optimizers, schedules, mistakes, sweeps."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_moa.training_log import TrainingLog
from tests import launch
from tests.training import ROOT, Run
from tools import plan

MODELS = sorted(path.stem for path in (ROOT / "examples" / "models").glob("*.sh"))
MIXINGS = ("none", "la", "moa")
PLANNED = ("# Parameters: ", "# Hardware: ", "# Duration: ", "# Cost: ")
DATA = {"DATA_PATH": "corpus", "TOKENIZER_MODEL": "tokenizer.model"}

# A model of the same kind, narrow and shallow.
SHALLOW = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128".split()
NARROW_EXPERTS = "--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 64".split()
SHORT = "--mock-data --vocab-size 128 --train-iters 3 --log-interval 1 --eval-iters 0 --num-workers 0".split()
SMALL_BATCH = {"MICRO_BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "4", "SEQ_LENGTH": "32"}


def run_example(
    script: str, *arguments: str, folder: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A script of examples/ with these variables, and none of the recipes' own from outside."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "examples" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)


def dry_run(model: str, mixing: str, *flags: str, **variables: str) -> list[str]:
    """The words of the command."""
    done = run_example("pretrain.sh", model, mixing, "--dry-run", *flags, **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.replace("\\\n", " "))


def value(words: list[str], flag: str) -> str:
    """The word behind the last of these flags: the one that holds."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def small(model: str, mixing: str) -> list[str]:
    """Flags that scale a recipe down."""
    backend = ["--moa-backend", "eager"] if mixing != "none" else []  # compiling takes longer than training
    return [*SHALLOW, *(NARROW_EXPERTS if model.startswith("moe") else []), *SHORT, *backend]


def test_the_recipes_are_there() -> None:
    sizes = ["134m", "0.23b", "0.25b", "0.5b", "0.75b", "0.9b", "1.3b", "2b"]
    expected = [f"dense-{size}" for size in sizes] + ["gpt2-124m"] + [f"moe-{s}b" for s in ("0.25", "0.5", "1", "2")]
    assert sorted(expected) == MODELS


@pytest.mark.parametrize("model", MODELS)
def test_baseline_and_mixture_differ_in_the_mixture_alone(model: str) -> None:
    commands = {mixing: dry_run(model, mixing, RUN_DIR="run", **DATA) for mixing in MIXINGS}
    common = {mixing: words[: words.index("--moa-mixing")] for mixing, words in commands.items()}
    assert common["none"] == common["la"] == common["moa"]
    assert "--moa-keep-last" in common["none"]
    rest = {mixing: commands[mixing][len(common[mixing]) :] for mixing in MIXINGS}
    assert rest["none"] == ["--moa-mixing", "none"]
    assert rest["moa"] == ["--moa-mixing", "moa", *rest["la"][2:]]


@pytest.mark.parametrize("model", MODELS)
def test_budget_and_schedule_follow_the_models_file(model: str) -> None:
    words = dry_run(model, "moa", **DATA)
    batch, length = int(value(words, "--global-batch-size")), int(value(words, "--seq-length"))
    iterations = int(value(words, "--train-iters"))
    # Twenty tokens a parameter, within what the models' names round away.
    millions = {"m": 1, "b": 1000}[model[-1]] * float(model[:-1].split("-")[1])
    assert iterations * batch * length == pytest.approx(20e6 * millions, rel=0.02)
    assert value(words, "--lr-decay-iters") == str(iterations)
    assert int(value(words, "--lr-warmup-iters")) == pytest.approx(iterations / 50, abs=1)
    assert float(value(words, "--min-lr")) == pytest.approx(float(value(words, "--lr")) / 10)
    assert int(value(words, "--hidden-size")) == 64 * int(value(words, "--num-attention-heads"))


@pytest.mark.parametrize("model", MODELS)
def test_the_header_says_what_the_planner_says(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = (ROOT / f"examples/models/{model}.sh").read_text().split("source ")[0].splitlines()
    (command,) = (line for line in header if "tools/plan.py" in line)
    plan.main(shlex.split(command.partition("tools/plan.py")[2]))
    assert capsys.readouterr().out.splitlines() == [line for line in header if line.startswith(PLANNED)]
    (watch,) = (line for line in header if line.startswith("# Watch: "))
    assert "validation loss" in "".join(header[header.index(watch) :])


@pytest.mark.slow
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_trains_scaled_down(model: str, mixing: str, tmp_path: Path) -> None:
    words = dry_run(model, mixing, *small(model, mixing), RUN_DIR=str(tmp_path), **SMALL_BATCH)
    run = Run(*launch.launch(launch.script, (words[1], words[2:]), 1, tmp_path))
    assert run.returncode == 0, run.log[-6000:]
    assert list(run.losses) == [1, 2, 3]
    assert all(3 < loss < 7 for loss in run.losses.values())  # random tokens: about ln 128
    form = {"none": "none, stock"}.get(mixing, mixing)
    assert f"> mixture of activations: {form}" in run.log
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.slow
def test_the_script_itself_trains_and_goes_on(tmp_path: Path) -> None:
    """With Muon, WSD and two processes; the second start goes on from the first one's checkpoint."""
    settings = {
        "OPTIMIZER": "muon",
        "SCHEDULE": "wsd",
        "NPROC_PER_NODE": "2",
        "EP": "2",
        "RUN_DIR": str(tmp_path / "run"),
    }
    settings |= {**SMALL_BATCH, "TOKENS": "1280", "MASTER_PORT": str(launch.cpu._free_port())}  # 10 iterations
    flags = [flag for flag in small("moe-1b", "moa") if flag not in ("--train-iters", "3")]
    for exit_interval, seen in ((["--exit-interval", "6"], range(1, 7)), ([], range(7, 11))):
        done = run_example("pretrain.sh", "moe-1b", "moa", *flags, *exit_interval, folder=tmp_path, **settings)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        log = TrainingLog()
        for line in done.stdout.splitlines():
            log.read_line(line)
        assert [step.iteration for step in log.iterations] == list(seen)
    assert log.complete
    assert log.settings["optimizer"] == "muon"
    assert (tmp_path / "run" / "tensorboard").is_dir()


def test_variables_and_trailing_flags_override() -> None:
    words = dry_run(
        "dense-134m", "moa", "--lr", "5e-3", LR="2e-3", TOKENS="1048576000", PRECISION="fp32", SEED="7", **DATA
    )
    assert value(words, "--lr") == "5e-3"
    assert value(words, "--min-lr") == "0.0002"
    assert value(words, "--train-iters") == "2000"
    assert value(words, "--lr-warmup-iters") == "40"
    assert value(words, "--seed") == "7"
    assert "--bf16" not in words
    words = dry_run("moe-2b", "quadratic", TP="2", EP="4", PP="2", NPROC_PER_NODE="8", **DATA)
    assert words[1:5] == ["-m", "megatron_moa.launch", "--nproc-per-node", "8"]
    assert "--sequence-parallel" in words
    assert [value(words, f"--{name}-parallel-size") for name in ("tensor-model", "pipeline-model", "expert-model")] == [
        "2",
        "2",
        "4",
    ]
    assert words[words.index("--moa-mixing") :][:4] == ["--moa-mixing", "moa", "--moa-form", "quadratic"]


def test_several_nodes() -> None:
    where = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node-1", "MASTER_PORT": "1234", "NPROC_PER_NODE": "8"}
    words = dry_run("dense-2b", "moa", LAUNCH_ARGS="--log-dir logs --redirects 3", **where, **DATA)
    launcher = words[: words.index(str(ROOT / "pretrain_gpt_moa.py"))]
    expected = (
        "-m megatron_moa.launch --nproc-per-node 8 --nnodes 4 --node-rank 3 --master-addr node-1 --master-port 1234"
    )
    assert launcher[1:] == [*expected.split(), "--log-dir", "logs", "--redirects", "3"]


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({"DATA_PATH": "0.7 a 0.3 b"}, "--data-path 0.7 a 0.3 b --split 99,1,0"),
        (
            {"DATA_PATH": "a", "SPLIT": "95,5,0", "DATA_CACHE_PATH": "/c"},
            "--data-path a --split 95,5,0 --data-cache-path /c",
        ),
        ({"DATA_ARGS_PATH": "blend.txt"}, "--data-args-path blend.txt --split 99,1,0"),
        ({"TRAIN_DATA_PATH": "1 a 2 b", "VALID_DATA_PATH": "c"}, "--train-data-path 1 a 2 b --valid-data-path c"),
        (
            {"TOKENIZER_TYPE": "HuggingFaceTokenizer", "TOKENIZER_MODEL": "gpt2"},
            "--tokenizer-model gpt2 --data-path DATA_PATH",
        ),
    ],
)
def test_data(variables: dict[str, str], flags: str) -> None:
    assert f" {flags} --" in " ".join(dry_run("gpt2-124m", "type1", **variables))


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["dense-2b"], {}, "needs MODEL and MIXING"),
        (["dense-3b", "moa"], {}, "MODEL dense-3b: there is no such recipe; take one of: dense-0.23b "),
        (["dense-2b", "mao"], {}, "MIXING mao: unknown; take none, la, moa"),
        (["dense-2b", "moa"], {}, "DATA_PATH is not set"),
        (["dense-2b", "moa", "--mock-data"], {"OPTIMIZER": "sgdd"}, "OPTIMIZER sgdd: unknown; take one of: adamw muon"),
        (["dense-2b", "moa", "--mock-data"], {"SCHEDULE": "x"}, "SCHEDULE x: unknown; take one of: cosine wsd"),
        (["dense-2b", "moa", "--mock-data"], {"PRECISION": "fp8"}, "PRECISION fp8: unknown; take bf16 or fp32"),
        (["dense-2b", "moa", "--mock-data"], {"TOKENS": "10B"}, "TOKENS 10B: not a whole number"),
        (["dense-2b", "moa", "--mock-data"], {"LR": "fast"}, "LR fast: not a number"),
        (["dense-2b", "moa", "--mock-data"], {"EP": "4"}, "EP 4: dense-2b has no experts"),
        (["dense-2b", "moa", "--mock-data"], {"NNODES": "2"}, "MASTER_ADDR is not set"),
        (
            ["dense-2b", "moa", "--mock-data"],
            {"TOKENS": "9", "WARMUP_TOKENS": "9999999999"},
            "WARMUP_TOKENS 9999999999: ",
        ),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = run_example("pretrain.sh", *arguments, folder=tmp_path, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"pretrain.sh: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_models_file_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    shutil.copy(ROOT / "examples/models/gpt2-124m.sh", mine)
    text = mine.read_text().replace('"${BASH_SOURCE[0]%/*}/..', f'"{ROOT}/examples')
    mine.write_text(text.replace("--hidden-size 768", "--hidden-size 512"))
    words = dry_run(str(mine), "moa", **DATA)
    assert value(words, "--hidden-size") == "512"
    assert value(words, "--save") == "runs/mine-moa/checkpoints"


# Sweeps.

SWEEP = {**SMALL_BATCH, "MIXINGS": "none moa", "LRS": "1e-3 4e-3", "SEEDS": "1", "TOKENS": "1280"}


def sweep(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_example("sweep.sh", *arguments, folder=folder, **{**SWEEP, "SWEEP_DIR": "sweep", **variables})


def test_sweep_lists_its_runs(tmp_path: Path) -> None:
    done = sweep(tmp_path, "--list")
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["0", "sweep/none-lr1e-3-seed1"],
        ["1", "sweep/moa-lr1e-3-seed1"],
        ["2", "sweep/none-lr4e-3-seed1"],
        ["3", "sweep/moa-lr4e-3-seed1"],
    ]
    assert not list(tmp_path.iterdir())
    assert "there are 4 runs, 0 to 3" in sweep(tmp_path, "--run", "4").stderr
    assert sweep(tmp_path, "--run", "x").returncode == 2


@pytest.mark.slow
def test_sweep_goes_on_where_it_was_and_ends_with_a_table(tmp_path: Path) -> None:
    flags = ["--eval-iters", "1", *SHALLOW, "--mock-data", "--vocab-size", "128", "--num-workers", "0"]
    no_data = [flag for flag in flags if flag != "--mock-data"]
    assert "DATA_PATH is not set" in sweep(tmp_path, "--run", "0", *no_data).stderr
    assert not list(tmp_path.iterdir())

    environment = {**os.environ, **SWEEP, "SWEEP_DIR": "sweep", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENS": "12800000", "SAVE_INTERVAL": "1000000"}
    command = ["bash", str(ROOT / "examples/sweep.sh"), "--run", "2", *flags, "--log-interval", "1"]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "sweep/none-lr4e-3-seed1/train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and TrainingLog.read(log).iterations) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)  # saves and leaves
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 75, stderr
    stopped_at = TrainingLog.read(log).iterations[-1].iteration
    assert f"at {stopped_at}/" in sweep(tmp_path, "--list").stdout.splitlines()[2]

    changed = sweep(tmp_path, "--run", "2", *flags, "--log-interval", "1", TOKENS="25600000", SAVE_INTERVAL="1000000")
    assert changed.returncode == 2
    assert "was begun with other flags" in changed.stderr
    shutil.rmtree(log.parent)

    two = {"MIXINGS": "none la", "LRS": "4e-3"}
    for entry, backend in (("0", []), ("1", ["--moa-backend", "eager"])):
        done = sweep(tmp_path, "--run", entry, *flags, "--log-interval", "5", *backend, **two)
        assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in sweep(tmp_path, "--list", **two).stdout.splitlines()] == ["finished"] * 2
    before = log.stat().st_mtime_ns
    assert sweep(tmp_path, "--run", "0", *flags, **two).returncode == 0
    assert log.stat().st_mtime_ns == before
    table = sweep(tmp_path, "--table").stdout.splitlines()
    assert [row.split(" | ")[:2] for row in table[2:4]] == [["| none", "0.004"], ["| la", "0.004"]]


# Scripts.

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.sh", "**/*.sh", "**/*.sbatch", ".ci/run")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith((".venv", "runs", "build"))
)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS)))
def test_shellcheck(script: str) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "--external-sources", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
