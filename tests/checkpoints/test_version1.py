"""Checkpoints that version 1's code made (tests/support/version1/README.md) load or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_moa.checkpoints.settings import FORMAT_VERSION
from megatron_moa.checkpoints.tensors import CheckpointTensors
from tests.support import launch
from tests.support.training import ROOT, Run
from tools import inspect_checkpoint

DATA = Path(__file__).resolve().parents[1] / "support/version1"
LOADS = ("bi-sided-moa", "bi-sided-la", "type1-moa", "stock")
REFUSED = {
    "one-sided-moa": "its one-sided form is of format version 1, in which it mixed W1's branch and left W2's linear, "
    "where SiLU now stays on W1's and W2's is mixed; ",
    "quadratic-la": "its quadratic form is of format version 1, in which it had K² coefficients, "
    "where now K(K+1)/2 are left, those of k <= l; ",
}
OLD_DICTIONARY = ["identity", "gelu", "silu", "relu", "leaky_relu", "relu2", "tanh"]
# What the checkpoints' own settings leave to a run.
ONE_MORE = (
    "--use-checkpoint-args --micro-batch-size 2 --global-batch-size 2 --train-iters 4 --lr 1e-3 --mock-data "
    "--split 90,5,5 --eval-iters 0 --log-interval 1 --num-workers 0 --no-load-optim --no-load-rng"
).split()


def run(script: str, *arguments: str | Path) -> Run:
    """A script of the project, in a process that has Megatron imported."""
    return Run(*launch.launch(launch.script, (str(ROOT / script), list(map(str, arguments))), 1, ROOT))


def use(folders: list[str], results: str) -> None:
    """Writes what today's code computes of them, as JSON; runs in a process of its own."""
    import megatron_moa

    report = {}
    for folder in folders:
        tokens = json.loads((DATA / folder / "logits.json").read_text())["tokens"]
        model = megatron_moa.from_checkpoint(DATA / folder, [] if folder == "stock" else ["--moa-backend", "eager"])
        report[folder] = {
            "logits": model.logits([tokens])[0].tolist(),
            "mixing": model.mixture and model.mixture.describe(),
        }
    Path(results).write_text(json.dumps(report))


