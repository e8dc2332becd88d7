"""Tests what the training script checks about data and tokenizer before Megatron starts.

Each mistake is answered in one line.
"""

import errno
import json
import os
import re
import signal
import struct
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import sentencepiece

from megatron_moa.command_line import output_files
from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.data import cached_arrays, checks, dataset
from megatron_moa.errors import UserError
from tests.support.datasets import make_dataset

with quiet_imports():
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentencepiece model with 300 tokens."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tok"
    words = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "abcdefgh"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
    )
    return f"{prefix}.model"


def arguments(model: str, **given: object) -> Namespace:
    """The attributes of Megatron's namespace that matter here."""
    settings = {
        "data_path": None,
        "data_args_path": None,
        "train_data_path": None,
        "valid_data_path": None,
        "test_data_path": None,
        "per_split_data_args_path": None,
        "data_cache_path": None,
        "mock_data": False,
        "split": None,
        "seq_length": 32,
        "eval_iters": 10,
        "full_validation": False,
        "skip_train": False,
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": model,
        "vocab_size": None,
        "vocab_file": None,
        "merge_file": None,
    }
    return Namespace(**(settings | given))


class Hang(Exception):
    """Megatron did not return."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(3)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def megatron_sizes(prefix: str, sequence_length: int, split: str, sizes: list[int], cache: Path) -> list[int | None]:
    """How many samples Megatron itself makes of each split."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=sequence_length,
        blend=([prefix], None),
        split=split,
        tokenizer=SimpleNamespace(vocab_size=100, eod=2, eos=2, pad=3, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=str(cache),
    )
    made = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return [None if part is None else len(part) for part in made]


@pytest.mark.parametrize("split", ["969, 30, 1", "99,1,0", "0.5,0.25,0.25", "1", "7,3", "1,1,1"])
@pytest.mark.parametrize("documents", [1000, 1037])
def test_splits_are_megatrons(split: str, documents: int, tmp_path: Path) -> None:
    """Compares the bounds of each part of a split with the number of samples that Megatron finds there.

    Documents have 33 tokens and sequences 32 + 1, so a document is one sample and the counts tell the bounds.
    """
    prefix = make_dataset(tmp_path / "d", [33] * documents)
    dataset.check_dataset(prefix, 32, split, needs_validation=True)
    bounds = dataset.split_bounds(split, documents)
    expected = [bounds.get(name) for name in (dataset.TRAIN, dataset.VALIDATION, dataset.TEST)]
    sizes = [0 if bound is None else bound[1] - bound[0] for bound in expected]
    found = megatron_sizes(prefix, 32, split, sizes, tmp_path / "cache")
    index = dataset.read_index(prefix)
    for bound, samples in zip(expected, found, strict=True):
        assert (bound is None) == (samples is None)
        if bound is not None:
            tokens = index.tokens_between(*bound)
            assert tokens == 33 * (bound[1] - bound[0])
            assert samples == (tokens - 1) // 32  # of one epoch, which is enough for the size asked for


@pytest.mark.usefixtures("alarm")
def test_megatron_hangs_on_a_split_without_documents_and_the_check_says_so(tmp_path: Path) -> None:
    """Splits twenty documents, of which a share of 1 percent gets none, even if nothing is evaluated.

    The remedy that the message names then works.
    """
    prefix = make_dataset(tmp_path / "d", [93] * 20)
    with pytest.raises(Hang):
        megatron_sizes(prefix, 64, "99,1,0", [1, 0, 0], tmp_path / "cache")
    with pytest.raises(UserError) as error:
        dataset.check_dataset(prefix, 64, "99,1,0", needs_validation=False)
    message = f"--data-path {prefix}: its 20 documents leave none to the validation part of --split 99,1,0, for which"
    assert str(error.value).startswith(message)
    assert "use --split 19,1,0" in str(error.value)
    dataset.check_dataset(prefix, 64, "19,1,0", needs_validation=True)
    assert megatron_sizes(prefix, 64, "19,1,0", [20, 1, 0], tmp_path / "cache") == [27, 1, None]


