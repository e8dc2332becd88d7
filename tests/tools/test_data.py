"""tools/train_tokenizer.py, preprocess_data.py, merge_data.py, blend.py: exact text and documents, one-line errors."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import sentencepiece

from megatron_moa.command_line import progress_bar
from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.data import blends, dataset, dataset_writer, tokenizers
from megatron_moa.data import corpus as reader

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # forked workers find their functions by this name
    spec.loader.exec_module(module)
    return module


# the test process has other threads by then, a tool that was just started has none
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

train_tokenizer = load_tool("train_tokenizer")
preprocess_data = load_tool("preprocess_data")
merge_data = load_tool("merge_data")
blend = load_tool("blend")

TEXTS = [
    "def f(x):\n\treturn x + 1\n\n\n",
    "  two  spaces   three, trailing  ",
    "\r\nWindows\r\nlines\r\n\r\n",
    "नमस्ते दुनिया, 你好，世界。こんにちは Привет שלום مرحبا 😀👩‍👩‍👧 e\u0301 \u00a0 \u2028",
    "</s><s><unk><pad><0x41> ▅ ⁇ \x00\x01\x7f \ufeff \ufffd",
    " ",
    "\n",
    "\t\t",
    "1234567890 0.5e-3",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python files, the package's own, and one empty file."""
    folder = tmp_path_factory.mktemp("corpus")
    for i, path in enumerate(sorted((ROOT / "megatron_moa").rglob("*.py")) + [Path(json.__file__), Path(os.__file__)]):
        (folder / f"sub{i % 2}").mkdir(exist_ok=True)
        (folder / f"sub{i % 2}" / f"{i:03}_{path.name}").write_bytes(path.read_bytes())
    (folder / "sub0" / "empty.py").touch()
    (folder / "notes.txt").write_text("not Python")
    return folder


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("tokenizer") / "tok"
    arguments = ["--input", str(corpus), "--glob", "**/*.py", "--output", str(prefix), "--vocab-size", "700"]
    train_tokenizer.main(arguments)
    return f"{prefix}.model"


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer folder, made without a network."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 10, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "with_eos")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "without_eos")
    return folder


def preprocess(model: str, output: Path, *arguments: str) -> None:
    kind = "HuggingFaceTokenizer" if os.path.isdir(model) else "SentencePieceTokenizer"
    preprocess_data.main(
        ["--tokenizer-type", kind, "--tokenizer-model", model, "--output-prefix", str(output), *map(str, arguments)]
    )


def documents(prefix: Path) -> list[list[int]]:
    """What Megatron's own reader finds."""
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    stored = IndexedDataset(str(prefix))
    assert stored.document_indices.tolist() == list(range(len(stored) + 1))
    return [stored[i].tolist() for i in range(len(stored))]


