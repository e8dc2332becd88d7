"""tools/generate.py and evaluate_text.py: sampling, prompts, texts and numbers of every shape."""

from __future__ import annotations

import bz2
import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from megatron_moa.trained.text_model import TextModel, choose
from tools import evaluate_text, generate

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(4000, 1)


def draw(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Share of each token among 4000 draws."""
    drawn = choose(LOGITS, temperature, top_k, top_p, torch.Generator().manual_seed(1))
    return torch.bincount(drawn, minlength=4) / 4000


def test_zero_temperature_is_the_likeliest() -> None:
    assert draw(temperature=0).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_softmax() -> None:
    torch.testing.assert_close(draw(), LOGITS[0].softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(draw(temperature=2), (LOGITS[0] / 2).softmax(-1), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(draw(top_k=2), expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # Probabilities 0.64, 0.24, 0.09, 0.03: 0.64 alone misses 0.7, with 0.24 it is reached.
    assert (draw(top_p=0.7) > 0).tolist() == [False, True, True, False]
    assert (draw(top_p=0.6) > 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("temperature", [1e-20, 1e-30, 1e-40, 5e-324])
def test_temperatures_near_zero_are_the_likeliest(temperature: float) -> None:
    assert draw(temperature=temperature).tolist() == [0, 1, 0, 0]
    assert draw(temperature=temperature, top_k=2, top_p=1e-300).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [1e40, math.inf])
def test_high_temperatures_are_even(temperature: float) -> None:
    torch.testing.assert_close(draw(temperature=temperature), torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_a_mistyped_flag_is_answered_with_the_tools_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["--load", str(tmp_path), "--num-token", "5"])
    assert "did you mean --num-tokens?" in capsys.readouterr().err


class ByteModel(TextModel):
    """A token is a byte, spaces at the ends of a text are none, and what follows is the byte before."""

    device, dtype, vocab_size, context, end = torch.device("cpu"), torch.float32, 257, 32, 256

    def encode(self, text: str) -> list[int]:
        return list(text.strip(" ").encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def forward(self, tokens: Tensor) -> Tensor:
        return 10.0 * torch.nn.functional.one_hot(tokens, self.vocab_size)

    def _continued(self, rows: list[list[int]], steps: int, choose_next: Callable[[Tensor], Tensor]) -> list[list[int]]:
        new: list[list[int]] = [[] for _ in rows]
        for _ in range(steps):
            last = torch.tensor([[(row + tokens)[-1]] for row, tokens in zip(rows, new, strict=True)])
            for tokens, token in zip(new, choose_next(self.forward(last)[:, -1]).tolist(), strict=True):
                tokens.append(token)
        return new


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What --load names; the model in it is a ByteModel."""
    monkeypatch.setattr("megatron_moa.load.load", lambda *_: ByteModel())
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    return "model"


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], *words: str) -> str:
    """The one line that a tool leaves with."""
    with pytest.raises(SystemExit) as leaving:
        main(list(words))
    assert leaving.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = (line for line in printed.err.splitlines() if not line.startswith("> "))  # what it was doing
    return line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--seed", str(number)) for number in (-(2**63) - 1, 2**64, 99999999999999999999, "nan", "1.5", "9" * 5000)),
        *(("--temperature", value) for value in ("-1", "nan", "-1e-40", "-inf", "hot")),
        *(("--num-tokens", value) for value in ("0", "-1", "1e3", "nan")),
        *(("--num-samples", value) for value in ("0", "-1", "10001", "9" * 30)),
        *(("--top-k", value) for value in ("-1", "0.5")),
        *(("--top-p", value) for value in ("0", "-0.1", "1.1", "nan", "inf")),
        *(("--iteration", value) for value in ("0", "-1", "last")),
    ],
)
def test_numbers_out_of_range_are_one_line(
    flag: str, value: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, generate.main, "--load", folder, f"{flag}={value}")
    assert line.startswith("generate.py: error: ")
    assert flag in line


@pytest.mark.parametrize(
    "words",
    [
        *(["--seed", str(seed)] for seed in (-(2**63), -1, 0, 2**64 - 1)),
        *(["--temperature", value] for value in ("0", "1e-40", "1e300", "inf")),
        ["--num-tokens", "9" * 30],
        ["--top-k", "9" * 30],
        ["--top-p", "1e-300"],
    ],
)
def test_other_numbers_give_a_text(words: list[str], folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--load", folder, "--prompt", "aaa", "--json", "--num-samples", "2", *words])
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["prompt"] for result in results] == ["aaa"] * 2
    assert all(result["tokens"] for result in results if result["ended"] != "document")


