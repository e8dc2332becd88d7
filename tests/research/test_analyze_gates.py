"""tools/analyze_gates.py on trained checkpoints: table, JSON, pictures and the LA say the same."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from megatron_moa.checkpoints.tensors import CheckpointTensors
from megatron_moa.errors import UserError
from tests.research.test_study_report import report_of, study, write
from tests.support import launch
from tests.support.training import ROOT
from tools import analyze_gates


def tool(*arguments: str | Path, code: int = 0) -> str:
    """What tools/analyze_gates.py prints."""
    target = (str(ROOT / "tools" / "analyze_gates.py"), list(map(str, arguments)))
    returncode, log = launch.launch(launch.script, target, 1, ROOT)
    assert returncode == code, log[-4000:]
    return log


@pytest.fixture(scope="module")
def analysed(trained: Path) -> tuple[dict[str, Any], str]:
    """Runs the tool on ``dense``, and returns its JSON and its output.

    The run writes into the folder ``out``, with an LA in ``la``.
    """
    flags = ["--tokens", "2000", "--fewest", "5", "--continued", trained / "continued.jsonl"]
    flags += ["--write-la", trained / "la", "--out", trained / "out"]
    log = tool(trained / "dense", trained / "text.jsonl", *flags)
    return json.loads((trained / "out" / "analysis.json").read_text()), log


@pytest.mark.slow
def test_a_run_says_the_same_in_table_json_and_pictures(analysed: tuple[dict[str, Any], str], trained: Path) -> None:
    analysis, log = analysed
    assert sorted(path.name for path in (trained / "out").iterdir()) == [
        "analysis.json",
        "curves.png",
        "gates.png",
        "report.md",
    ]
    for picture in ("curves.png", "gates.png"):
        assert matplotlib.image.imread(trained / "out" / picture)[..., :3].std() > 0.05  # something is drawn
    assert analysis["text"]["tokens"] == 1984  # 62 windows of 32
    assert (analysis["iteration"], analysis["text"]["window"]) == (2, 32)
    assert len(analysis["sampled_tokens"]) == 10
    assert [len(site["sampled"]) for site in analysis["sites"]] == [10, 10]
    assert [gate["name"] for gate in analysis["sites"][0]["gates"]] == ["silu", "tanh", "linear.silu", "linear.tanh"]
    for site in analysis["sites"]:
        for gate in site["gates"]:
            assert 0 < gate["std"] < 1
            assert gate["type_share"] + gate["context_share"] == pytest.approx(1, abs=1e-5)
            assert gate["type_share"] <= gate["type_share_naive"]
            assert all(entry["count"] >= 5 for entry in gate["most"])
            assert gate["most"][0]["mean"] > gate["mean"] > gate["least"][0]["mean"]
        # No gate has been trained much: four directions that vary.
        assert 1 < site["participation_ratio"] <= site["effective_rank"] <= 4
        assert 0 < site["output_change"] < 1
    rows = {row["name"]: row for row in analysis["ablation"]["rows"]}
    assert [row["kind"] for row in rows.values()] == [
        *("mean", "type mean", "permuted"),
        *["without"] * 6,
        *["layer mean"] * 2,
    ]
    report = (trained / "out" / "report.md").read_text()
    for row in rows.values():
        line = f"| {row['name']} | {row['difference']:+.4f} | {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f} |"
        assert line in log
        assert line in report
        assert row["interval"][0] < row["difference"] < row["interval"][1]
        assert row["loss"] - analysis["ablation"]["loss"] == pytest.approx(row["difference"], abs=2e-5)
    assert "| layer 2 | linear.tanh | " in report
    assert "| its gates frozen | 3 | 3.1990 | -0.0010 | -0.0035 to +0.0015 |" in log
    assert "from rate 0.001" in log


@pytest.mark.slow
def test_the_la_that_is_written_has_the_means_and_nothing_else_is_new(
    analysed: tuple[dict[str, Any], str], trained: Path
) -> None:
    analysis, log = analysed
    assert float(re.search(r"> wrote the LA, .* largest difference of logits (\S+) of", log)[1]) < 1e-5
    la, moa = CheckpointTensors(trained / "la" / "release"), CheckpointTensors(trained / "dense" / "iter_0000002")
    owner = "decoder.layers.mlp.coefficients."
    values = la.read(f"{owner}value")
    for site, row in zip(analysis["sites"], values, strict=True):
        assert [gate["mean"] for gate in site["gates"]] == pytest.approx(row.tolist(), rel=1e-5)
    model = {key for key in moa.tensors if not key.startswith(("optimizer.", "chained_", "rng_state"))}
    assert la.tensors.keys() - model == {f"{owner}value"}
    for key in la.tensors.keys() & model:
        if not key.endswith("_extra_state"):
            assert torch.equal(la.read(key), moa.read(key)), key
    # An LA has no gates to analyse, and says so.
    log = tool(trained / "la", trained / "text.jsonl", "--tokens", "2000")
    assert "there is no gate to analyse" in log
    assert "| without tanh, linear branch |" in log
    assert "at its mean" not in log
    assert re.search(
        r"\| layer 1 \| activated \| \S+ to \S+ \| 0\.00 \| - \| - \| - \| 0\.0 / 0\.0 of 4 \| 0 % \|", log
    )


@pytest.mark.slow
def test_grouped_experts_and_a_dataset(trained: Path) -> None:
    """Experts that were trained at once, on the part of a dataset that is asked for."""
    out = trained / "moe-out"
    flags = ["--part", "training", "--tokens", "1024", "--out", out, "--write-la", trained / "moe-la"]
    log = tool(trained / "moe", trained / "corpus", *flags)
    analysis = json.loads((out / "analysis.json").read_text())
    # Two of its experts see each token; --split was 90,5,5.
    assert [(site["title"], site["experts"], site["tokens"]) for site in analysis["sites"]] == [
        ("layer 1, routed experts", 4, 2048),
        ("layer 2, routed experts", 4, 2048),
    ]
    assert analysis["text"]["source"] == f"training part of {trained / 'corpus'}"
    assert "| between experts |" in log
    # One-sided: SiLU is fixed on W1's branch.
    assert [gate["name"] for gate in analysis["sites"][0]["gates"]] == ["linear.silu", "linear.relu2"]
    assert re.search(r"\| layer 2, routed experts \| linear \| \S+ to ", log)
    assert "| without relu2 |" in log
    assert "activated" not in log
    assert float(re.search(r"> wrote the LA, .* largest difference of logits (\S+) of", log)[1]) < 1e-5
    assert all(gate["expert_share"] > 0.01 for site in analysis["sites"] for gate in site["gates"])
    log = tool(trained / "moe", trained / "corpus", "--no-ablate")
    assert "validation part of" in log
    assert "Loss as it is" not in log


def test_a_report_of_a_study_has_the_real_analysis(
    analysed: tuple[dict[str, Any], str], trained: Path, tmp_path: Path
) -> None:
    analysis, _ = analysed
    folder = write(tmp_path / "study", study())
    (folder / "gates-tiny.json").write_text((trained / "out" / "analysis.json").read_text())
    text = report_of(tmp_path, folder)
    rows = {row["kind"]: row for row in analysis["ablation"]["rows"]}
    low, high = rows["mean"]["interval"]
    change = f"{rows['mean']['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    in_short = text.split("## What was run")[0]
    assert f"- [Trained gates](#trained-gates) replaced by their means: tiny {change}.\n" in in_short
    trained_on = "- tiny trained on with frozen gates, against training on as it is: "
    assert f"{trained_on}-0.0010 [-0.0035, +0.0015], 3 seeds.\n" in in_short
    section = text.split("## Trained gates")[1].split("\n## ")[0]
    assert "### tiny\n" in section
    for row in analysis["ablation"]["rows"]:
        assert f"| {row['name']} | {row['difference']:+.4f} |" in section
    assert "| collapsed to LA, which trains on | 3 | 3.2220 | +0.0220 | +0.0195 to +0.0245 |" in section
    assert f"`{analysis['command']}`" in section
    assert "was not run for this model" not in section


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stock", "text.jsonl"], r"stock: was trained with --moa-mixing none and has no coefficients; give one of"),
        (["dense", "nowhere.txt"], r"TEXT \S*nowhere.txt: no such file; check the path"),
        (["dense", "text.jsonl", "--tokens", "100"], r"TEXT: 100 tokens are fewer than 4 windows .* at least 128"),
        (["dense", "text.jsonl", "--part", "training"], r"--part training: \S*text.jsonl is no dataset's prefix"),
        (["dense", "corpus", "--write-la", "dense"], r"--write-la \S*dense: is a folder that is not empty"),
        (["la", "text.jsonl", "--write-la", "new"], r"--write-la \S*new: \S*la is an LA already; drop the flag"),
        (["dense", "text.jsonl", "--continued", "text.jsonl"], r"--continued \S*: is not what \S*continue_frozen.sh"),
        (["dense", "text.jsonl", "--continued", os.devnull], r"--continued /dev/null: is empty; give it when "),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, trained: Path, analysed: tuple[dict[str, Any], str]
) -> None:
    before = sorted(trained.iterdir())
    places = {"stock", "dense", "la", "text.jsonl", "nowhere.txt", "corpus", "new"}
    log = tool(*(trained / word if word in places else word for word in arguments), code=2)
    (line,) = [line for line in log.splitlines() if line.startswith("analyze_gates.py: error: ")]
    assert re.search(words, line), line
    assert "Traceback" not in log
    assert sorted(trained.iterdir()) == before


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        "[1]",
        "1",
        pytest.param("[" * 100_000, id="deep"),
        *(
            json.dumps({"way": "la", "seed": 1, "loss": 3.2, "iterations": 9, "tokens": 99, "lr": 0.1} | wrong)
            for wrong in (
                {"way": ["la"]},
                {"seed": "1"},
                {"loss": None},
                {"loss": True},
                {"loss": float("nan")},
                {"loss": 10**400},
                {"tokens": "99"},
                {"tokens": 9.5},
                {"lr": "0.1"},
            )
        ),
    ],
)
def test_trainings_that_went_on_are_checked_before_anything_is_loaded(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "continued.jsonl"
    path.write_text(wrong)
    with pytest.raises(UserError, match=r"^--continued \S+: is not what examples/studies/continue_frozen.sh writes; "):
        analyze_gates.read_continued(path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["no", "t.txt", "--out", "x", "--write-la", "./x"], "--write-la x: is --out's folder, or one lies in the"),
        (["no", "t.txt", "--out", "x/y", "--write-la", "x"], "--write-la x: is --out's folder, or one lies in the"),
        (["no", "t.txt", "--out", "x", "--write-la", "link/la"], "--write-la link/la: is --out's folder, or one"),
        (["export", "t.txt"], "export: is a Hugging Face folder; give the checkpoint that it was made of"),
        (["export", "t.txt", "--tokens", "0"], "argument --tokens: a number above 0 is wanted, not 0; see"),
        (["export", "t.txt", "--part", "test"], "argument --part: invalid choice: 'test'"),
        (["export"], "the following arguments are required: TEXT; see analyze_gates.py --help"),
    ],
)
def test_mistakes_that_need_no_checkpoint(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        analyze_gates.main(flags)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze_gates.py: error: ")
    assert words in error
    assert error.count("\n") == 1