@pytest.mark.parametrize("documents", [1, 2, 20, 399])
def test_default_split_needs_500_documents(documents: int, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [40] * documents)
    with pytest.raises(
        UserError, match="part of --split 969, 30, 1, for which Megatron would wait for ever; use --split"
    ):
        dataset.check_dataset(prefix, 8, "969, 30, 1", needs_validation=True)


@pytest.mark.parametrize(("tokens", "enough"), [(128, False), (129, True)])
def test_one_sequence_needs_one_token_more(tokens: int, enough: bool, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [tokens])
    if enough:
        dataset.check_dataset(prefix, 128, "1,0,0", needs_validation=True)
        assert megatron_sizes(prefix, 128, "1,0,0", [None, 0, 0], tmp_path / "cache") == [1, None, None]
        return
    assert megatron_sizes(prefix, 128, "1,0,0", [None, 0, 0], tmp_path / "cache") == [0, None, None]
    with pytest.raises(UserError) as error:
        dataset.check_dataset(prefix, 128, "1,0,0", needs_validation=True)
    assert str(error.value).startswith(
        f"--data-path {prefix}: 128 tokens in the training split, shorter than one sequence of --seq-length 128"
    )
    assert str(error.value).endswith("add text, lower --seq-length")


def test_validation_is_checked_only_if_needed(tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100] * 19 + [20])
    dataset.check_dataset(prefix, 64, "95,5,0", needs_validation=False)
    with pytest.raises(UserError, match=r"20 tokens in the validation split.* give it a larger share .*--eval-iters 0"):
        dataset.check_dataset(prefix, 64, "95,5,0", needs_validation=True)
    dataset.check_dataset(prefix, 64, "1,0,0", needs_validation=True)  # check_data_arguments refuses it


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "1..2,3"])
def test_split_that_is_none(split: str, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100] * 10)
    with pytest.raises(UserError, match=r"--split .*: not one to three shares; use e.g. --split 99,1,0"):
        dataset.check_dataset(prefix, 8, split, needs_validation=True)


def test_split_without_training(tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100] * 10)
    with pytest.raises(UserError, match="--split 0,1,0: gives nothing to training"):
        dataset.check_dataset(prefix, 8, "0,1,0", needs_validation=True)
    dataset.check_dataset(prefix, 8, "0,1,0", needs_validation=True, needs_training=False)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda prefix: os.unlink(f"{prefix}.bin"), "no file {prefix}.bin; check the path, or make it with tools/"),
        (lambda prefix: os.unlink(f"{prefix}.idx"), "no file {prefix}.idx; check the path"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 0), "{prefix}.bin is empty; copy it again"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 0), "{prefix}.idx is empty; copy it again"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 100), "{prefix}.bin is cut off, 100 bytes instead of 2000;"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 3000), "{prefix}.bin is longer than its index says, 3000 bytes"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 20), "{prefix}.idx is not a Megatron index"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 100), "{prefix}.idx is cut off, 100 bytes of 242;"),
        (
            lambda prefix: Path(f"{prefix}.idx").write_text("x" * 300),
            "{prefix}.idx is not a Megatron index; make it with",
        ),
        (
            lambda prefix: Path(f"{prefix}.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 6, 0, 1)),
            "has version 1 and number type 6, which Megatron does not read as tokens",
        ),
        (
            lambda prefix: Path(f"{prefix}.idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0)),
            "holds no document; run tools/preprocess_data.py on text that is not empty",
        ),
    ],
)
def test_damaged_files(damage: object, expected: str, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100] * 10)
    damage(prefix)
    with pytest.raises(UserError) as error:
        dataset.check_dataset(prefix, 8, "1,0,0", needs_validation=True, flag="--train-data-path")
    assert str(error.value).startswith(f"--train-data-path {prefix}: ")
    assert expected.replace("{prefix}", prefix) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_ending_to_drop(ending: str, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100])
    with pytest.raises(UserError, match=f": a prefix without ending is wanted: --data-path {prefix}$"):
        dataset.check_dataset(prefix + ending, 8, "1,0,0", needs_validation=False)


