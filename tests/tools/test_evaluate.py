"""Tests examples/evaluate.sh and tools/evaluate.py with the real harness on a tiny model.

The results are computed again by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.loading import FolderModel, load_folder
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
from megatron_moa.hf.tokenizer import _from_sentencepiece
from tests.support.tokenizers import train_sentencepiece
from tests.support.training import ROOT
from tools.evaluate import TASKS, finished, local_files, main, parse_flags, table

CONTEXT = 64
WORDS = (ROOT / "CONTRIBUTING.md").read_text().split()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and a tokenizer, and code that must not be run."""
    folder = tmp_path_factory.mktemp("evaluate") / "export"
    folder.mkdir()
    train_sentencepiece(folder.parent / "tok.model")
    tokenizer = _from_sentencepiece(folder.parent / "tok.model", CONTEXT)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPTMoAConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        mixing={"mixing": "moa", "form": "bi-sided", "activations": ["silu", "relu2"], "gate": "sigmoid"},
        mixing_backend="eager",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.auto_map = {"AutoModelForCausalLM": "modeling_gpt_moa.GPTMoAForCausalLM"}
    GPTMoAForCausalLM(config).save_pretrained(folder)
    (folder / "modeling_gpt_moa.py").write_text("raise SystemExit('code of the folder was run')\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and texts of this project's own words, laid out as the docs say."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(3)
    questions = [
        {
            "question": " ".join(draw.sample(WORDS, 5)),
            "choices": [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(24)
    ]
    write(folder / "local_choice" / "test.jsonl", questions)
    arc = [
        {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list("ABCD")},
            "answerKey": "ABCD"[row["answer"]],
        }
        for row in questions[:6]
    ]
    write(folder / "arc_easy" / "ARC-Easy" / "test-00000-of-00001.jsonl", arc)
    texts = [{"text": " ".join(WORDS[:150])}, {"text": "Ünïcödé, " + " ".join(draw.sample(WORDS, 10))}]
    write(folder / "heldout_text" / "test.jsonl", texts)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words: str | Path, **variables: str | Path) -> subprocess.CompletedProcess:
    """examples/evaluate.sh as a user starts it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        **{k: str(v) for k, v in variables.items()},
    }
    command = [str(ROOT / "examples" / "evaluate.sh"), *map(str, words)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250)


@torch.no_grad()
def log_probability(model: FolderModel, question: str, choice: str) -> float:
    """Of the choice's tokens behind the question's, in nats."""
    given = model.encode(question)
    tokens = model.encode(f"{question} {choice}")
    log_probabilities = model.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[i - 1, tokens[i]].item() for i in range(len(given), len(tokens)))


def accuracy(model: FolderModel, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of the questions whose answer is the likeliest choice; and the likeliest by character."""
    right = [0, 0]
    for row in rows:
        scores = [log_probability(model, row["question"], choice) for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        for i, values in enumerate((scores, by_length)):
            right[i] += max(range(4), key=values.__getitem__) == row["answer"]
    return right[0] / len(rows), right[1] / len(rows)


@pytest.mark.full
@pytest.mark.slow
def test_the_harness_agrees_with_what_is_computed_by_hand(export: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = ("local_choice", "heldout_text", "arc_easy")
    variables = {"DATA": data, "OUT": out, "HF_HOME": tmp_path / "cache"}
    first = run(export, *tasks, **variables)
    assert first.returncode == 0, first.stderr[-3000:]
    results = {task: json.loads((out / f"{task}.json").read_text()) for task in tasks}
    model = load_folder(export)

    questions = read(data / "local_choice" / "test.jsonl")
    assert max(len(model.encode(f"{row['question']} {max(row['choices'], key=len)}")) for row in questions) <= CONTEXT
    metrics = results["local_choice"]["metrics"]
    assert (metrics["acc"], metrics["acc_norm"]) == pytest.approx(accuracy(model, questions))
    assert 0 < metrics["acc"] < 1

    texts = [row["text"] for row in read(data / "heldout_text" / "test.jsonl")]
    losses = [model.text_loss(text, stride=CONTEXT) for text in texts]
    assert len(model.encode(texts[0])) > 2 * CONTEXT
    assert results["heldout_text"]["metrics"]["byte_perplexity"] == pytest.approx(
        sum_of(losses).byte_perplexity, rel=1e-5
    )
    assert results["heldout_text"]["metrics"]["bits_per_byte"] == pytest.approx(sum_of(losses).bits_per_byte, rel=1e-5)

    arc = [
        {"question": f"Question: {row['question']}\nAnswer:", "choices": row["choices"], "answer": row["answer"]}
        for row in questions[:6]
    ]
    assert results["arc_easy"]["metrics"]["acc"] == pytest.approx(accuracy(model, arc)[0])
    assert results["arc_easy"]["documents"] == 6

    again = run(export, *tasks, **variables)
    assert again.stderr.count("evaluated already") == 3
    assert again.stdout == first.stdout
    assert "| local_choice | 24 | acc | " in again.stdout


def sum_of(losses: list[Any]) -> Any:
    """One loss of several texts."""
    return sum(losses[1:], losses[0])


# Without the harness.


def test_dry_run_prints_the_command(export: Path) -> None:
    result = run(export, "piqa", "--limit", "3", "--dry-run", DATA="my data", NUM_FEWSHOT="5")
    assert result.returncode == 0
    words = result.stdout.replace("\\\n", " ").split()
    assert words[1:] == [
        *(str(ROOT / "tools" / "evaluate.py"), "--load", str(export), "--tasks", "piqa"),
        *("--data", "my\\", "data", "--num-fewshot", "5", "--limit", "3"),
    ]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["evaluate.sh: ", "EXPORT"]),
        (["/nonexistent"], ["evaluate.py: error: --load /nonexistent", "config.json"]),
        (["/nonexistent", "--limit", "0"], ["--limit: a number above 0 is wanted, not 0"]),
    ],
)
def test_mistakes_are_one_line(words: list[str], parts: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["local_choise"], ["--tasks local_choise: unknown", "local_choice"]),
        (["mmlu"], ["--tasks mmlu", "group"]),
        (["local_choice", "--limit", "2"], []),
    ],
)
def test_what_only_the_harness_knows(
    words: list[str], parts: list[str], export: Path, data: Path, tmp_path: Path
) -> None:
    files = {} if parts else {"DATA": data}
    result = run(export, *words, **files, OUT=tmp_path / "out", HF_HOME=tmp_path / "cache")
    assert result.returncode == (2 if parts else 0), result.stderr[-2000:]
    last = result.stderr.splitlines()[-1]
    assert all(part in last for part in parts), last
    assert (tmp_path / "out").exists() == (not parts)