def one_line(capsys: pytest.CaptureFixture[str], call: object, *arguments: object) -> str:
    """Runs a tool that must leave with code 2 and exactly one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call(*arguments)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "written" not in printed.out
    assert printed.err.count("\n") == 1, printed.err
    return printed.err.rstrip("\n")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_every_text_comes_back_byte_for_byte(model_type: str, corpus: Path, tmp_path: Path) -> None:
    train_tokenizer.main(
        ["--input", str(corpus), "--glob", "**/*.py", "--output", str(tmp_path / "tok"), "--vocab-size", "600"]
        + ["--model-type", model_type]
    )
    tokenizer = tokenizers.build_tokenizer(
        SimpleNamespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "tok.model"))
    )
    for text in TEXTS + [path.read_text() for path in corpus.rglob("*.py")]:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.vocab_size == 600
    assert (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.unk) == (2, 1, 3, 0)
    assert len((tmp_path / "tok.vocab").read_text().splitlines()) == 600
    assert sorted(os.listdir(tmp_path)) == ["tok.model", "tok.vocab"]


def test_special_tokens_in_the_text_stay_text(model: str) -> None:
    """A document cannot forge its end."""
    ids = sentencepiece.SentencePieceProcessor(model_file=model).encode("<s></s><pad><unk>")
    assert not set(ids) & {0, 1, 2, 3}


def test_the_known_exception_is_the_space_character_of_sentencepiece(model: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.decode(processor.encode("a\u2581b")) == "a b"


def test_training_is_reproducible_and_samples_all_files(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i:02} " + "lorem ipsum dolor\n" * 2000)
    files = reader.find_text_files([str(tmp_path)], "*.txt")
    total = sum(file.size for file in files)
    lines = train_tokenizer.sample_lines(files, total // 4, seed=1)
    assert lines == train_tokenizer.sample_lines(files, total // 4, seed=1)
    assert lines != train_tokenizer.sample_lines(files, total // 4, seed=2)
    assert total // 4 <= sum(len(line) + 1 for line in lines) <= total // 4 + train_tokenizer.BLOCK_BYTES
    assert 8 <= sum(line.startswith("file") for line in lines) <= 12
    assert len(train_tokenizer.sample_lines(files, total, max_sentences=100)) == 100
    assert len(train_tokenizer.sample_lines(files, total)) == 80_000
    for name in ("a", "b"):
        train_tokenizer.main(
            ["--input", str(tmp_path), "--glob", "*.txt", "--output", str(tmp_path / name), "--vocab-size", "290"]
            + ["--sample-bytes", str(total // 2)]
        )
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_json_lines_train_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text + "abc def ghi"}) + "\n" for text in TEXTS * 20))
    train_tokenizer.main(
        [
            "--input",
            str(tmp_path / "a.jsonl"),
            "--json-key",
            "body",
            "--output",
            str(tmp_path / "t"),
            "--vocab-size",
            "400",
        ]
    )
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model")).get_piece_size() == 400


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vocab-size", "90000"], "--vocab-size 90000: this text is too small for so many tokens; use --vocab-size "),
        (["--vocab-size", "261"], "--vocab-size 261: too small for the 256 bytes and the characters of this text; use"),
        (["--vocab-size", "259"], "--vocab-size 259: out of range; give 260 (the 256 bytes and 4 special tokens) to"),
        (["--vocab-size", "9" * 20], "--vocab-size 99999999999999999999: out of range; give 260"),
        (["--threads", "9" * 20], "--threads 99999999999999999999: out of range; give 1 to 1024"),
        (["--character-coverage", "nan"], "--character-coverage nan: a share from 0.98 to 1"),
        (["--vocab-size", "0"], "argument --vocab-size: a number above 0 is wanted, not 0"),
        (["--vocab-size", "many"], "argument --vocab-size: invalid positive value: 'many'"),
        (["--model-type", "wordpiece"], "argument --model-type: invalid choice: 'wordpiece'"),
        (["--character-coverage", "2"], "--character-coverage 2.0: a share from 0.98 to 1"),
        (["--glob", "*.rs"], "--glob *.rs: matches no file in"),
        (["--exclude", "*"], "--exclude *: leaves none of the"),
        (["--glob", "/etc/*"], "--glob /etc/*: Non-relative patterns are unsupported"),
        (["--output", "{tmp}/x.model"], "a prefix without ending is wanted: --output {tmp}/x"),
        (["--output", "{tmp}"], "--output {tmp}: a folder; add a name, e.g. --output {tmp}/corpus"),
        (["--output", "{tmp}/file/x"], "{tmp}/file is a file, not a folder"),
        (
            ["--output", "{tmp}/there"],
            "--output {tmp}/there: {tmp}/there.model exists; choose another name or add --ov",
        ),
        (["--input", "{tmp}/nothing"], "--input {tmp}/nothing: no such file or folder; check the path"),
        (["--input", "{tmp}/blank"], "--input: no text in these files"),
        (
            ["--input", "{tmp}/latin1"],
            "--input {tmp}/latin1: line 2 is not UTF-8 (byte 1); convert the file to UTF-8, or",
        ),
    ],
)
def test_mistakes_in_training_flags(
    flags: list[str], expected: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "there.model").touch()
    (tmp_path / "blank").write_text("\n\n\n")
    (tmp_path / "latin1").write_bytes("ab\ncé".encode("latin-1"))
    before = sorted(os.listdir(tmp_path))
    arguments = ["--input", str(corpus), "--glob", "**/*.py", "--output", str(tmp_path / "new" / "tok")]
    arguments += [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    line = one_line(capsys, train_tokenizer.main, arguments)
    assert line.startswith("train_tokenizer: error: ")
    assert expected.replace("{tmp}", str(tmp_path)) in line
    assert sorted(os.listdir(tmp_path)) == before


def test_documents_are_read_back_by_megatron(corpus: Path, model: str, tmp_path: Path, capsys: object) -> None:
    preprocess(model, tmp_path / "data", "--input", corpus, "--glob", "**/*.py", "--workers", "2")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    paths = sorted(corpus.rglob("*.py"), key=lambda path: path.relative_to(corpus).as_posix())
    expected = [processor.encode(path.read_bytes().decode()) + [2] for path in paths if path.stat().st_size]
    assert documents(tmp_path / "data") == expected
    printed = capsys.readouterr().out
    assert f"documents      {len(expected):,}\n" in printed
    assert f"tokens         {sum(map(len, expected)):,}\n" in printed
    assert "empty, skipped 1\n" in printed
    size = sum(path.stat().st_size for path in paths)
    assert f"packing        {size / sum(map(len, expected)):.2f} bytes per token\n" in printed
    assert (
        f"--data-path {tmp_path / 'data'} --tokenizer-type SentencePieceTokenizer --tokenizer-model {model}" in printed
    )
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]
    header = (tmp_path / "data.idx").read_bytes()[:18]
    assert header[17] == 8  # uint16, which 700 tokens fit


def test_speed_is_printed(corpus: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess(model, tmp_path / "d", "--input", corpus, "--glob", "**/*.py", "--workers", 2)
    line = (
        r"speed +([\d.]+) MB/s of text, [\d.]+ million tokens/s; ([\d.]+) MB/s per process, 2 busy (\d+)% of the time"
    )
    total, each, busy = map(float, re.search(line, capsys.readouterr().out).groups())
    assert each == pytest.approx(total / 2, abs=0.1)
    assert 0 < busy <= 100


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    with progress_bar.progress_bar(8_000_000, "tokenizing part 2 of 3") as bar:
        for second in (10, 35, 40, 70):
            now[0] = second
            bar.update(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing part 2 of 3: 25.0%, 2 of 8 MB, 0.1 MB/s, 1.8 minutes left",
        "tokenizing part 2 of 3: 50.0%, 4 of 8 MB, 0.1 MB/s, 1.2 minutes left",
    ]


def test_gpt_dataset_draws_the_same_tokens(corpus: Path, model: str, tmp_path: Path) -> None:
    """From text to a training sample: Megatron's GPTDataset yields pieces of the text, labels moved by one."""
    preprocess(model, tmp_path / "data", "--input", corpus, "--glob", "**/*.py")
    dataset.check_dataset(str(tmp_path / "data"), 64, "80,20,0", needs_validation=True)
    with quiet_imports():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    tokenizer = tokenizers.build_tokenizer(
        SimpleNamespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([str(tmp_path / "data")], None),
        split="80,20,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 0], lambda: True, config).build()
    stream = [token for document in documents(tmp_path / "data") for token in document]
    windows = {tuple(stream[i : i + 16]) for i in range(len(stream))}
    for sample in (train[0], train[49], validation[0]):
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["tokens"].shape == (64,)
        assert tuple(sample["tokens"][:16].tolist()) in windows or 2 in sample["tokens"][:16]
        assert sample["loss_mask"].all()


def write_json_lines(folder: Path, count: int) -> list[str]:
    """Three files of documents of very different lengths, with blank lines, a byte order mark and a missing newline."""
    draw = numpy.random.default_rng(0)
    kept = []
    for i in range(3):
        with open(folder / f"{i}.jsonl", "w", encoding="utf-8-sig" if i == 0 else "utf-8") as stream:
            for j in range(count):
                text = f"{i}/{j} " + "wörd 世界\n" * int(draw.integers(0, 60)) if j % 10 else ""
                kept.append(text)
                end = "" if (i, j) == (2, count - 1) else "\n\n" if j % 7 == 0 else "\n"
                stream.write(json.dumps({"id": j, "text": text}, ensure_ascii=j % 2 == 0) + end)
    return kept


def test_workers_do_not_change_the_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = write_json_lines(tmp_path, 300)
    monkeypatch.setattr(preprocess_data, "TASK_BYTES", 5000)  # many ranges, whose bounds fall inside lines
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3))]
    preprocess(model, tmp_path / "one", *inputs, "--workers", 1)
    preprocess(model, tmp_path / "three", *inputs, "--workers", 3)
    assert f"empty, skipped {kept.count('')}\n" in capsys.readouterr().out
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"three{ending}").read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert documents(tmp_path / "one") == [processor.encode(text) + [2] for text in kept if text]