def test_megatrons_own_tool_adds_a_name(tmp_path: Path) -> None:
    make_dataset(tmp_path / "d_text_document", [100])
    with pytest.raises(UserError, match=r"no file .*d\.bin; .* did you mean .*/d_text_document\?"):
        dataset.check_dataset(str(tmp_path / "d"), 8, "1,0,0", needs_validation=False)


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_token_ids_must_be_in_the_vocabulary(dtype: type, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [1000] * 10, highest=400, dtype=dtype)
    dataset.check_token_ids(prefix, 401)
    for sample in (1 << 20, 6400):  # the whole file, and 64 windows of it
        with pytest.raises(
            UserError, match="holds the token 400, but the tokenizer has the tokens 0 to 399; give the --tok"
        ):
            dataset.check_token_ids(prefix, 400, sample=sample)


def test_negative_token_ids(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/d.bin", dtype=numpy.int32)
    builder.add_document(numpy.array([5, -1, 7]), [3])
    builder.finalize(f"{tmp_path}/d.idx")
    with pytest.raises(UserError, match="holds the token -1, but the tokenizer has the tokens 0 to 9"):
        dataset.check_token_ids(f"{tmp_path}/d", 10)


def test_checks_of_a_huge_dataset_are_cheap(tmp_path: Path) -> None:
    """A sparse file of 20 GB in a million documents: what is mapped but not read takes no time."""
    documents, length = 1_000_000, 10_000
    with open(tmp_path / "d.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        stream.write(numpy.full(documents, length, numpy.int32).tobytes())
        stream.write((numpy.arange(documents, dtype=numpy.int64) * length * 2).tobytes())
        stream.write(numpy.arange(documents + 1, dtype=numpy.int64).tobytes())
    with open(tmp_path / "d.bin", "wb") as stream:
        stream.truncate(documents * length * 2)

    def taken() -> float:
        start = time.process_time()
        dataset.check_dataset(str(tmp_path / "d"), 4096, "969, 30, 1", needs_validation=True)
        dataset.check_token_ids(str(tmp_path / "d"), 100)
        return time.process_time() - start

    assert min(taken() for _ in range(3)) < 1  # the least: what else the machine does is not looked for


def test_good_arguments_pass(model: str, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "a", [100] * 600)
    other = make_dataset(tmp_path / "b", [100] * 600)
    (tmp_path / "list").write_text(f"0.5 {prefix}\n0.5 {other}\n")
    (tmp_path / "splits.json").write_text(json.dumps({"train": f"1 {prefix}", "valid": [other], "test": None}))
    good: list[dict[str, object]] = [
        {"data_path": [prefix]},
        {"data_path": [prefix], "split": "99,1,0"},
        {"data_path": ["30", prefix, "70", other]},
        {"data_path": [prefix, other, prefix]},
        {"data_args_path": str(tmp_path / "list"), "split": "9,1,0"},
        {"train_data_path": [prefix], "valid_data_path": [other]},
        {"train_data_path": [prefix], "eval_iters": 0},
        {"per_split_data_args_path": str(tmp_path / "splits.json")},
        {"mock_data": True},
        {"mock_data": True, "tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 100},
        {"data_path": [prefix], "tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 100},
        {"data_path": ["s3://bucket/data"]},
    ]
    for given in good:
        checks.check_data_arguments(arguments(model, **given))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "--data-path is missing; add --data-path PREFIX (made by tools/preprocess_data.py), or --mock-data"),
        ({"data_path": []}, "--data-path: names no data"),
        ({"data_path": ["{a}"], "mock_data": True}, "--mock-data: contradicts --data-path; drop one of them"),
        ({"data_path": ["{a}"], "train_data_path": ["{a}"]}, "--data-path and --train-data-path: two ways to name the"),
        ({"data_path": ["{tmp}/x"]}, "--data-path {tmp}/x: no file {tmp}/x.bin; check the path"),
        ({"data_path": ["{a}.bin"]}, "a prefix without ending is wanted: --data-path {a}"),
        ({"data_path": ["0.3", "{a}", "{a}"]}, "give prefixes, or a weight before each, e.g. --data-path 0.7 web 0.3"),
        ({"data_path": ["0.3", "{a}", "{a}", "0.7"]}, "give prefixes, or a weight before each"),
        ({"data_path": ["-1", "{a}", "2", "{a}"]}, "the weights must be positive"),
        ({"data_path": ["{few}"]}, "its 20 documents leave none to the test part of --split 969, 30, 1"),
        (
            {"data_path": ["{a}"], "seq_length": 200_000},
            "58100 tokens in the training split, shorter than one sequence",
        ),
        ({"data_path": ["{a}"], "seq_length": None}, "--seq-length is missing"),
        ({"data_path": ["{big}"]}, "--data-path {big}: holds the token 400, but the tokenizer has the tokens 0 to 299"),
        (
            {"train_data_path": ["{a}"], "split": "9,1,0"},
            "--split 9,1,0: contradicts --train-data-path, which names each",
        ),
        ({"valid_data_path": ["{a}"]}, "--train-data-path names no training data; add --train-data-path PREFIX"),
        (
            {"train_data_path": ["{a}"], "valid_data_path": ["{short}"]},
            "--valid-data-path {short}: 10 tokens in it, shorter than one sequence of --seq-length 32",
        ),
        ({"data_args_path": "{tmp}/nothing", "split": "1,0,0"}, "--data-args-path {tmp}/nothing: No such file or dir"),
        ({"data_args_path": "{tmp}/list"}, "--data-args-path {tmp}/list: needs shares; add e.g. --split 99,1,0"),
        (
            {"per_split_data_args_path": "{tmp}/list"},
            "{tmp}/list: not a JSON object with the keys train, valid and test",
        ),
        ({"data_path": ["{a}"], "tokenizer_type": None}, "--tokenizer-type is missing"),
        (
            {"data_path": ["{a}"], "tokenizer_model": None},
            "--tokenizer-type SentencePieceTokenizer: needs a file; add --t",
        ),
        (
            {"mock_data": True, "tokenizer_type": "NullTokenizer"},
            "--tokenizer-type NullTokenizer: has no vocabulary of",
        ),
        ({"mock_data": True, "tokenizer_type": "GPT2BPETokenizer"}, "GPT2BPETokenizer: needs a file; add --vocab-file"),
        (
            {"mock_data": True, "tokenizer_type": "GPT2BPETokenizer", "vocab_file": "{tmp}/list"},
            "GPT2BPETokenizer: needs a file; add --merge-file FILE",
        ),
        (
            {"mock_data": True, "tokenizer_type": "TikTokenizer", "tokenizer_model": "{tmp}/no"},
            "{tmp}/no: no such file",
        ),
    ],
)
def test_bad_arguments(given: dict[str, object], expected: str, model: str, tmp_path: Path) -> None:
    names = {
        "{few}": make_dataset(tmp_path / "few", [100] * 20),
        "{short}": make_dataset(tmp_path / "short", [10]),
        "{big}": make_dataset(tmp_path / "big", [1000] * 600, highest=400),
        "{tmp}": str(tmp_path),
        "{a}": make_dataset(tmp_path / "a", [100] * 600),
    }
    (tmp_path / "list").write_text(names["{a}"])

    def fill(value: object) -> object:
        if isinstance(value, list):
            return [fill(word) for word in value]
        if isinstance(value, str):
            for name, path in names.items():
                value = value.replace(name, path)
        return value

    with pytest.raises(UserError) as error:
        checks.check_data_arguments(arguments(model, **{key: fill(value) for key, value in given.items()}))
    assert fill(expected) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "list: the file is empty; write one with tools/blend.py"),
        ("\n \n", "list: the file is empty; write one with tools/blend.py"),
        ("# web\n{a}", "list, line 1: #: no comments, Megatron reads each word as a weight or a prefix; drop it"),
        ("0.5 {a}\n0.5 {tmp}/web\n", "list, line 2: {tmp}/web: no file {tmp}/web.bin; check the path"),
        ("{a}\n\n{tmp}/web\n", "list, line 3: {tmp}/web: no file {tmp}/web.bin; check the path"),
        ("0.5 {a}\nhalf {a}", "list, line 2: half: give prefixes, or a weight before each, e.g. 0.7 web 0.3 code"),
        ("0.5 {a}\n{a}\n0.3 {a}", "list, line 2: {a}: give prefixes, or a weight before each"),
        ("0.5 {a}\n\n0.5", "list, line 3: 0.5: give prefixes, or a weight before each"),
        ("0.5 {a}\nnan {a}", "list, line 2: nan: the weights must be positive; change them, or leave"),
        ("inf {a}\n1 {a}", "list, line 1: inf: the weights must be positive"),
        ("0.5 {a} -1 {a}", "list, line 1: -1: the weights must be positive"),
        ("0 {a} 0 {a}", "list, line 1: 0: the weights must be positive"),
        ("0.5 {a}\n0 {a}", "list, line 2: 0: the weights must be positive"),
        ("5e-324 {a} 1 {a} 1 {a}", "list, line 1: the weights are too large or too far apart"),
        ("1e308 {a} 1e308 {a}", "list, line 1: the weights are too large or too far apart"),
        ("1 {a} 1 {few}", "list, line 1: {few}: its 20 documents leave none to the validation part of --split 99,1,0"),
        ("1 {a}\n1 {big}", "list, line 2: {big}: holds the token 400, but the tokenizer has"),
    ],
)
def test_mistakes_in_a_blend_file(content: str, expected: str, model: str, tmp_path: Path) -> None:
    names = {
        "{few}": make_dataset(tmp_path / "few", [100] * 20),
        "{big}": make_dataset(tmp_path / "big", [1000] * 600, highest=400),
        "{a}": make_dataset(tmp_path / "a", [100] * 600),
        "{tmp}": str(tmp_path),
    }
    for name, path in names.items():
        content, expected = content.replace(name, path), expected.replace(name, path)
    (tmp_path / "list").write_text(content)
    with pytest.raises(UserError) as error:
        checks.check_data_arguments(arguments(model, data_args_path=f"{tmp_path}/list", split="99,1,0"))
    assert str(error.value).startswith(f"--data-args-path {tmp_path}/{expected}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not a JSON object with the keys train, valid and test; write one, with null for a part without data"),
        ('["{a}"]', "not a JSON object with the keys"),
        ('{"train": "{a}", "valid": null}', "not a JSON object with the keys"),
        ('{"train": null, "valid": "{a}", "test": null}', "names no training data; add some"),
        ('{"train": "{a}", "valid": {}, "test": null}', "valid: {}: neither null nor a blend; write weights and pre"),
        ('{"train": "{a}", "valid": [], "test": null}', "valid: []: neither null nor a blend"),
        ('{"train": "{a}", "valid": "1 {a} x {a}", "test": null}', "valid: x: give prefixes, or a weight before each"),
        ('{"train": "{a}", "valid": ["{tmp}/no"], "test": null}', "valid: {tmp}/no: no file {tmp}/no.bin; check the"),
    ],
)
def test_mistakes_in_a_file_of_blends(content: str, expected: str, model: str, tmp_path: Path) -> None:
    for name, path in {"{a}": make_dataset(tmp_path / "a", [100] * 600), "{tmp}": str(tmp_path)}.items():
        content, expected = content.replace(name, path), expected.replace(name, path)
    (tmp_path / "list").write_text(content)
    with pytest.raises(UserError) as error:
        checks.check_data_arguments(arguments(model, per_split_data_args_path=f"{tmp_path}/list"))
    assert str(error.value).startswith(f"--per-split-data-args-path {tmp_path}/list")
    assert expected in str(error.value)


