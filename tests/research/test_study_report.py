"""Tests what tools/study_report.py says of lines whose truth is known.

Lines that are missing and lines that are broken are tested, too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.research.study.arms import ARMS, Arm
from megatron_moa.research.study.claims import CLAIMS, MIXED, judge
from megatron_moa.research.study.evidence import read_evidence
from megatron_moa.research.study.paper import reported
from megatron_moa.research.study.report.claims import tally
from megatron_moa.research.study.report.words import difference_text
from megatron_moa.research.study.statistics import BETTER, UNDECIDED, UNTUNED, WORSE
from tests.research.test_study_statistics import SETTING, line, seeds, tried
from tests.support.training import ROOT
from tools import study_report

# Differences to SwiGLU of the arms in the studies below, and the rates at which they are best.
TRUTH = {
    "swiglu": 0.0,
    "swiglu-scaled": -0.03,
    "la-bi-sided-half": -0.05,
    "moa-bi-sided": -0.06,
    "la-bi-sided-matched": 0.02,
    "moa-bi-sided-matched": 0.02,
    "swiglu-params": -0.01,
    "swiglu-half": 0.2,
}
COMMAND = [
    "docs/results/study",
    "docs/results/study-h200",
    "docs/results/study-forms",
    "docs/results/study-moe",
    "docs/results/study-tables",
    "--out",
    "docs/evidence.md",
]


def study(count: int = 3, **where: Any) -> list[dict[str, Any]]:
    """Lines of :data:`TRUTH`: seeds differ by 0.1, what is not shared among arms by 0.001."""
    draw = np.random.default_rng(1)
    lines = []
    for arm, difference in TRUTH.items():
        losses = [3.0 + 0.1 * seed + difference + draw.normal(0, 0.001) for seed in range(count)]
        lines += seeds(arm, losses, **where)
        lines += [line(arm, losses[0] + 0.05, rate=0.004, **where), line(arm, losses[0] + 0.1, rate=0.016, **where)]
    return lines + seeds("swiglu-again", [3.05, 3.03, 3.22][:count], **where)


def write(folder: Path, lines: Sequence[dict[str, Any]], name: str = "results.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(content) + "\n" for content in lines))
    return folder


def report_of(tmp_path: Path, *folders: Path) -> str:
    study_report.main([*map(str, folders), "--out", str(tmp_path / "report.md")])
    return (tmp_path / "report.md").read_text()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong call prints."""
    with pytest.raises(SystemExit) as left:
        study_report.main([*map(str, arguments)])
    assert left.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("study_report.py: error: ")
    assert text.count("\n") == 1
    return text


