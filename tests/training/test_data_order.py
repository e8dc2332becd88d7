"""Tests that a changed order of the training data is told exactly where Megatron's order changes."""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.errors import UserError
from megatron_moa.training.arguments import _compare_with_saved
from megatron_moa.training.data_order import changed_order
from megatron_moa.training.parser import parser_defaults

with quiet_imports():
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.datasets.utils import get_blend_from_list

CHECKPOINT = Checkpoint("--load", Path("somewhere"), 40)
LENGTH = 8  # tokens of a sample


@pytest.fixture
def prefixes(tmp_path: Path) -> tuple[str, str]:
    """Two datasets of 20 and 7 documents, every token another number."""
    for name, documents in (("a", 20), ("b", 7)):
        builder = IndexedDatasetBuilder(f"{tmp_path / name}.bin", dtype=numpy.int32)
        for i in range(documents):
            builder.add_document(numpy.arange(100 * i, 100 * i + 5 + i % 7, dtype=numpy.int32), [5 + i % 7])
        builder.finalize(f"{tmp_path / name}.idx")
    return str(tmp_path / "a"), str(tmp_path / "b")


def settings(words: list[str], samples: int, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            **parser_defaults(),
            "data_path": words,
            "split": "80,20,0",
            "seq_length": LENGTH,
            "train_iters": samples,
            "global_batch_size": 1,
            **changes,
        }
    )


def order(args: argparse.Namespace) -> list[list[int]]:
    """The training's samples as Megatron draws them."""
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=LENGTH,
        blend=get_blend_from_list(args.data_path),
        split=args.split,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        tokenizer=SimpleNamespace(vocab_size=10_000, eod=9_998, eos=9_998, pad=9_999, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [args.train_iters, 1, 0], lambda: True, config).build()[0]
    return [train[i]["tokens"].tolist() for i in range(args.train_iters)]


@pytest.mark.parametrize("weights", [(), (0.7, 0.3)], ids=str)
def test_a_line_where_megatrons_order_changes_and_nowhere_else(
    prefixes: tuple[str, str], weights: tuple[float, ...]
) -> None:
    words = [word for weight, prefix in zip(weights, prefixes, strict=False) for word in (str(weight), prefix)]
    words = words or [prefixes[0]]
    orders = {samples: order(settings(words, samples)) for samples in (5, 14, 17, 28, 60)}
    told = set()
    for before, now in combinations(orders, 2):
        lines = list(changed_order(settings(words, now), settings(words, before), CHECKPOINT))
        assert bool(lines) == (orders[before] != orders[now][:before]), (before, now, lines)
        told.add(bool(lines))
    assert told == {True, False}


def test_the_line_names_flag_dataset_and_passes(prefixes: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [prefixes[0]]
    (line,) = changed_order(settings(words, 20), settings(words, 10), CHECKPOINT)
    assert line.startswith(
        f"--train-iters 20: the run now reads {prefixes[0]} 2 times, the last time in part, and read it once with the "
        "checkpoint's --train-iters 10 (--load somewhere: iteration 40); "
    )
    apart = settings([], 10, data_path=None, train_data_path=words, valid_data_path=words, split=None)
    longer = argparse.Namespace(**{**vars(apart), "train_iters": 5, "train_samples": 400})
    (line,) = changed_order(longer, apart, CHECKPOINT)
    assert line.startswith("--train-samples 400: ")
    assert " with the checkpoint's --train-iters 10 (" in line
    with pytest.raises(UserError):  # for another schedule, once the line is printed
        _compare_with_saved(settings(words, 20, lr=0.1), settings(words, 10), CHECKPOINT)
    assert f"WARNING: --train-iters 20: the run now reads {prefixes[0]} 2 times" in capsys.readouterr().out
    for changes in ({"finetune": True}, {"skip_train": True}, {"mock_data": True}):
        assert not list(changed_order(settings(words, 20, **changes), settings(words, 10), CHECKPOINT))
    assert not list(changed_order(settings(list(prefixes), 20), settings(list(prefixes), 10), CHECKPOINT))