def test_evaluation_needs_validation_data(model: str, tmp_path: Path) -> None:
    """Megatron would train to the end and fall over there."""
    prefix = make_dataset(tmp_path / "a", [100] * 600)
    for split in ("1,0,0", "90,0,10"):
        with pytest.raises(UserError, match=f"^--split {split}: leaves nothing to validation; .* or --eval-iters 0$"):
            checks.check_data_arguments(arguments(model, data_path=[prefix], split=split))
        checks.check_data_arguments(arguments(model, data_path=[prefix], split=split, eval_iters=0))
    with pytest.raises(UserError, match=r"^--valid-data-path is missing: .* or use --eval-iters 0$"):
        checks.check_data_arguments(arguments(model, train_data_path=[prefix], test_data_path=[prefix]))


def test_full_validation_needs_what_megatron_needs(model: str, tmp_path: Path) -> None:
    """Megatron would train, and fall over at the first evaluation."""
    prefix = make_dataset(tmp_path / "a", [100] * 600)
    separate = {"train_data_path": [prefix], "valid_data_path": [prefix, prefix]}
    both = {"full_validation": True, "multiple_validation_sets": True}
    with pytest.raises(UserError, match=r"^--full-validation: Megatron takes it only with --multiple-validation-sets;"):
        checks.check_data_arguments(arguments(model, **separate, **{**both, "multiple_validation_sets": False}))
    with pytest.raises(UserError, match=r"^--multiple-validation-sets: Megatron takes it only with --full-validation;"):
        checks.check_data_arguments(arguments(model, **separate, **{**both, "full_validation": False}))
    with pytest.raises(UserError, match=r"^--full-validation: needs a dataset of its own to go through; add --valid-"):
        checks.check_data_arguments(arguments(model, data_path=[prefix], split="99,1,0", **both))
    with pytest.raises(UserError, match=r"^--full-validation: Megatron cannot evaluate test data beside it; drop"):
        checks.check_data_arguments(arguments(model, **separate, **both, test_data_path=[prefix]))
    checks.check_data_arguments(arguments(model, **separate, **both))