def row(text: str, *cells: str) -> list[str]:
    """The one table row that begins so."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {' | '.join(cells)} |")]
    assert len(rows) == 1, (cells, rows)
    return [cell.strip() for cell in rows[0]]


def test_the_committed_report_is_what_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in COMMAND[:-2]:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    study_report.main(COMMAND)
    assert (tmp_path / "docs/evidence.md").read_text() == (ROOT / "docs/evidence.md").read_text()
    new, committed = (sorted((root / "docs/evidence").iterdir()) for root in (tmp_path, ROOT))
    assert [path.name for path in new] == [path.name for path in committed]
    for one, other in zip(new, committed, strict=True):
        pixels = [matplotlib.image.imread(path) for path in (one, other)]
        assert pixels[0].shape == pixels[1].shape, one.name
        # Fonts come with matplotlib; what is left is how a CPU rounds the edges of lines.
        assert (np.abs(pixels[0] - pixels[1]) > 0.1).mean() < 1e-4, one.name


def test_the_readmes_short_form_is_what_the_committed_lines_say() -> None:
    text = (ROOT / "README.md").read_text().split("## What it gives")[1].split("\n## ")[0]
    results = read_evidence([ROOT / folder for folder in COMMAND[:-2]]).results
    setting = ("python", "0_2M-batch-8", 5_120_000, "adamw", "cosine")

    def cells(arm: str, baseline: str, corpus: str = "python") -> list[str]:
        known = results.difference((corpus, *setting[1:]), arm, baseline)
        if known is None:
            return ["", "", ""]
        number, interval = difference_text(known).split(" ", 1)
        number = f"**{number}**" if known.verdict in (BETTER, WORSE) else number
        papers = reported(arm, "dense-0.12b", 2_400_000_000)
        return [f"{number} {interval}", str(known.count), f"{papers[0]:+.3f}" if papers else ""]

    shown = []
    for form, title in {"type1": "Type I", "one-sided": "", "bi-sided": "", "quadratic": ""}.items():
        baseline = "relu2" if form == "type1" else "swiglu"
        shown.append([title or form, *cells(f"moa-{form}", baseline), *cells(f"moa-{form}-softmax", baseline)])
    shown.append(["bi-sided, English text", *cells("moa-bi-sided", "swiglu", "english"), "", "", ""])
    for arm, title in {"moa-bi-sided-matched": "bi-sided, `matched`", "swiglu-scaled": "SwiGLU, scaled up"}.items():
        shown.append([title, *cells(arm, "swiglu"), "", "", ""])
    for row in shown:
        assert " ".join(f"| {' | '.join(row)} |".split()) in text.splitlines()
    # No other figure is there.
    signed = r"[-+]\d+\.\d+"
    assert sorted(re.findall(signed, text)) == sorted(re.findall(signed, str(shown)))

    def verdicts_on(arm: str) -> list[str]:
        known = [results.difference(setting, arm, "swiglu") for setting in results.settings]
        return [difference.verdict for difference in known if difference is not None and difference.count > 1]

    text = " ".join(text.split())
    assert (sorted(verdicts_on("moa-bi-sided")), verdicts_on("swiglu-scaled")) == (
        sorted([*[WORSE] * 3, *[UNDECIDED] * 2]),
        [WORSE] * 2,
    )
    assert "in three of four dense settings with several seeds, undecided in the fourth and in a MoE." in text
    assert "SwiGLU scaled up as much is worse, too." in text
    softmax = results.difference(setting, "moa-type1-softmax", "relu2")
    assert ("Type I MoA with softmax gates is better than ReLU2." in text) == (softmax.verdict == BETTER)
    several = verdicts_on("moa-bi-sided-matched")
    words = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    better, worse = (several.count(verdict) for verdict in (BETTER, WORSE))
    assert better + worse + several.count(UNDECIDED) == len(several)
    assert f"it is better in {words[better]} of {words[len(several)]} settings, worse in {words[worse]}." in text
    assert f"writes it from {len(results.lines)} runs" in text
    verdicts = [(claim, judge(results, claim)) for claim in CLAIMS]
    not_run = sum(verdict.word in (UNDECIDED, MIXED) and not verdict.deciding for _, verdict in verdicts)
    assert f"{tally(verdicts)}, {words[not_run]} of them without a run." in text


def test_what_is_due_to_what(tmp_path: Path) -> None:
    text = report_of(tmp_path, write(tmp_path / "study", study()))
    for what, arm, to, difference, verdict in (
        ("scale at the start", "swiglu-scaled", "swiglu", -0.03, "**better**"),
        ("dictionary", "la-bi-sided-half", "swiglu-scaled", -0.02, "**better**"),
        ("token adaptivity", "moa-bi-sided", "la-bi-sided-half", -0.01, "**better**"),
        ("all three", "moa-bi-sided", "swiglu", -0.06, "**better**"),
        ("dictionary", "la-bi-sided-matched", "swiglu", 0.02, "**worse**"),
        ("token adaptivity", "moa-bi-sided-matched", "la-bi-sided-matched", 0.0, "undecided"),
        ("equal parameters", "moa-bi-sided", "swiglu-params", -0.05, "**better**"),
        ("nothing, other seeds", "swiglu-again", "swiglu", 0.0, "undecided, as it must be"),
        ("half the width", "swiglu-half", "swiglu", 0.2, "worse, as it must be"),
    ):
        cells = row(text, what, ARMS[arm].title, ARMS[to].title)
        mean, low, high = map(float, re.findall(r"[-+]\d\.\d+", cells[3]))
        assert low <= mean <= high
        assert mean == pytest.approx(difference, abs=0.003), what
        assert cells[4:] == ["3", verdict], what
    assert "Of 4 gated mixtures, against tuned SwiGLU: 2 better, 2 worse." in text
    assert "Letting gates set the coefficients token by token lowers the loss by 0.0" in text
    assert "makes no difference that 3 seeds decide" in text
    assert "**Many comparisons.**" in text
    equal = text.split("### At equal cost")[1].split("###")[0]
    assert "Missing, for want of runs: equal step time, equal step time, SwiGLU's scale.\n" in equal


def test_what_fades_over_steps(tmp_path: Path) -> None:
    """Checks the report on an arm that begins 0.8 above its baseline and ends 0.1 above it.

    Another arm has a single point, and another one seed.
    """
    lines = study()
    for arm, start in (("moa-type1", 0.8), ("la-type1", 0.8), ("relu2", 0.0)):
        for seed, draw in enumerate((0.0, 0.01, -0.01)[: 1 if arm == "la-type1" else 3], start=1):
            end = 3.0 + 0.1 * seed + start / 8 + (draw if start else 0.0)
            for rate in (0.004, 0.008, 0.016):
                lines.append(line(arm, end + abs(rate - 0.008), rate=rate, seed=seed))
                for point, (tokens, loss) in enumerate(lines[-1]["loss"]):
                    lines[-1]["loss"][point] = tokens, loss + start * (1 - tokens / 2e6) * 7 / 8
    for content in lines:
        if content["cell"]["arm"] == "swiglu-half":
            del content["loss"][:-1]
    text = report_of(tmp_path, write(tmp_path / "study", lines)).split("## Against steps")[1].split("\n## ")[0]
    setting = "python, size 0.4M, 2M tokens, AdamW, cosine"
    cells = row(text, setting, "Type I MoA minus ReLU2, 3 seeds")[2:]
    means, halves = zip(*(map(float, cell.split(" ± ")) for cell in cells), strict=True)
    # The mean of the two points in each eighth, of which the loss itself is the same in both arms.
    expected = [0.1 + 0.7 * (1 - part + 1 / 32) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)]
    assert means == pytest.approx(expected, abs=6e-4)
    assert set(halves) == {0.025}  # Student's t of three, 4.303, times 0.01 / sqrt(3)
    assert row(text, setting, "SwiGLU, half as wide minus SwiGLU, 3 seeds")[2:6] == [""] * 4
    assert "Type I LA" not in text


def test_what_is_not_tuned_is_not_decided(tmp_path: Path) -> None:
    lines = [line("swiglu", loss, rate=rate) for rate, loss in ((0.004, 3.1), (0.008, 3.0), (0.016, 3.3))]
    lines += [line("la-bi-sided-matched", loss, rate=rate) for rate, loss in ((0.004, 2.9), (0.008, 3.1))]
    lines += [line("moa-bi-sided-matched", loss, rate=rate) for rate, loss in ((0.008, 3.1), (0.016, 3.2))]
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    assert row(text, "dictionary", ARMS["la-bi-sided-matched"].title)[3:] == [
        "≤ -0.1000",
        "1",
        "not decided by one seed",
    ]
    assert row(text, "token adaptivity", ARMS["moa-bi-sided-matched"].title)[3::2] == ["? +0.2000", UNTUNED]
    assert row(text, "both", ARMS["moa-bi-sided-matched"].title)[3::2] == ["≤ +0.1000", UNTUNED]


def test_a_control_that_fails_is_said_to(tmp_path: Path) -> None:
    lines = [*tried("swiglu", [3.0, 3.1, 3.2]), *seeds("swiglu-again", [2.8, 2.9001, 3.0002])]
    text = report_of(tmp_path, write(tmp_path / "study", [*lines, *tried("swiglu-half", [3.0, 3.2, 3.1])]))
    assert row(text, "nothing, other seeds")[5] == "better, **as it must not be**"
    assert row(text, "half the width")[5] == "undecided, **as it must not be**"


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    text = report_of(tmp_path, write(tmp_path / "study", study(1)))
    cells = row(text, "half the width")
    assert float(cells[3]) == pytest.approx(0.2, abs=0.005)  # and no interval
    assert cells[4:] == ["1", "not decided by one seed"]
    assert not re.search(r"\*\*(better|worse)\*\*", text)
    assert "nan" not in text
    assert "Many comparisons" not in text


def test_rates_at_the_end_and_runs_that_diverged_are_named(tmp_path: Path) -> None:
    lines = [line("swiglu", loss, rate=rate) for rate, loss in ((0.004, 3.1), (0.008, 3.0), (0.016, 3.3))]
    lines += [
        line("moa-bi-sided", loss, rate=rate)
        for rate, loss in ((0.004, 3.2), (0.008, 3.1), (0.016, 2.9), (0.032, None))
    ]
    lines += [line("moa-bi-sided", None, rate=0.016, seed=2), line("la-bi-sided-half", 3.0), line("gelu", None)]
    lines += [line("moa-bi-sided-matched", loss, rate=rate) for rate, loss in ((0.004, 3.2), (0.008, 3.1))]
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    cells = row(text.split("## The main setting")[1].split("##")[0], "bi-sided MoA", "0.016")
    assert cells[2:4] == ["0.004: 3.2000, 0.008: 3.1000, 0.016: 2.9000, 0.032: diverged", "1 (2 diverged)"]
    assert row(text, "bi-sided MoA, scale matched to SwiGLU", "0.008, **at the end**")
    assert row(text, "bi-sided LA from 0.5", "0.008, **the only one**")
    assert row(text, "GELU", "none")
    limits = text.split("## What is not shown")[1].split("##")[0]
    assert (
        "at the end of what was tried: in python, size 0.4M, 2M tokens, AdamW, cosine: "
        "bi-sided MoA, scale matched to SwiGLU.\n" in limits
    )
    assert "one alone was tried: in python, size 0.4M, 2M tokens, AdamW, cosine: bi-sided LA from 0.5.\n" in limits
    assert (
        "diverged: bi-sided MoA at 0.032, seed 1 (python, size 0.4M, 2M tokens, AdamW, cosine); "
        "bi-sided MoA at 0.016, seed 2" in limits
    )
    assert "Muon, WSD, a MoE" in limits
    assert "the paper begins at 42M and 2400M" in limits


def test_a_study_of_which_everything_diverged(tmp_path: Path) -> None:
    text = report_of(tmp_path, write(tmp_path / "study", [{**line("moa-bi-sided", None), "loss": []}]))
    assert row(text, "bi-sided MoA", "none")[2] == "no finite loss of seed 1"
    assert "- 1 run of 1 arm, 1 diverged." in text
    assert "SwiGLU has no finished run" in text


def test_larger_rates(tmp_path: Path) -> None:
    lines = [*seeds("swiglu", [3.0, 3.1, 3.2]), *seeds("swiglu", [3.2, 3.31, 3.4], rate=0.016)]
    lines += [
        *seeds("moa-bi-sided", [2.9, 3.0, 3.1], rate=0.016),
        *seeds("moa-bi-sided", [2.95, 3.05, 3.15], rate=0.032),
    ]
    lines += [line("moa-bi-sided", None, rate=0.064), line("moa-bi-sided", 3.3)]
    text = report_of(tmp_path, write(tmp_path / "study", lines)).split("## Larger learning rates")[1]
    assert row(text, "bi-sided MoA", "0.016")[4:] == [
        "? -0.1533 [-0.1677, -0.1390]",
        "not decided: best rate not found",
    ]
    assert "is **not decided** for bi-sided MoA: its best rate is 2 times SwiGLU's" in text
    lines.append(line("swiglu", 3.1, rate=0.004))
    lost = [*lines, line("moa-bi-sided", None, rate=0.016, seed=4)]
    text = report_of(tmp_path, write(tmp_path / "lost", lost)).split("## Larger learning rates")[1]
    assert row(text, "bi-sided MoA", "0.016")[5] == "not decided: a run diverged"
    assert "is **not decided** for bi-sided MoA" in text
    text = report_of(tmp_path, write(tmp_path / "study", lines)).split("## Larger learning rates")[1]
    assert row(text, "SwiGLU", "0.008")[2:4] == ["+0.2033", "not run"]
    cells = row(text, "bi-sided MoA", "0.016")
    assert cells[2:4] == ["+0.0500", "1 of 1 diverged"]
    assert cells[4].startswith("-0.1533 [")
    assert cells[5] == "bears more"
    assert "is **seen** for bi-sided MoA: its best rate is 2 times SwiGLU's" in text


def test_fits_where_there_are_sizes_enough(tmp_path: Path) -> None:
    lines = []
    for size in (1, 2, 4, 8):
        for arm, floor in (("swiglu", 2.0), ("moa-bi-sided", 1.9)):
            losses = [floor + size**-0.5 + offset for offset in (0.0, 0.001, -0.001)]
            where = {"setting": ("python", f"{size}M", *SETTING[2:]), "non_embedding": size * 10**6}
            lines += tried(arm, losses, **where)
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    cells = row(text.split("L = E + A N^-a over sizes")[1], "bi-sided MoA", "4")
    values = [tuple(map(float, cell.split(" ± "))) for cell in cells[2:]]
    for (value, half), truth in zip(values, (1.9, 1.0, 0.5), strict=True):
        assert abs(value - truth) <= half < 0.2
    overview = text.split("### The same steps in every setting, with the paper's coefficients")[1].split("##")[0]
    assert row(overview, "python, size 8M, 2M tokens, AdamW, cosine")[4].startswith("**-0.1000 ±")
    assert (tmp_path / "report" / "parameters-python-1M-2M-adamw-cosine.png").exists()
    few = report_of(tmp_path, write(tmp_path / "few", lines[:30]))
    assert "needs 4 sizes or budgets of an arm, all else equal; there are at most 3 and 1." in few


def test_time_is_the_time_of_steps_measured_apart(tmp_path: Path) -> None:
    folder = write(tmp_path / "study", study())
    times = {"swiglu": 100.0, "moa-bi-sided": 110.0, "la-bi-sided-half": 105.0}
    timing = {"size": "0_4M", "optimizer": "adamw", "milliseconds": times, "machine": "2 CPU cores", "date": "today"}
    timing |= {"equal_time_width": 288, "rounds": 15, "threads": 1}
    earlier = {**timing, "milliseconds": {"swiglu": 90.0}}
    write(folder, [earlier, timing], "timing.jsonl")
    text = report_of(tmp_path, folder)
    assert row(text, "bi-sided MoA", "110.0") == ["bi-sided MoA", "110.0", "1.100"]
    left = (
        next(line for line in text.splitlines() if line.startswith("Not timed")).split(": ")[1].rstrip(".").split("; ")
    )
    assert left == [ARMS[arm].title for arm in [*TRUTH, "swiglu-again"] if arm not in times]
    assert "median of 15, the arms' steps in turn, 1 thread" in text
    assert "SwiGLU takes MoA's time with f = 288." in text
    assert (tmp_path / "report" / "time.png").exists()


def test_what_the_gates_do_is_told_by_their_own_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"type_share": 0.6, "type_share_naive": 0.7, "context_share": 0.4, "position_share": 0.1}
    gate = {"name": "silu", "mean": 0.5, "std": 0.1, "std_over_mean": 0.2, **shares, "most": [], "least": []}
    site = {"title": "layer 1", "experts": 1, "coefficients": 2, "effective_rank": 1.5, "participation_ratio": 1.2}
    rows = [
        {"name": "their means", "kind": kind, "difference": 0.031, "interval": [0.02, 0.042]}
        for kind in ("mean", "type mean")
    ]
    content = {
        "name": "a/checkpoint",
        "iteration": 976,
        "command": "python tools/analyze_gates.py a/checkpoint text.txt",
        "machine": "2 CPU cores",
        "date": "2026-11-24",
        "text": {"tokens": 9, "documents": 1, "source": "t", "types": 3, "windows": 1, "window": 9, "fewest": 2},
        "mixing": {"description": "MoA of a kind", "mixing": "moa", "form": "bi-sided", "activations": ["silu"]},
        "sites": [{**site, "output_change": 0.3, "gates": [gate, gate], "sampled": [[0.4, 0.6]]}],
        "ablation": {"loss": 3.0, "windows": 1, "clusters": 5, "over": "documents", "rows": rows},
    }
    folder = write(tmp_path / "study", study())
    (folder / "gates-0.4M.json").write_text(json.dumps(content))
    text = report_of(tmp_path, folder)
    short, gates = text.split("## What was run")[0], text.split("## Trained gates")[1]
    assert "- [Trained gates](#trained-gates) replaced by their means: 0.4M +0.0310 [+0.0200, +0.0420]." in short
    assert "### 0.4M\n" in gates
    assert "Loss as it is: 3.0000" in gates
    assert "](report/gates-0.4M.png)" in gates
    assert "What trained gates do: there is no analysis" not in text
    assert gates.count("Medians over a branch's gates") == gates.count("Not shown: this is one") == 1

    for key, value in (("text", 3), ("sites", {"a": 1}), ("ablation", {"rows": 2}), ("mixing", {"mixing": "moa"})):
        (folder / "gates-0.4M.json").write_text(json.dumps(content | {key: value}))
        said = error_of(capsys, folder, "--out", tmp_path / "a.md")
        assert "gates-0.4M.json: is not what tools/analyze_gates.py writes" in said
    sites = [content["sites"][0] | {"sampled": [[0.4]]}]
    (folder / "gates-0.4M.json").write_text(json.dumps(content | {"sites": sites}))
    assert "gates-0.4M.json: is not what" in error_of(capsys, folder, "--out", tmp_path / "a.md")
    (folder / "gates-0.4M.json").write_text(json.dumps(content))

    del content["ablation"]
    alone = content | {"name": "b/checkpoint", "sites": [content["sites"][0] | {"coefficients": 9}]}
    (folder / "gates-1M.json").write_text(json.dumps(alone))
    both = report_of(tmp_path, folder)
    gates = both.split("## Trained gates")[1]
    change = "+0.0310 [+0.0200, +0.0420]"
    assert row(gates, "0.4M") == ["0.4M", "60 %", "1.5 to 1.5 of 2", "3.0000", change, change]
    assert "| 1M | 60 % | 1.5 to 1.5 of 9 |  |  |  |  |\n" in gates
    assert gates.count("Medians over a branch's gates") == gates.count("Not shown: this is one") == 1
    assert gates.count("Training on with frozen or collapsed gates was not run for this model.") == 2


def test_settings_of_all_kinds_and_tables_that_can_be_read(tmp_path: Path) -> None:
    lines = study()
    lines += study(2, setting=("python", "0_4M", 4_000_000, "adamw", "cosine"))
    lines += study(1, setting=("english", "0_4M", 2_000_000, "muon", "wsd"))
    lines += [line("a-layer-of-tomorrow", 3.0), line("moa-bi-sided", 3.0, setting=("english", "3M", *SETTING[2:]))]
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    assert max(line.count("|") for line in text.splitlines()) == 8
    shown = re.findall(r"\]\(report/([^)]+)\)", text)
    assert sorted(shown) == sorted(path.name for path in (tmp_path / "report").iterdir())
    assert "a-layer-of-tomorrow" in text
    assert "SwiGLU has no finished run here" in text
    assert "bi-sided MoA, against SwiGLU, in 3 settings: 2 better, 1 not decided by one seed." in text
    assert "Does it pay" in text.splitlines()[0]
    assert "against tuned SwiGLU" in "\n".join(text.splitlines()[:20])


def test_the_same_lines_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "study", study())
    monkeypatch.chdir(tmp_path)
    found = []
    for _ in range(2):
        study_report.main(["study", "--out", "report.md"])
        files = [Path("report.md"), *sorted(Path("report").iterdir())]
        found.append([(path.name, path.read_bytes()) for path in files])
        matplotlib.rcParams["lines.linewidth"] = 7.0  # what a user has configured takes no part
    matplotlib.rcdefaults()
    assert found[0] == found[1]
    assert "`python tools/study_report.py study --out report.md`" in Path("report.md").read_text()


def test_folders_of_two_machines_are_one_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = study()
    whole = report_of(tmp_path, write(tmp_path / "whole", lines))
    one, other = write(tmp_path / "one", lines[:20]), write(tmp_path / "other", lines[18:])
    parts = report_of(tmp_path, one, other)
    assert parts.splitlines()[4:] == whole.splitlines()[4:]
    contradicting = write(tmp_path / "third", [{**lines[0], "final": 2.0}])
    text = error_of(capsys, one, contradicting, "--out", tmp_path / "new.md")
    assert f"{contradicting / 'results.jsonl'}: the run python-0_4M-2M" in text
    assert not (tmp_path / "new.md").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no finished run; let tools/study.py finish one"),
        ("{\n", "line 1 is not JSON"),
        ("7\n", "line 1 7: must be a table"),
        ('{"cell": {}}\n', "line 1: final: is missing; delete that line"),
        (
            json.dumps({**line("moa-bi-sided", 3.0), "cell": {"arm": "moa-bi-sided"}}) + "\n",
            "line 1: cell: corpus: is missing",
        ),
    ],
)
def test_broken_results_are_one_line(
    content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "study", [])
    (folder / "results.jsonl").write_text(content)
    text = error_of(capsys, folder, "--out", tmp_path / "new.md")
    assert f"{folder / 'results.jsonl'}: {words}" in text
    assert os.listdir(tmp_path) == ["study"]


def test_what_cannot_be_read_or_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "study", [line("moa-bi-sided", 3.0)])
    assert "holds no results.jsonl" in error_of(capsys, tmp_path, "--out", tmp_path / "a.md")
    assert "ends in .md" in error_of(capsys, folder, "--out", tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    text = error_of(capsys, "study", "--out", "study.md")  # beside it: the results
    assert "error: --out study.md: its pictures' folder study: holds results.jsonl, which is not of" in text
    assert (folder / "results.jsonl").exists()
    (folder / "gates-x.json").write_text("{")
    assert "gates-x.json: is not JSON" in error_of(capsys, folder, "--out", tmp_path / "a.md")
    (folder / "gates-x.json").write_text('{"name": "x"}')
    text = error_of(capsys, folder, "--out", tmp_path / "a.md")
    assert "gates-x.json: is not what tools/analyze_gates.py writes (KeyError: 'text'); copy its analysis.json" in text
    (folder / "gates-x.json").unlink()
    write(folder, [{"size": "1M"}], "timing.jsonl")
    assert "timing.jsonl: line 1: optimizer: is missing" in error_of(capsys, folder, "--out", tmp_path / "a.md")
    assert os.listdir(tmp_path) == ["study"]


def test_an_old_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    report_of(tmp_path, write(tmp_path / "study", study()))
    assert len(list((tmp_path / "report").iterdir())) > 2
    text = report_of(tmp_path, write(tmp_path / "study", [line("moa-bi-sided", 3.0)]))
    assert [path.name for path in (tmp_path / "report").iterdir()] == re.findall(r"\]\(report/([^)]+)\)", text)
    assert sorted(os.listdir(tmp_path)) == ["report", "report.md", "study"]


def test_what_the_report_did_not_write_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write(tmp_path / "study", study(1)[:3]), tmp_path / "report.md"
    mine = tmp_path / "report" / "differences.png"  # as a picture of the report's is named
    mine.parent.mkdir()
    mine.write_text("mine")
    assert "report: holds differences.png, which is not of" in error_of(capsys, folder, "--out", out)
    out.write_text("Mine: ![](report/differences.png)")
    assert f"--out {out}: is there, and no report of study_report.py; name" in error_of(capsys, folder, "--out", out)
    out.write_bytes(b"\xe9")
    assert f"--out {out}: is there, and no report of study_report.py; name" in error_of(capsys, folder, "--out", out)
    assert (out.read_bytes(), mine.read_text()) == (b"\xe9", "mine")
    mine.unlink()
    out.unlink()
    report_of(tmp_path, folder)
    mine.write_text("mine")
    assert "report: holds differences.png" in error_of(capsys, folder, "--out", out)
    assert mine.read_text() == "mine"


def test_best_rates_and_missing_arms_over_all_settings(tmp_path: Path) -> None:
    other = ("python", "0_4M", 2_000_000, "muon", "cosine")
    lines = study()
    for rate, loss in ((0.004, 3.2), (0.008, 3.1), (0.016, 3.3)):
        lines.append(line("swiglu", loss, rate=rate, setting=other))
    lines += [
        line("moa-bi-sided", 3.1, rate=0.008, setting=other),
        line("moa-bi-sided", 3.0, rate=0.016, setting=other),
    ]
    lines.append(line("moa-bi-sided-matched", 3.1, setting=other))
    lines.append(line("gelu", 3.1, setting=other))
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    rates = text.split("### Best rates in every setting")[1].split("##")[0]
    # SwiGLU; LA and MoA with the paper's coefficients and at SwiGLU's scale
    known = "0.008 (+0.1000)"
    assert row(rates, "python, size 0.4M, 2M tokens, AdamW, cosine")[1:] == [known, "", known, known, known]
    cells = row(rates, "python, size 0.4M, 2M tokens, Muon, cosine")[1:]
    assert cells == ["0.008 (+0.2000)", "", "", "≥ 0.016", "0.008 (?)"]
    limits = text.split("## What is not shown")[1].split("##")[0]
    assert "- What needs these arms, not run in the main setting but in others: GELU.\n" in limits
    assert "not run: bi-sided LA; one-sided LA;" in limits


def test_the_papers_rows_stand_beside_what_it_reports(tmp_path: Path) -> None:
    lines = [*tried("swiglu", [3.0, 3.1, 3.2]), *tried("relu2", [2.9, 3.0, 3.1])]
    lines += [*tried("la-one-sided", [2.99, 3.09, 3.19]), *tried("moa-type1-softmax", [2.92, 3.02, 3.12])]
    lines += [*tried("moa-bi-sided", [2.95, 3.05, 3.15]), line("la-type1", None)]
    text = report_of(tmp_path, write(tmp_path / "study", lines)).split("## Beside the paper")[1].split("\n## ")[0]
    # Type I is compared with ReLU2, Type II with SwiGLU; ReLU2 itself with SwiGLU.
    for arm, to, difference, paper in (
        ("one-sided LA", "SwiGLU", "-0.0100", "-0.015 (dense-0.12b, table 1)"),
        ("bi-sided MoA", "SwiGLU", "-0.0500", "-0.029 (dense-0.12b, table 2)"),
        ("Type I MoA, softmax gates", "ReLU2", "+0.0200", "-0.015 (dense-0.12b, table 1)"),
        ("ReLU2", "SwiGLU", "-0.1000", "-0.011 (dense-0.12b, curve)"),
    ):
        cells = row(text, arm, "0.008")
        assert (cells[3], cells[4].split(" [")[0], cells[6]) == (to, difference, paper), arm
    assert row(text, "Type I LA", "none, all diverged")
    assert "one-sided MoA" not in text  # was not run
    assert reported("moa-one-sided", "moe-0_8b", 28_120_000_000) == (-0.011, "moe-0.8b, curve")
    assert reported("moa-quadratic", "dense-0_12b", 12_000_000_000)[0] == -0.011
    assert reported("moa-bi-sided", "dense-0_12b", 12_000_000_000) is None  # its curve is missing


def test_a_study_of_own_arms_has_no_empty_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "mine", Arm("mine", "my MoA", MixtureConfig("moa", "bi-sided", ("silu", "tanh"))))
    lines = [*tried("swiglu", [3.0, 3.1, 3.2]), *tried("mine", [2.9, 3.0, 3.1])]
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    assert f"None of the {len(CLAIMS)} claims is judged: no two arms" in text
    assert "| my MoA | 0.008 |" in text
    for absent in ("## Effect of each choice", "## Beside the paper", "not run (", "What needs these arms"):
        assert absent not in text


def test_what_runs_started_from_and_came_down_to_is_read_off_their_flags(tmp_path: Path) -> None:
    rates = ["--lr", "0.008", "--min-lr", "0.0008", "--hidden-size", "96", "--init-method-std", "0.0653"]
    earlier = [*rates, "--moa-mixing", "moa"]  # gate vectors were drawn as the weights
    now = [*rates[:3], "0.0004", *rates[4:], "--moa-mixing", "moa", "--moa-gate-init-std", "0.0566"]
    lines = [{**line("moa-bi-sided", 3.0), "flags": earlier}, {**line("moa-one-sided", 3.0), "flags": now}]
    text = report_of(tmp_path, write(tmp_path / "study", lines))
    assert "Rates come down to 0.1, 0.05 of their peak" in text
    assert "gate vectors at step 0: 0.0653 at h 96, 0.0566 at h 96 (the paper's: 0.02)." in text