def test_shuffled_documents_are_the_same_documents(model: str, tmp_path: Path) -> None:
    write_json_lines(tmp_path, 50)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--no-append-eod"]
    preprocess(model, tmp_path / "ordered", *inputs)
    preprocess(model, tmp_path / "a", *inputs, "--shuffle-documents", 7, "--workers", 1)
    preprocess(model, tmp_path / "b", *inputs, "--shuffle-documents", 7, "--workers", 2)
    preprocess(model, tmp_path / "c", *inputs, "--shuffle-documents", 8)
    ordered, shuffled = documents(tmp_path / "ordered"), documents(tmp_path / "a")
    assert shuffled == documents(tmp_path / "b") != documents(tmp_path / "c")
    assert shuffled != ordered
    assert sorted(shuffled) == sorted(ordered)
    assert not any(2 in document for document in ordered)
    assert [name for name in os.listdir(tmp_path) if "tmp" in name] == []


def test_index_is_megatrons(tmp_path: Path) -> None:
    with quiet_imports():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    lengths = numpy.array([3, 1, 70_000, 2], dtype=numpy.int32)
    for dtype in (numpy.uint16, numpy.int32):
        builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
        for length in lengths:
            builder.add_document(numpy.ones(length, dtype), [length])
        builder.finalize(str(tmp_path / "a.idx"))
        dataset_writer.write_index(str(tmp_path / "b.idx"), dtype, lengths)
        assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def same_files(one: Path, other: Path) -> None:
    for ending in (".bin", ".idx"):
        assert Path(f"{one}{ending}").read_bytes() == Path(f"{other}{ending}").read_bytes()


def merge(output: Path, *flags: str) -> None:
    merge_data.main(["--output-prefix", str(output), *flags])