def test_blends_that_are_not_evaluated(model: str, tmp_path: Path) -> None:
    """Megatron's loader asserts that there are samples to read, and of such a blend none are built."""
    blend = ["1", make_dataset(tmp_path / "a", [100] * 600), "2", make_dataset(tmp_path / "b", [100] * 600)]
    with pytest.raises(UserError, match=r"^--split 99,1,0: with --eval-iters 0 .* use --split 1,0,0$"):
        checks.check_data_arguments(arguments(model, data_path=blend, split="99,1,0", eval_iters=0))
    with pytest.raises(UserError, match=r"^--valid-data-path: with --eval-iters 0 .* leave it out$"):
        checks.check_data_arguments(arguments(model, train_data_path=blend, valid_data_path=blend, eval_iters=0))
    checks.check_data_arguments(arguments(model, data_path=blend, split="1,0,0", eval_iters=0))
    checks.check_data_arguments(arguments(model, train_data_path=blend, valid_data_path=blend[1:2], eval_iters=0))
    checks.check_data_arguments(arguments(model, data_path=blend, split="99,1,0"))


def test_stale_index_cache(model: str, tmp_path: Path) -> None:
    """Checks that an index cache older than the data is refused.

    Megatron finds a cached index by name: after the data were made again, it would mix old offsets and new text.
    """
    prefix = make_dataset(tmp_path / "d", [100] * 20)
    args = arguments(model, data_path=[prefix], split="19,1,0")
    cache = tmp_path / "d" / "cache" / "GPTDataset_indices"
    config_cache = tmp_path / "other"
    for folder, given in ((cache, None), (config_cache, str(config_cache))):
        args.data_cache_path = given
        make_dataset(tmp_path / "d", [100] * 20)
        megatron_sizes(prefix, 32, "19,1,0", [10, 1, 0], folder)
        checks.check_data_arguments(args)
        os.utime(f"{prefix}.idx", (time.time() + 60,) * 2)
        with pytest.raises(UserError, match=f"the index cache is older than the data; delete it: rm -r {folder}$"):
            checks.check_data_arguments(args)
        os.utime(f"{prefix}.idx")
        for path in folder.iterdir():
            path.unlink()