@pytest.mark.parametrize("prompt", ["", " ", "\n", "é", "😀", "</s>", "a" * 31])
def test_prompts_of_every_shape_give_a_text(prompt: str, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--load", folder, "--prompt", prompt, "--num-tokens", "1", "--temperature", "0", "--json"])
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert result["prompt"] == prompt
    assert result["tokens"] == list(prompt.strip(" ").encode()[-1:])  # the start of a document is followed by its end


def test_prompts_that_cannot_be_are_one_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, generate.main, "--load", folder, "--prompt", "b", "--prompt", "a" * 32)
    assert line.endswith("prompt 2 with a token behind it has 33 tokens, the model's context 32; shorten it")
    line = refused(capsys, generate.main, "--load", folder, "--prompt", "a\udcff")
    assert line.endswith(r"--prompt 'a\udcff': is not UTF-8; give a text in UTF-8")
    Path("prompts.txt").write_bytes(b"\xef\xbb\xbf\n \r\n")
    line = refused(capsys, generate.main, "--load", folder, "--prompts-file", "prompts.txt")
    assert line.endswith("--prompts-file prompts.txt: has no line; give one prompt a line")


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    capsys.readouterr()
    evaluate_text.main(list(words))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_lines_of_every_name_have_one_loss(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Compares the loss of files of every name with one computed by hand.

    The byte before predicts the next with the logit 10, all others have 0; the first byte is unknown.
    """
    lines = b'\xef\xbb\xbf{"text": "aab"}\n\n{"text": ""}\n{"text": "  "}\n{"text": "ccc", "n": ' + b"9" * 5000 + b"}\n"
    rest = math.log(math.exp(10) + 256)
    expected = (6 * rest - 3 * 10) / 6  # aa, cc, cc are predicted
    for name, content in (
        *((f"t.{ending}", lines) for ending in ("jsonl", "json", "ndjson", "JSONL", "Json")),
        ("t.jsonl.gz", gzip.compress(lines)),
        ("t.NDJSON.BZ2", bz2.compress(lines)),
    ):
        Path(name).write_bytes(content)
        result = evaluated(capsys, "--load", folder, "--text", name)
        assert (result["documents"], result["tokens"], result["bytes"]) == (2, 6, 6), name
        assert result["loss_per_token"] == pytest.approx(expected, rel=1e-6)
    Path("body.txt").write_text('{"body": "aab"}\n{"body": "ccc"}\n')
    assert evaluated(capsys, "--load", folder, "--text", "body.txt", "--json-key", "body")["documents"] == 2
    Path("mark.txt").write_bytes(b"\xef\xbb\xbfaab")
    assert evaluated(capsys, "--load", folder, "--text", "mark.txt")["bytes"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--text", "spaces"], "--text spaces: has no token for this model's tokenizer; give a file with text"),
        (["--text", "empty"], "--text empty: is empty; give a file with text"),
        (["--text", "bad.JSONL"], "--text bad.JSONL: line 2 has null under the key 'text', not text; write {"),
        (["--text", "model"], "--text model: a folder; name the files in it"),
        (["--text", "absent"], "--text absent: no such file; check the path"),
        (["--text", "good", "--stride", "0"], "argument --stride: a number above 0 is wanted, not 0"),
        (["--text", "good", "--window", "-3"], "argument --window: a number above 0 is wanted, not -3"),
        (["--text", "good", "--window", "33"], "--window 33: out of range; give 1 to 32, the model's context"),
        (["--text", "good", "--window", "8", "--stride", "9"], "--stride 9: out of range; give 1 to 8, the window"),
        (["--text", "good", "--window", "9" * 30], "out of range; give 1 to 32, the model's context"),
    ],
)
def test_mistakes_in_evaluating_are_one_line(
    words: list[str], expected: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("spaces").write_text("   ")
    Path("empty").touch()
    Path("bad.JSONL").write_text('{"text": "a"}\n{"text": null}\n')
    Path("good").write_text("a b c")
    line = refused(capsys, evaluate_text.main, "--load", folder, *words)
    assert line.startswith("evaluate_text.py: error: ")
    assert expected in line


def test_what_is_computed_is_said_and_files_are_checked_before(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first file is not computed where the last has no token: hours may lie between them."""
    Path("good").write_text("aé" * 100)  # of 300 bytes, in windows of 32 tokens that move by 16
    Path("spaces").write_text(" " * 3000)
    windows, forward = [], ByteModel.forward
    monkeypatch.setattr(ByteModel, "forward", lambda self, given: windows.append(given) or forward(self, given))
    line = refused(capsys, evaluate_text.main, "--load", folder, "--text", "good", "spaces")
    assert line.endswith("--text spaces: has no token for this model's tokenizer; give a file with text")
    assert not windows

    bars = []
    monkeypatch.setattr(evaluate_text, "progress_bar", lambda *_: bars.append(MagicMock()) or bars[-1])
    evaluate_text.main(["--load", folder, "--text", "good"])
    printed = capsys.readouterr()
    assert printed.err.startswith(f"> loading {folder}\n> predicting in float32\ngood: ")
    assert json.loads(printed.out)["dtype"] == "float32"
    (bar,) = bars
    done = [call.args[0] for call in bar.__enter__.return_value.update.call_args_list]
    assert (sum(done), len(done), min(done)) == (300, len(windows), 12)


@pytest.mark.parametrize("tool", [generate.main, evaluate_text.main])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--load", "absent"],
            "--load absent: no checkpoint there, nor a folder; give what training's --save named, or an export",
        ),
        (["--load", "model", "--tokeniser-model", "x"], "has such a flag; did you mean --tokenizer-model?"),
        (
            ["--load", "export", "--transformer-impl", "local"],
            "--transformer-impl: unknown, or for Megatron checkpoints; export is a Hugging Face folder",
        ),
        (["--load", "export", "--bf16", "--fp16"], "--bf16 --fp16: a model computes in one of them; drop the other"),
        (["--load", "export", "--iteration", "3"], "--iteration 3: export is a Hugging Face folder, which has none;"),
    ],
)
def test_a_wrong_source_is_told_before_anything_is_loaded(
    tool: Callable[[list[str]], None],
    words: list[str],
    expected: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_moa.load.load", None)
    Path("export").mkdir()
    Path("export", "config.json").touch()
    Path("good").write_text("a")
    text = ["--text", "good"] if tool is evaluate_text.main else []
    assert expected in refused(capsys, tool, *words, *text)
