"""From text to a trained model and back to text: the tools and the script as a user runs them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.support.training import TINY, Run, run_script

pytestmark = pytest.mark.slow

WORDS = "the cat sat on a mat and the dog ran far over green hills to see what it could find".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents of a little language, a tokenizer, and a Megatron dataset."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(5)
    for index in range(60):
        lines = [" ".join(rng.choices(WORDS, k=12)) for _ in range(30)]
        (folder / f"{index:02}.txt").write_text("\n".join(lines))
    text = ["--input", str(folder), "--glob", "*.txt"]
    run_script("tools/train_tokenizer.py", [*text, "--output", folder / "tokenizer", "--vocab-size", "320"])
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"]
    run_script("tools/preprocess_data.py", [*text, *tokenizer, "--output-prefix", folder / "data", "--workers", "2"])
    return folder


def train(corpus: Path, *flags: object) -> Run:
    """The tiny model on the corpus."""
    flags_without_mock = " ".join(TINY)
    for part in ("--mock-data", "--tokenizer-type NullTokenizer", "--vocab-size 63", "--eval-iters 0"):
        flags_without_mock = flags_without_mock.replace(part, "")
    data = ["--data-path", corpus / "data", "--data-cache-path", corpus / "cache", "--eval-iters", "2"]
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", corpus / "tokenizer.model"]
    return run_script("pretrain_gpt_moa.py", [*flags_without_mock.split(), *data, *tokenizer, *flags])


@pytest.fixture(scope="module")
def trained(corpus: Path) -> tuple[Path, Run]:
    """A MoA model after 12 steps on the default backend, its gates' statistics logged, saved."""
    save = ["--save", corpus / "checkpoint", "--save-interval", "12", "--tensorboard-dir", corpus / "tensorboard"]
    flags = ["--swiglu", "--ffn-hidden-size", "48", "--train-iters", "12", "--moa-log-interval", "6"]
    gates = "--moa-gate softmax --moa-gate-bias --moa-activations silu relu2 tanh".split()
    return corpus / "checkpoint", train(corpus, *save, *flags, *gates)


def test_loss_falls_on_real_text(trained: tuple[Path, Run]) -> None:
    _, run = trained
    assert run.losses[12] < run.losses[1] - 0.5
    assert run.validation_losses


def test_start_line_is_read_off_the_model(trained: tuple[Path, Run]) -> None:
    _, run = trained
    (line,) = [line for line in run.log.splitlines() if line.startswith("> mixture of activations:")]
    assert "moa, bi-sided, silu+relu2+tanh, softmax gates with bias (--moa-form auto: a dense model)" in line
    assert "2 layers, 396 extra parameters" in line  # 2 layers of 6 gates of 32 weights and a bias
    assert re.search(r"(compile|eager) backend", line)


def test_gate_statistics_are_logged_and_drawn(trained: tuple[Path, Run], corpus: Path) -> None:
    _, run = trained
    rows = re.findall(r"coefficients at iteration (\d+) \| layer (\d) \| silu ([\d.]+) \+- ([\d.]+)", run.log)
    assert [(iteration, layer) for iteration, layer, _, _ in rows] == [("6", "1"), ("6", "2"), ("12", "1"), ("12", "2")]
    for _, _, mean, std in rows:
        assert 0.2 < float(mean) < 0.5  # near 1/3, softmax over three
        assert 0 < float(std) < 0.3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(corpus / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("moa/layer_1/linear.tanh/std")] == [6, 12]


def test_training_goes_on_with_the_checkpoints_settings(trained: tuple[Path, Run], corpus: Path) -> None:
    checkpoint, first = trained
    schedule = ["--train-iters", "14", "--override-opt-param-scheduler"]
    run = train(corpus, "--load", checkpoint, "--use-checkpoint-args", *schedule)
    assert "moa, bi-sided, silu+relu2+tanh, softmax gates with bias" in run.log
    assert run.losses[13] == pytest.approx(first.losses[12], abs=0.3)


def test_text_is_sampled_from_the_checkpoint(trained: tuple[Path, Run]) -> None:
    checkpoint, _ = trained
    flags = ["--load", checkpoint, "--prompt", "the cat", "--num-tokens", "12", "--num-samples", "2"]
    run = run_script("tools/generate.py", flags)
    samples = run.log.split("--- sample ---\n")[1:]
    assert len(samples) == 2
    assert all(sample.startswith("the cat") and len(sample) > len("the cat") for sample in samples)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--load", "/nonexistent"], ["--load /nonexistent", "no checkpoint"]),
        (["--load", "/nonexistent", "--top-p", "1.5"], ["--top-p", "1.5"]),
        (["--load", "/nonexistent", "--num-tokens", "many"], ["--num-tokens", "many"]),
    ],
)
def test_wrong_flags_of_generate_get_one_line(flags: list[str], parts: list[str]) -> None:
    run = run_script("tools/generate.py", flags, check=False)
    assert run.returncode == 2
    last = run.log.strip().splitlines()[-1]
    assert last.startswith("generate.py: error: "), run.log
    assert all(part in last for part in parts), last
    assert "Traceback" not in run.log