def test_an_index_cache_of_other_data_is_refused(model: str, tmp_path: Path) -> None:
    """Checks data that were made before the cache and moved there afterwards."""
    prefix = make_dataset(tmp_path / "d", [100] * 20)
    args = arguments(model, data_path=[prefix], split="19,1,0")
    cache = tmp_path / "d" / "cache" / "GPTDataset_indices"
    megatron_sizes(prefix, 32, "19,1,0", [10, 1, 0], cache)
    checks.check_data_arguments(args)
    for lengths in ([100] * 19, [100] * 10 + [99] + [100] * 9, [50] * 40):
        other = make_dataset(tmp_path / "e", lengths)
        for ending in (".bin", ".idx"):
            os.utime(other + ending, (time.time() - 60,) * 2)
            os.replace(other + ending, prefix + ending)
        with pytest.raises(UserError, match=f"the index cache is of other data; delete it: rm -r {cache}$"):
            checks.check_data_arguments(args)
    make_dataset(tmp_path / "d", [100] * 20)
    os.utime(f"{prefix}.idx", (time.time() - 60,) * 2)
    checks.check_data_arguments(args)


def test_index_cache_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path / "d", [100] * 20)
    (tmp_path / "file").touch()
    args = arguments(model, data_path=[prefix], split="19,1,0", data_cache_path=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"--data-cache-path .*: Megatron cannot write its index cache below .*/file;"):
        checks.check_data_arguments(args)