def test_logits_are_those_of_version_1(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    code, log = launch.launch(use, (list(LOADS), str(results)), 0, tmp_path)
    assert code == 0, log[-4000:]
    report = json.loads(results.read_text())
    for name in LOADS:
        expected = torch.tensor(json.loads((DATA / name / "logits.json").read_text())["logits"])
        # Float32; sums over the hidden size may be taken in another order on another machine.
        torch.testing.assert_close(torch.tensor(report[name]["logits"]), expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.5
    dictionary = "+".join(OLD_DICTIONARY)
    assert {name: entry["mixing"] for name, entry in report.items()} == {
        "bi-sided-moa": f"moa, bi-sided, {dictionary}, sigmoid gates, output scale at step 0 matched to SwiGLU's",
        "bi-sided-la": f"la, bi-sided, {dictionary}, output scale at step 0 matched to SwiGLU's",
        "type1-moa": f"moa, type1, {'+'.join(OLD_DICTIONARY[1:])}, sigmoid gates and learned amplitude, "
        "output scale at step 0 matched to GELU's",
        "stock": None,
    }


@pytest.mark.parametrize("name", LOADS)
def test_training_goes_on(name: str, tmp_path: Path) -> None:
    shutil.copytree(DATA / name, tmp_path / "run")
    folders = ["--load", tmp_path / "run", "--save", tmp_path / "run", "--save-interval", "1"]
    backend = [] if name == "stock" else ["--moa-backend", "eager"]
    done = run("pretrain_gpt_moa.py", *ONE_MORE, *backend, *folders)
    assert done.returncode == 0, done.log[-4000:]
    assert list(done.losses) == [4]
    before, after = (CheckpointTensors(tmp_path / f"run/iter_000000{iteration}") for iteration in (3, 4))
    old, new = before.args, after.args
    assert (old.moa_format_version, new.moa_format_version) == (1, FORMAT_VERSION)
    if name == "stock":
        assert new.moa_mixing == "none"
    else:
        assert new.moa_activations == old.moa_activations == OLD_DICTIONARY["type1" in name :]
        assert (old.moa_init_scale, new.moa_init_scale) == ("swiglu", "matched")
        assert new.moa_init == ([1.0] if name == "bi-sided-moa" else [0.5])
        assert new.moa_gate_init_std == (0.02 if "la" in name else 0.2)
    assert not hasattr(new, "moa_la_init")
    for key in before.tensors:
        moved = (after.read(key) - before.read(key)).abs().max()
        if key.endswith(".scale"):
            assert moved == 0
        else:
            assert 0 < moved < 5e-3, key  # a step of Adam at 1e-3 away from the loaded ones, not from new ones


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("program", ["pretrain_gpt_moa.py", "generate.py", "convert_to_hf.py", "convert_mixing.py"])
def test_changed_forms_are_refused_in_one_line(name: str, program: str, tmp_path: Path) -> None:
    flags = {
        "pretrain_gpt_moa.py": [*ONE_MORE, "--save", tmp_path / "out", "--save-interval", "1"],
        "generate.py": ["--num-tokens", "1"],
        "convert_to_hf.py": ["--out", tmp_path / "out", "--no-tokenizer"],
        "convert_mixing.py": ["--out", tmp_path / "out", "--mixing", "moa"],
    }[program]
    script = program if program.startswith("pretrain") else f"tools/{program}"
    done = run(script, "--load", DATA / name, *flags)
    assert done.returncode == 2, done.log[-4000:]
    (line,) = [line for line in done.log.splitlines() if line.startswith(f"{program}: error: ")]
    assert line.startswith(f"{program}: error: --load {DATA / name}: iteration 3: {REFUSED[name]}")
    assert "Traceback" not in done.log
    assert not list(tmp_path.iterdir())


def test_a_named_form_is_refused_too(tmp_path: Path) -> None:
    """The same refusal without --use-checkpoint-args, where the settings given would fit."""
    settings = CheckpointTensors(DATA / "one-sided-moa/iter_0000003").args
    model = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 24 --swiglu --seq-length 16 "
    model += "--max-position-embeddings 16 --position-embedding-type rope --normalization RMSNorm "
    model += "--disable-bias-linear --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer "
    model += f"--vocab-size 63 --moa-form one-sided --moa-activations {' '.join(settings.moa_activations)}"
    flags = [*model.split(), *ONE_MORE[1:], "--save", tmp_path / "out", "--save-interval", "1"]
    done = run("pretrain_gpt_moa.py", "--load", DATA / "one-sided-moa", *flags)
    assert done.returncode == 2
    assert REFUSED["one-sided-moa"] in done.log
    assert not (tmp_path / "out").exists()


def test_from_checkpoint_raises_that_line() -> None:
    code, log = launch.launch(use, (["quadratic-la"], "none"), 0, ROOT)
    assert code == 1
    last = log.strip().splitlines()[-1]
    assert last.startswith("megatron_moa.errors.UserError: --load ")
    assert REFUSED["quadratic-la"] in last


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    inspect_checkpoint.main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_inspect_checkpoint_shows_todays_names(capsys: pytest.CaptureFixture[str]) -> None:
    about = json.loads(inspect(capsys, DATA / "bi-sided-moa", "--json"))
    assert about["format_version"] == 1
    assert about["settings"]["moa_init_scale"] == "matched"
    assert about["coefficient_names"] == [*OLD_DICTIONARY, *(f"linear.{name}" for name in OLD_DICTIONARY)]
    scale = CheckpointTensors(DATA / "bi-sided-moa/iter_0000003").read("decoder.layers.mlp.coefficients.scale")
    for entry, factor in zip(about["coefficients"], scale.flatten().tolist(), strict=True):
        assert entry["rows"]["at zero"] == pytest.approx([0.5 * factor] * 14)
    text = inspect(capsys, DATA / "type1-moa")
    assert "--moa-init 0.5 --moa-gate-init-std 0.2 --moa-init-scale matched" in text
    assert "| layer | place | what | gelu | silu | relu | leaky_relu | relu2 | tanh |" in text


@pytest.mark.parametrize("name", REFUSED)
def test_inspect_checkpoint_does_not_take_changed_forms_for_todays(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is in it can still be looked up; no coefficient gets a name of today's form."""
    text = inspect(capsys, DATA / name)
    assert f"mixture:   not computed here: {REFUSED[name]}" in text
    assert "| decoder.layers.mlp.linear_fc1.weight | 1×48×16 |" in text
    about = json.loads(inspect(capsys, DATA / name, "--json"))
    assert (about["coefficient_names"], about["coefficients"]) == ([], [])
    assert about["settings"]["moa_la_init"] == [0.5]
    compared = json.loads(inspect(capsys, DATA / name, "--diff", DATA / name, "--json"))
    assert compared["settings"] == {}