@pytest.mark.parametrize("flag", ["--data", "--tasks-folder"])
def test_a_missing_folder_is_told_before_the_harness_is_imported(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit) as leaving:
        main(["--load", str(tmp_path), flag, f"{tmp_path}/absent"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err == f"evaluate.py: error: {flag} {tmp_path}/absent: no such folder; check the path\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    if flag == "--data":
        (tmp_path / "data" / "piqa").mkdir(parents=True)
        with pytest.raises(SystemExit):
            main(["--load", str(tmp_path), "--tasks", "piqa", "arc_easy", "--data", f"{tmp_path}/data"])
        line = f"--data {tmp_path}/data: has no folder arc_easy; put the task's files there, or check the task's name"
        assert capsys.readouterr().err == f"evaluate.py: error: {line}\n"


def test_a_result_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    settings = {"load": "export", "limit": None}
    path = tmp_path / "piqa.json"
    assert finished(path, settings) is None
    result = {"task": "piqa", "settings": settings, "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "documents": 3}
    path.write_text(json.dumps(result))
    assert finished(path, settings) == result
    with pytest.raises(UserError, match="was evaluated with limit None; add --again"):
        finished(path, {**settings, "limit": 3})
    assert table({"piqa": result}).splitlines()[-1] == "| piqa | 3 | acc | 0.5000 | 0.1000 |"
    filtered = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.25}
    assert table({"gsm8k": {**result, "metrics": filtered}}).splitlines()[-1].endswith("| 0.5000 | 0.2500 |")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"{}",
        pytest.param(b"[" * 100_000, id="deep"),
        *(
            json.dumps({"task": "piqa", "settings": {}, "metrics": {"acc": 0.5}, "documents": 3} | wrong).encode()
            for wrong in (
                {"settings": "x"},
                {"metrics": None},
                {"metrics": {"acc": "0.5"}},
                {"documents": [3]},
                {"task": "arc_easy"},
            )
        ),
        None,
    ],
)
def test_a_file_that_is_no_result_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "piqa.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^--out \S+piqa.json: is no result of piqa, or damaged; move it away$"):
        finished(path, {})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (None, "| piqa | 3 | acc | 0.5000 |  |"),
        ("export/model.safetensors", "with other files in --load;"),
        ("tasks/piqa.yaml", "with other files in --data, --tasks-folder or examples/evaluation;"),
        ("data/piqa/test.jsonl", "with other files in --data, --tasks-folder or examples/evaluation;"),
        ("own/local_choice.yaml", "with other files in --data, --tasks-folder or examples/evaluation;"),
        ("data/arc_easy/test.jsonl", "| piqa | 3 | acc | 0.5000 |  |"),
    ],
)
def test_a_result_of_other_files_is_not_taken_for_this_one(
    changed: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("export/config.json", "export/model.safetensors", "tasks/piqa.yaml", "data/piqa/test.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folders = {"--load": "export", "--data": "data", "--tasks-folder": "tasks"}
    words = ["--tasks", "piqa", *(word for flag in folders for word in (flag, f"{tmp_path}/{folders[flag]}"))]
    monkeypatch.setattr("tools.evaluate.evaluate", lambda *_: {"metrics": {"acc": 0.5}, "documents": 3})
    monkeypatch.setattr("tools.evaluate.build_task", lambda *_: None)
    monkeypatch.setattr("tools.evaluate.OWN_TASKS", tmp_path / "own")
    for name in ("lm_eval.models.huggingface", "lm_eval.tasks", "megatron_moa.hf.loading"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main(words)
    if not changed:
        for other in (["--bf16"], ["--limit", "3"]):
            with pytest.raises(SystemExit):
                main([*words, *other])
        said_of = capsys.readouterr().err.splitlines()
        assert [line.split("evaluated with ")[1].split(";")[0] for line in said_of if "error" in line] == [
            "dtype float32",
            "limit None",
        ]
        main(words)
    if changed:
        (tmp_path / changed).parent.mkdir(exist_ok=True)
        (tmp_path / changed).write_text("other")
    refused = "with" in said
    with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
        main(words)
    shown = capsys.readouterr()
    assert said in (shown.err if refused else shown.out.splitlines()[-1])


def test_files_of_the_splits_are_found_however_deep(tmp_path: Path) -> None:
    config = {"training_split": "train", "validation_split": "validation", "test_split": None}
    write(tmp_path / "piqa" / "plain" / "validation-00001-of-00002.jsonl", [])
    (tmp_path / "piqa" / "plain" / "validation-00000-of-00002.jsonl").write_text("")
    changed = local_files(tmp_path / "piqa", "piqa", config)
    assert (changed["dataset_path"], changed["training_split"]) == ("json", None)
    files = changed["dataset_kwargs"]["data_files"]
    assert [Path(file).name[:16] for file in files["validation"]] == ["validation-00000", "validation-00001"]
    (tmp_path / "piqa" / "train.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="parquet and JSON"):
        local_files(tmp_path / "piqa", "piqa", config)
    with pytest.raises(UserError, match=r"has no test-\*"):
        local_files(tmp_path / "piqa", "piqa", {**config, "test_split": "test"})


def test_files_of_other_splits_and_datasets_are_left_out(tmp_path: Path) -> None:
    config = {"training_split": "train", "test_split": "test", "dataset_name": "ARC-Easy"}
    for dataset in ("ARC-Easy", "ARC-Challenge"):
        for name in ("test-00000-of-00001.jsonl", "test_small.jsonl", "tests.jsonl"):
            write(tmp_path / dataset / name, [])
    write(tmp_path / "ARC-Challenge" / "train.jsonl", [])
    changed = local_files(tmp_path, "arc_easy", config)
    files = {"test": [str(tmp_path / "ARC-Easy" / "test-00000-of-00001.jsonl")]}
    assert (changed["dataset_kwargs"], changed["training_split"]) == ({"data_files": files}, None)
    with pytest.raises(UserError, match=r": test is in \S+/ARC-Challenge and in \S+/ARC-Easy; leave those of arc$"):
        local_files(tmp_path, "arc", {**config, "dataset_name": None})
    assert local_files(tmp_path / "ARC-Challenge", "arc_easy", config)["dataset_kwargs"]["data_files"].keys() == {
        "train",
        "test",
    }


def test_papers_benchmarks_are_the_default() -> None:
    assert parse_flags(["--load", "export"]).tasks == list(TASKS)