def test_written_whole(tmp_path: Path) -> None:
    targets = [str(tmp_path / "new" / "a"), str(tmp_path / "new" / "b")]

    def interrupted() -> None:
        with output_files.written_whole("--output", targets) as (first, _):
            Path(first).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    with output_files.written_whole("--output", targets) as names:
        for name in names:
            Path(name).write_text("whole")
        assert not any(os.path.exists(target) for target in targets)
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "b"]


def test_a_link_is_written_through_and_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    with output_files.written_whole("--output", [str(tmp_path / "link")]) as (name,):
        Path(name).write_text("whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^--output \S+pipe: \S+pipe is a folder, a device or a pipe, not a file; "):
        output_files.check_output("--output", str(tmp_path / "pipe"), ("",), overwrite=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_index_cache_that_was_cut(model: str, tmp_path: Path, damage: str) -> None:
    """What a run leaves that is killed while it writes the cache, which Megatron takes for finished."""
    prefix = make_dataset(tmp_path / "d", [200] * 20)
    cache = tmp_path / "cache"
    megatron_sizes(prefix, 32, "19,1,0", [20, 1, 0], cache)
    args = arguments(model, data_path=[prefix], split="19,1,0", data_cache_path=str(cache))
    checks.check_data_arguments(args)
    path = sorted(cache.glob("*-train-sample_index.npy"))[0]
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-8], "header": b"x" + content[1:], "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"^{path}, part of .*delete the cache.*: rm -r {cache}$"):
        checks.check_data_arguments(args)


def test_a_cache_that_is_there_need_not_be_written(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is all that the run needs, Megatron finds out when it builds."""
    prefix, cache = make_dataset(tmp_path / "d", [100] * 20), tmp_path / "cache"
    args = arguments(model, data_path=[prefix], split="19,1,0", data_cache_path=str(cache))
    monkeypatch.setattr(cached_arrays.os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    with pytest.raises(UserError, match=rf"^--data-cache-path {cache}: Megatron cannot write its index cache below"):
        checks.check_data_arguments(args)
    megatron_sizes(prefix, 32, "19,1,0", [10, 1, 0], cache)
    checks.check_data_arguments(args)


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rank", ["0", "8"])
def test_a_missing_part_of_a_cache_that_cannot_be_written(
    kind: int,
    wrapped: bool,
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from megatron_moa.training import index_cache

    monkeypatch.setenv("RANK", rank)
    error = OSError(kind, os.strerror(kind), f"{tmp_path}/x-description.txt")

    class Builder:
        config = SimpleNamespace(path_to_cache=str(tmp_path), mock=False)

        def build(self) -> None:
            if not wrapped:
                raise error
            raise Exception("Megatron's words") from error

    expected = rf"--data-cache-path {tmp_path}: lacks a part .* {tmp_path}/x-.*written \({os.strerror(kind)}\); give"
    with pytest.raises(UserError if rank == "0" else SystemExit) as ending:
        index_cache.build(Builder())
    if rank == "0":
        assert re.match(expected, str(ending.value))
    else:  # on a node of its own: nobody else would say why
        assert ending.value.code == 2
        assert re.search(f"error: {expected}", capfd.readouterr().err)