@pytest.fixture
def mixed(corpus: Path, tmp_path: Path) -> list[object]:
    """Inputs of every kind: JSON lines, plain and compressed, and text files, empty ones at both ends."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_json_lines(folder, 100)
    (folder / "1.jsonl.gz").write_bytes(gzip.compress((folder / "1.jsonl").read_bytes()))
    for i, words in enumerate((0, 400, 3, 0)):
        (folder / f"{i}.txt").write_text("text without newline " * words)
    return ["--input", folder, corpus, folder, "--glob", "**/[0-9]*"]


@pytest.mark.parametrize("parts", [1, 2, 5, 60])
@pytest.mark.parametrize("shuffle", [[], ["--shuffle-documents", 5]])
def test_parts_merge_to_what_one_process_writes(
    parts: int, shuffle: list[object], mixed: list[object], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_data, "TASK_BYTES", 3000)
    monkeypatch.setattr(dataset_writer, "SHUFFLE_BYTES", 4000)  # less than some documents have
    preprocess(model, tmp_path / "whole", *mixed, *shuffle, "--workers", 1)
    for number in range(parts, 0, -1):  # in any order
        preprocess(model, tmp_path / "d", *mixed, *shuffle, "--workers", 1, "--part", f"{number}/{parts}")
    sizes = [os.path.getsize(path) for path in tmp_path.glob("d.part-*.bin")]
    if parts in (2, 5):
        assert max(sizes) < 2 * sum(sizes) / parts
    merge(tmp_path / "d")
    same_files(tmp_path / "whole", tmp_path / "d")
    assert len(list(tmp_path.glob("d.part-*"))) == 3 * parts
    os.rename(tmp_path / "d.bin", tmp_path / "first.bin")
    os.rename(tmp_path / "d.idx", tmp_path / "first.idx")
    (tmp_path / "d.part-00001-of-00001x.bin").touch()  # no part
    Path(f"{tmp_path}/d.part-00001-of-{parts:05}.bin.77.tmp").touch()  # what a killed run leaves
    merge(tmp_path / "d", "--remove-parts")
    same_files(tmp_path / "whole", tmp_path / "d")
    assert [path.name for path in tmp_path.glob("d.part-*")] == ["d.part-00001-of-00001x.bin"]


def test_two_nodes_write_what_one_process_does(model: str, tmp_path: Path) -> None:
    """As srun starts them: two commands at a time, told apart by Slurm's variables alone."""
    write_json_lines(tmp_path, 400)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--shuffle-documents", 2]
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--workers", 2]
    started = [
        subprocess.Popen(
            command("preprocess_data", *inputs, *flags, "--output-prefix", tmp_path / "d", "--part", "slurm"),
            env={**ENVIRONMENT, "SLURM_PROCID": str(node), "SLURM_STEP_NUM_TASKS": "2"},
        )
        for node in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    merge(tmp_path / "d", "--remove-parts")
    preprocess(model, tmp_path / "whole", *inputs, "--workers", 1)
    same_files(tmp_path / "whole", tmp_path / "d")


def test_a_killed_part_is_made_again_alone(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json_lines(tmp_path, 200)
    inputs = ["--input", *(tmp_path / f"{i}.jsonl" for i in range(3)), "--workers", 2]
    preprocess(model, tmp_path / "whole", *inputs)
    for number in (1, 3):
        preprocess(model, tmp_path / "d", *inputs, "--part", f"{number}/3")
    with monkeypatch.context() as killed:
        killed.setattr(preprocess_data, "tokenize", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert "a worker was killed" in one_line(capsys, preprocess, model, tmp_path / "d", *inputs, "--part", "2/3")
    line = one_line(capsys, merge, tmp_path / "d")
    assert line.startswith(f"merge_data: error: --output-prefix {tmp_path / 'd'}: 1 of 3 parts missing (2); make each")
    assert line.endswith("e.g. --part 2/3")
    assert not (tmp_path / "d.bin").exists()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("d.part-*")}
    assert len(times) == 6
    for number in (1, 2, 3):
        preprocess(model, tmp_path / "d", *inputs, "--part", f"{number}/3")
        assert ("skipped  " in capsys.readouterr().out) == (number != 2)
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    merge(tmp_path / "d")
    same_files(tmp_path / "whole", tmp_path / "d")


def other_model(model: str, tmp_path: Path) -> str:
    """A tokenizer whose file differs, although its ids are the same."""
    Path(tmp_path / "other.model").write_bytes(Path(model).read_bytes() + bytes.fromhex("f2060161"))
    sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/other.model")
    return f"{tmp_path}/other.model"


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (["--no-append-eod"], "append_eod"),
        (["--shuffle-documents", 1], "shuffle_documents"),
        (["--errors", "replace"], "errors"),
        (["--tokenizer-model", "{other}"], "tokenizer"),
        (["--input", "{tmp}/1.jsonl", "{tmp}/0.jsonl"], "input"),
        ("touch", "input"),
    ],
)
def test_parts_that_do_not_belong_together(
    change: list[object] | str, differing: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json_lines(tmp_path, 30)
    inputs = ["--input", tmp_path / "0.jsonl", tmp_path / "1.jsonl", "--workers", 1]
    preprocess(model, tmp_path / "d", *inputs, "--part", "1/2")
    if change == "touch":
        os.utime(tmp_path / "1.jsonl", (1, 1))
        changed = []
    else:
        names = {"{other}": other_model(model, tmp_path), "{tmp}": str(tmp_path)}
        changed = [str(word) for word in change]
        for name, value in names.items():
            changed = [word.replace(name, value) for word in changed]
    line = one_line(capsys, preprocess, model, tmp_path / "d", *inputs, *changed, "--part", "1/2")
    assert f"is of a part made with another {differing}; choose another --output-prefix, or add --overwrite" in line
    preprocess(model, tmp_path / "d", *inputs, *changed, "--part", "2/2")
    line = one_line(capsys, merge, tmp_path / "d")
    assert "d.part-00002-of-00002: does not belong to part 1, which was made with another " + differing + ";" in line
    preprocess(model, tmp_path / "d", *inputs, *changed, "--part", "1/2", "--overwrite")
    merge(tmp_path / "d")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: os.truncate(f"{path}.bin", 10), ".bin: 10 bytes instead of "),
        (lambda path: os.unlink(f"{path}.bin"), ".bin: 0 bytes instead of "),
        (lambda path: os.truncate(f"{path}.idx", 34), ".idx: 34 bytes instead of "),
        (lambda path: Path(f"{path}.json").write_text("{}"), ".json: not the manifest of a part"),
        (lambda path: os.rename(f"{path}.json", str(path)[:-1] + "3.json"), "parts of divisions into 2 and 3; delete"),
        (lambda path: os.unlink(f"{path}.json"), "1 of 2 parts missing (2)"),
        (lambda path: [os.unlink(file) for file in path.parent.glob("d.part*")], "no finished part there; make them"),
        (lambda path: (path.parent / "d.idx").touch(), "d.idx exists; choose another name or add --overwrite"),
    ],
)
def test_damaged_parts_are_not_merged(
    damage: object, expected: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json_lines(tmp_path, 30)
    for number in (1, 2):
        preprocess(model, tmp_path / "d", "--input", tmp_path / "0.jsonl", "--workers", 1, "--part", f"{number}/2")
    damage(tmp_path / "d.part-00002-of-00002")
    before = sorted(os.listdir(tmp_path))
    assert expected in one_line(capsys, merge, tmp_path / "d", "--remove-parts")
    assert sorted(os.listdir(tmp_path)) == before


def test_too_little_space_for_merging(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1, "--part", "1/1")
    monkeypatch.setattr(merge_data.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert "GB are needed, 0.0 GB are free; free space" in one_line(capsys, merge, tmp_path / "d")


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "slurm"])
def test_mistakes_in_the_part(part: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--part", part)
    assert f"argument --part: {part}: " in line
    assert ("start it with srun" if part == "slurm" else "K/N is wanted") in line


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_input(
    ending: str,
    compress: Callable[[bytes], bytes],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preprocess_data, "TASK_BYTES", 1000)  # less than some lines have
    write_json_lines(tmp_path, 100)
    (tmp_path / "a.txt").write_text("one document\nof two lines")
    plain = [tmp_path / "0.jsonl", tmp_path / "2.jsonl", tmp_path / "a.txt"]
    preprocess(model, tmp_path / "plain", "--input", *plain, "--workers", 1)
    packed = [Path(f"{path}.{ending}") for path in plain]
    for path, packed_path in zip(plain, packed, strict=True):
        packed_path.write_bytes(compress(path.read_bytes()))
    preprocess(model, tmp_path / "packed", "--input", *packed, "--workers", 2)
    same_files(tmp_path / "plain", tmp_path / "packed")
    line = one_line(capsys, train_tokenizer.main, ["--input", str(packed[0]), "--output", str(tmp_path / "t")])
    assert f"--input {packed[0]}: compressed, and a sample is drawn from all over the text; decompress" in line
    content = packed[1].read_bytes()
    packed[1].write_bytes(content[: len(content) // 2])
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 1)
    assert f"--input {packed[1]}: cut off or damaged (" in line
    packed[1].write_bytes(compress(b'{"text": "a"}\n{"txt": "b"}\n'))
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 2)
    assert f"--input {packed[1]}: line 2 has no key 'text' (it has 'txt')" in line
    packed[1].write_text("not compressed")
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", *packed, "--workers", 1)
    assert line.startswith(f"preprocess_data: error: --input {packed[1]}: ")


def test_huggingface_folder(huggingface: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    folder = str(huggingface / "with_eos")
    preprocess(folder, tmp_path / "data", "--input", tmp_path, "--glob", "*.txt", "--workers", "2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = documents(tmp_path / "data")
    assert found == [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    assert [tokenizer.decode(ids[:-1]) for ids in found] == TEXTS


def test_special_tokens_in_a_text_are_told(
    huggingface: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read as such by a Hugging Face tokenizer, unless it is told otherwise; never by a sentencepiece model."""
    rows = ["one <|end|> two", "<|end|><|end|>", "three </s>", "four"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    folder = tmp_path / "tokenizer"
    shutil.copytree(huggingface / "with_eos", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    found = {}
    for split in (False, True):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": split}))
        for workers in ("1", "2"):
            capsys.readouterr()
            preprocess(
                str(folder), tmp_path / "d", "--input", tmp_path / "a.jsonl", "--workers", workers, "--overwrite"
            )
            found[split, workers] = [document.count(0) for document in documents(tmp_path / "d")]  # <|end|> is 0
            printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("special tokens")]
            assert len(printed) == (not split)
            assert split or printed[0].startswith("special tokens 3 were written out in the texts (<|end|>) and read ")
    assert found[False, "1"] == found[False, "2"] == [2, 2, 1, 1]  # a document that ends with it gets no second one
    assert found[True, "1"] == found[True, "2"] == [1, 1, 1, 1]
    (tmp_path / "a.jsonl").write_text('{"text": "one </s> two"}\n')
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.jsonl", "--overwrite")
    assert documents(tmp_path / "d")[0].count(2) == 1
    assert "special tokens" not in capsys.readouterr().out


def test_parquet_is_preprocessed_and_trains_a_tokenizer(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the same rows in JSON lines, by any number of workers and in parts."""
    import pyarrow
    import pyarrow.parquet

    rows = [f"{text} {i}" for i in range(40) for text in TEXTS[:3]] + [""]
    for name in ("a", "b"):
        table = pyarrow.table({"body": rows, "n": range(len(rows))})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    for ending in ("jsonl", "parquet"):
        files = [tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", "--json-key", "body"]
        preprocess(model, tmp_path / ending, "--input", *files, "--workers", "1")
        arguments = ["--input", *map(str, files), "--output", str(tmp_path / ending), "--vocab-size", "300"]
        train_tokenizer.main(arguments)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet", "--json-key", "body"]
    preprocess(model, tmp_path / "two", "--input", *files, "--workers", "2")
    for part in ("1/2", "2/2"):
        preprocess(model, tmp_path / "parts", "--input", *files, "--workers", "1", "--part", part)
    merge_data.main(["--output-prefix", str(tmp_path / "parts")])
    for name in ("parquet", "two", "parts"):
        same_files(tmp_path / "jsonl", tmp_path / name)
    assert (tmp_path / "jsonl.model").read_bytes() == (tmp_path / "parquet.model").read_bytes()
    line = one_line(capsys, preprocess, model, tmp_path / "x", "--input", tmp_path / "a.parquet", "--workers", "2")
    assert f"--input {tmp_path}/a.parquet: has no column 'text' (it has 'body', 'n'); name the text's column" in line
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(mark: bytes, model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(mark + b"alpha beta\n" * 30)
    (tmp_path / "b.JSONL").write_bytes(mark + b'{"text": "alpha beta\\n", "n": ' + b"9" * 5000 + b"}\n")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", tmp_path / "b.JSONL", "--workers", "1")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert [processor.decode(ids[:-1]) for ids in documents(tmp_path / "d")] == ["alpha beta\n" * 30, "alpha beta\n"]
    files = reader.find_text_files([str(tmp_path / "a.txt"), str(tmp_path / "b.JSONL")])
    assert train_tokenizer.sample_lines(files, 1000) == ["alpha beta"] * 31


def test_tokenizer_without_end_of_document(
    huggingface: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(huggingface / "without_eos")
    line = one_line(capsys, preprocess, folder, tmp_path / "d", "--input", corpus, "--glob", "**/*.py")
    assert "has no end-of-document token (eos)" in line
    assert "--no-append-eod" in line
    preprocess(folder, tmp_path / "d", "--input", corpus, "--glob", "**/*.py", "--no-append-eod")
    assert len(documents(tmp_path / "d")) > 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (b'{"text": "a"}\n\nnot json\n', [], "line 3 is not JSON (Expecting value); each line must be one object"),
        (b'{"text": "a"}\n{"body": "b"}\n', [], "line 2 has no key 'text' (it has 'body'); write {\"text\": "),
        (b'{"text": "a"}\n', ["--json-key", "content"], "line 1 has no key 'content' (it has 'text')"),
        (b'{"text": 5}\n', [], "line 1 has a number under the key 'text', not text"),
        (b'["a"]\n', [], "line 1 holds a list, not an object"),
        (
            b'{"text": "a"}\n{"text": "\xff"}\n',
            [],
            "line 2 is not UTF-8 (byte 10); convert the file to UTF-8, or use --err",
        ),
        (b'{"text": "\\ud800"}\n', [], "line 1 holds half a surrogate pair"),
        (b'{"text": ""}\n', [], "no document with text"),
        (b"\n\n", [], "no document with text"),
    ],
)
def test_bad_lines(
    content: bytes,
    flags: list[str],
    expected: str,
    workers: int,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    line = one_line(
        capsys, preprocess, model, tmp_path / "new" / "data", "--input", path, "--workers", str(workers), *flags
    )
    assert line.startswith(f"preprocess_data: error: --input {path}: ")
    assert expected in line
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_errors_replace(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x\xfe"}\n{"text": "y\\ud800z"}\n')
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--errors", "replace")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert [processor.decode(ids[:-1]) for ids in documents(tmp_path / "d")] == ["ab\ufffdc", "x\ufffd", "y\ufffdz"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--input", "{tmp}/nothing"], "--input {tmp}/nothing: no such file or folder; check the path"),
        (["--input", "{tmp}/empty"], "--input {tmp}/empty: the file is empty"),
        (["--input", "{tmp}/folder"], "--input {tmp}/folder: a folder; say which of its files to take, e.g. --glob"),
        (["--input", "{tmp}/folder", "--glob", "*"], "all 1 files are empty"),
        (["--input", "{tmp}/folder", "--glob", "*.md"], "--glob *.md: matches no file in {tmp}/folder"),
        (["--input", "{tmp}/latin1"], "--input {tmp}/latin1: line 2 is not UTF-8 (byte 1); convert"),
        (["--tokenizer-model", "{tmp}/no.model"], "--tokenizer-model {tmp}/no.model: no such file; check the path"),
        (
            ["--tokenizer-model", "{tmp}/there"],
            "--tokenizer-model {tmp}/there: no such file; did you mean {tmp}/there.m",
        ),
        (["--tokenizer-model", "{tmp}/empty"], "--tokenizer-model {tmp}/empty: the file is empty"),
        (["--tokenizer-model", "{tmp}/text"], "--tokenizer-model {tmp}/text: not a sentencepiece model"),
        (["--tokenizer-model", "{tmp}/folder"], "not a file; SentencePieceTokenizer wants one file"),
        (["--tokenizer-type", "HuggingFaceTokenizer"], "a file; HuggingFaceTokenizer wants the folder"),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tmp}/folder"],
            "--tokenizer-model {tmp}/folder: no tokenizer files in this folder",
        ),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "someone/something"],
            "someone/something: no such folder, and no tokenizer of that name in the local Hugging Face cache",
        ),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tmp}/broken"],
            "--tokenizer-model {tmp}/broken: HuggingFaceTokenizer cannot load it (",
        ),
        (["--tokenizer-type", "Wordy"], "argument --tokenizer-type: invalid choice: 'Wordy' (choose from"),
        (["--output-prefix", "{tmp}/there"], "{tmp}/there.bin exists; choose another name or add --overwrite"),
        (["--output-prefix", "{tmp}/x.bin"], "a prefix without ending is wanted: --output-prefix {tmp}/x"),
        (["--output-prefix", "{tmp}/folder/"], "--output-prefix {tmp}/folder/: a folder; add a name"),
        (["--output-prefix", "{tmp}/text/x"], "{tmp}/text is a file, not a folder; choose another place"),
        (["--output-prefix", "/proc/x"], "--output-prefix /proc/x"),
        (["--workers", "0"], "argument --workers: a number above 0 is wanted, not 0"),
        (["--workers", "9" * 20], "--workers 99999999999999999999: out of range; give 1 to 1024"),
        (["--shuffle-documents", "-1"], "--shuffle-documents -1: out of range; give 0 or more"),
        (["--wrokers", "2"], "unrecognized arguments: --wrokers 2"),
    ],
)
def test_mistakes_in_preprocessing_flags(
    flags: list[str], expected: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("some text")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "nothing.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "there.bin").touch()
    (tmp_path / "there.model").touch()
    (tmp_path / "latin1").write_bytes("ab\ncé".encode("latin-1"))
    before = sorted(os.listdir(tmp_path))
    arguments = ["--input", tmp_path / "text", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)]
    line = one_line(capsys, preprocess, model, tmp_path / "new" / "data", *arguments)
    assert line.startswith("preprocess_data: error: ")
    assert expected.replace("{tmp}", str(tmp_path)) in line
    assert sorted(os.listdir(tmp_path)) == before


def test_overwrite_replaces_both_and_drops_the_stale_index_cache(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second text")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt")
    cache = tmp_path / "d" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    preprocess(model, tmp_path / "d", "--input", tmp_path / "b.txt", "--overwrite")
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert documents(tmp_path / "d") == [processor.encode("second text") + [2]]
    assert not cache.exists()


def test_a_failed_overwrite_keeps_the_old_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    preprocess(model, tmp_path / "d", "--input", tmp_path / "a.txt")
    before = [(tmp_path / f"d{ending}").read_bytes() for ending in (".bin", ".idx")]
    one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "bad.txt", "--overwrite")
    assert [(tmp_path / f"d{ending}").read_bytes() for ending in (".bin", ".idx")] == before
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "bad.txt", "d.bin", "d.idx"]


def test_full_disk_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_writer, "write_index", full)
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 1)
    assert "d.bin: cannot be written (No space left on device)" in line
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_worker_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    start = preprocess_data.start_worker

    def start_deaf(settings: object) -> None:
        """As a worker is that was just forked: the pool's SIGTERM is lost on it."""
        start(settings)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(preprocess_data, "start_worker", start_deaf)
    monkeypatch.setattr(preprocess_data, "tokenize", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    line = one_line(capsys, preprocess, model, tmp_path / "d", "--input", tmp_path / "a.txt", "--workers", 2)
    assert "--workers 2: a worker was killed, probably for memory; use fewer workers" in line
    assert os.listdir(tmp_path) == ["a.txt"]


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start_long_run(source: Path, folder: Path, model: str) -> subprocess.Popen:
    """Starts preprocessing with two workers and returns as soon as a temporary file is there."""
    source.write_text((json.dumps({"text": "some words and some more " * 40}) + "\n") * 60_000)  # 60 MB, some seconds
    folder.mkdir()
    arguments = ["--input", source, "--output-prefix", folder / "d", "--tokenizer-model", model, "--workers", 2]
    process = subprocess.Popen(
        command("preprocess_data", *arguments, "--tokenizer-type", "SentencePieceTokenizer"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not os.listdir(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(stop: signal.Signals, model: str, tmp_path: Path) -> None:
    """The signal comes while the workers are being forked, the worst moment."""
    process = start_long_run(tmp_path / "in.jsonl", tmp_path / "out", model)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if stop == signal.SIGINT else 143)
    assert os.listdir(tmp_path / "out") == []
    assert errors == ("preprocess_data: interrupted, nothing written\n" if stop == signal.SIGINT else "")


def test_from_the_command_line(tmp_path: Path) -> None:
    """Both tools as a user starts them: nothing of Megatron's import noise, one line for a mistake."""
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 50)
    train = command("train_tokenizer", "--input", "a.txt", "--output", "tok", "--vocab-size", 300)
    done = subprocess.run(train, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "tok.model", "--output-prefix", "d"]
    made = command("preprocess_data", "--input", "a.txt", *flags)
    done = subprocess.run(made, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (
        "use it with    --data-path d --tokenizer-type SentencePieceTokenizer --tokenizer-model tok.model"
        in done.stdout
    )
    done = subprocess.run(made, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    expected = "preprocess_data: error: --output-prefix d: d.bin exists; choose another name or add --overwrite\n"
    assert done.stderr == expected


def test_workers_end_with_a_killed_parent(model: str, tmp_path: Path) -> None:
    """SIGKILL lets nobody clean up, but no worker may stay behind."""
    process = start_long_run(tmp_path / "in.jsonl", tmp_path / "out", model)
    time.sleep(0.5)
    process.kill()
    process.communicate(timeout=60)  # ends only when the last worker has closed the pipes


def make_dataset(prefix: Path, lengths: list[int]) -> str:
    with open(f"{prefix}.bin", "wb") as stream:
        numpy.arange(sum(lengths), dtype=numpy.uint16).tofile(stream)
    dataset_writer.write_index(f"{prefix}.idx", numpy.uint16, numpy.array(lengths, dtype=numpy.int32))
    return str(prefix)


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ([], [8 / 9, 1 / 9]),
        (["--temperature", "3"], [2 / 3, 1 / 3]),
        (["--temperature", "1e9"], [1 / 2, 1 / 2]),
        (["--weights", "1", "3"], [1 / 4, 3 / 4]),
    ],
)
def test_blend_weights(
    flags: list[str], weights: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """80 documents of 100 tokens, and 80 of 12 or 13: 90 % of them train."""
    prefixes = [make_dataset(tmp_path / "big", [100] * 80), make_dataset(tmp_path / "small", [12, 13] * 40)]
    output = str(tmp_path / "blend.txt")
    blend.main(["--data", *prefixes, *flags, "--split", "90,10,0", "--tokens", "36e3", "--output", output])
    words = Path(output).read_text().split()
    assert words[1::2] == prefixes
    assert [float(word) for word in words[::2]] == pytest.approx(weights, abs=1e-6)
    assert blends.read_blend_file("--data-args-path", output) == [
        (f"--data-args-path {output}, line {i}:", prefix) for i, prefix in enumerate(prefixes, 1)
    ]
    printed = capsys.readouterr().out
    for prefix, size, weight in zip(prefixes, (7200, 900), weights, strict=True):
        expected = rf"{prefix} +{size:,} +{weight:.4f} +{round(36_000 * weight):,} +{36_000 * weight / size:.2f}\n"
        assert re.search(expected, printed)
    assert f"--data-args-path {output} --split 90,10,0" in printed


def test_blend_with_its_own_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefixes = [make_dataset(tmp_path / name, [10] * (i + 1)) for i, name in enumerate("abc")]
    output = str(tmp_path / "blend.json")
    blend.main(["--data", *prefixes[:2], "--valid", *prefixes[1:], "--output", output])
    assert f"--per-split-data-args-path {output} " in capsys.readouterr().out
    assert json.loads(Path(output).read_text()) == {
        "train": ["0.333333", prefixes[0], "0.666667", prefixes[1]],
        "valid": ["20", prefixes[1], "30", prefixes[2]],
        "test": None,
    }
    found = blends.read_blends_file("--per-split-data-args-path", output)
    assert {part: [prefix for _, prefix in named] for part, named in found.items()} == {
        dataset.TRAIN: prefixes[:2],
        dataset.VALIDATION: prefixes[1:],
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "{tmp}/no"], "--data {tmp}/no: no file {tmp}/no.bin; check the path"),
        (["--data", "{tmp}/a b"], "--data '{tmp}/a b': a blend file is made of words; give the dataset a name without"),
        (["--weights", "1", "2"], "--weights 1 2: 2 weights for 1 datasets; give one for each"),
        (["--weights", "0"], "--weights 0: must be above 0; leave a dataset out that shall give nothing"),
        (["--weights", "1", "--temperature", "2"], "--temperature 2: has no effect with --weights; drop one"),
        (["--temperature", "0"], "--temperature 0: a number above 0 is wanted; 1 weighs by tokens"),
        (["--weights", "nan"], "--weights nan: must be above 0; leave a dataset out"),
        (["--data", "{tmp}/a", "{tmp}/a", "--weights", "1e308", "1e308"], "too large or too far apart; give shares"),
        (["--data", "{tmp}/a", "{tmp}/a", "--weights", "5e-324", "1e9"], "too large or too far apart; give shares"),
        (["--data", "{tmp}/a", "{tmp}/c", "--temperature", "1e-6"], "--temperature 1e-06: gives the smaller datasets"),
        (["--tokens", "nan"], "--tokens nan: a number above 0 is wanted, e.g. 26e9"),
        (["--split", "0,1,0"], "--split 0,1,0: leaves nothing of {tmp}/a to training; use e.g. --split 99,1,0"),
        (["--split", "9,1,0", "--valid", "{tmp}/a"], "--split 9,1,0: contradicts --valid and --test"),
        (["--valid", "{tmp}/no"], "--valid {tmp}/no: no file"),
        (["--output", "{tmp}/there"], "--output {tmp}/there: {tmp}/there exists; choose another name or add --ove"),
    ],
)
def test_mistakes_in_a_blend(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "a", [10] * 100)
    make_dataset(tmp_path / "a b", [10] * 100)
    make_dataset(tmp_path / "c", [20] * 100)
    (tmp_path / "there").touch()
    before = sorted(os.listdir(tmp_path))
    arguments = ["--data", f"{tmp_path}/a", "--output", f"{tmp_path}/blend"]
    arguments += [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    assert expected.replace("{tmp}", str(tmp_path)) in one_line(capsys, blend.main, arguments)
    assert sorted(os.listdir(tmp_path)) == before
