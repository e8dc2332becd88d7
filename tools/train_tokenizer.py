"""Trains a sentencepiece tokenizer that gives back every text byte for byte.

    python tools/train_tokenizer.py --input corpus/ --glob '**/*.txt' --output tokenizer --vocab-size 32000

writes tokenizer.model and tokenizer.vocab, to be used with
``--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model`` in preprocessing and training.

The text is not normalised, no space is put before it, runs of spaces are kept, digits are single tokens, and what the
vocabulary lacks (newlines and tabs too) is written as byte tokens. The one exception is U+2581, the character that
sentencepiece writes for a space: it comes back as a space. Ids: 0 <unk>, 1 <s>, 2 </s> (end of document), 3 <pad>.
"""

import argparse
import functools
import io
import os
import random
import re
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moa.command_line import output_files
from megatron_moa.command_line.numbers import positive, seed, within
from megatron_moa.data import corpus
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "train_tokenizer.py"
BLOCK_BYTES = 1 << 18  # what one draw takes from a file: small enough to mix many files, large enough to read fast
SPECIAL_TOKENS = 4  # <unk>, <s>, </s>, <pad>
MOST_TOKENS = 10_000_000  # larger ones keep sentencepiece busy before it looks whether the text has so many
MOST_THREADS = 1024
LINE_CHARACTERS = 4096  # sentencepiece skips longer sentences, so longer lines are cut
# no piece holds a control character, so those are always byte tokens; sentencepiece skips sentences with U+2585
SEPARATORS = re.compile("[\x00-\x1f\u2585]+")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, trains, writes PREFIX.model and PREFIX.vocab."""
    args = parse_arguments(argv)
    with one_line_errors(PROGRAM, "nothing written"):
        make_tokenizer(args)


def make_tokenizer(args: argparse.Namespace) -> None:
    """Everything after the flags. Raises UserError."""
    files = corpus.find_text_files(args.input, args.glob, args.exclude, args.json_key, args.errors)
    targets = output_files.check_output("--output", args.output, (".model", ".vocab"), args.overwrite)
    corpus.check_not_overwritten([file.path for file in files], "--output", targets)
    start = time.perf_counter()
    lines = sample_lines(files, args.sample_bytes, args.seed)
    model = train(lines, args)
    with output_files.written_whole("--output", targets, args.overwrite) as (model_path, vocab_path):
        Path(model_path).write_bytes(model)
        Path(vocab_path).write_text(vocabulary_table(model), encoding="utf-8")
    report(model, lines, args, time.perf_counter() - start)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this tool."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    corpus.add_input_flags(parser)
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.model and PREFIX.vocab")
    group.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    group.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    group.add_argument("--vocab-size", type=positive, default=32000, metavar="N")
    group.add_argument(
        "--character-coverage",
        type=within(float, 0.98, 1),  # sentencepiece's own bounds
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that get a token; the rarest are written as bytes (default 0.9995)",
    )
    group.add_argument(
        "--sample-bytes",
        type=positive,
        default=200_000_000,
        metavar="N",
        help="train on about so much text, drawn evenly from all files (default 200 MB)",
    )
    group.add_argument("--seed", type=seed, default=1234, metavar="N", help="which part of a larger corpus is drawn")
    threads = len(os.sched_getaffinity(0))
    group.add_argument("--threads", type=within(int, 1, MOST_THREADS), default=threads, metavar="N")
    args = parser.parse_args(argv)
    if not SPECIAL_TOKENS + 256 <= args.vocab_size <= MOST_TOKENS:
        parser.error(
            f"--vocab-size {args.vocab_size}: out of range; give {SPECIAL_TOKENS + 256} (the 256 bytes and "
            f"{SPECIAL_TOKENS} special tokens) to {MOST_TOKENS:,}"
        )
    return args


def sample_lines(files: Sequence[corpus.TextFile], sample_bytes: int, seed: int = 1234) -> list[str]:
    """Lines for training: all of a small corpus, else blocks drawn without repetition from all files.

    The same files, bounds and seed give the same lines. Only what is drawn is read.
    """
    blocks = [(file, *bounds) for file in files for bounds in blocks_of(file)]
    draw = random.Random(seed)
    files_fit = sum(file.size for file in files) <= sample_bytes
    if not files_fit:
        draw.shuffle(blocks)
    lines, text_fits = lines_of(blocks, sample_bytes)
    if files_fit and not text_fits:  # Parquet is compressed: its size is not that of its text
        draw.shuffle(blocks)
        lines, _ = lines_of(blocks, sample_bytes)
    if not lines:
        raise UserError("--input: no text in these files; give files that hold more than empty lines")
    return lines


def lines_of(blocks: Sequence[tuple[corpus.TextFile, int, int]], most: int) -> tuple[list[str], bool]:
    """Lines of blocks, up to the text that reaches ``most`` bytes; and whether that was all."""
    lines: list[str] = []
    read = 0
    for block in blocks:
        for text in block_texts(*block):
            if read >= most:
                return lines, False
            lines += training_lines(text)
            read += len(text.encode())
    return lines, True


def blocks_of(file: corpus.TextFile) -> Iterator[tuple[int, int]]:
    """Yields where the parts of a file begin and end that are drawn: bytes, or the row groups of Parquet."""
    if file.parquet:
        yield from ((group, group + 1) for group in range(corpus.row_groups(file)))
    else:
        yield from ((start, min(start + BLOCK_BYTES, file.size)) for start in range(0, file.size, BLOCK_BYTES))


def block_texts(file: corpus.TextFile, start: int, end: int) -> Iterator[str]:
    """The texts of a block: whole documents, of a text file the lines that begin in ``[start, end)``."""
    if file.json_lines or file.parquet:
        yield from corpus.texts(file, start, end)
        return
    for offset, line in corpus.lines_between(file, start, end):
        text = corpus.decode(line, file, functools.partial(corpus.line_number, file, offset))
        yield text if offset else corpus.without_bom(text)


def training_lines(text: str) -> Iterator[str]:
    """Cuts a text into the pieces sentencepiece may learn from."""
    for line in SEPARATORS.split(text):
        for start in range(0, len(line), LINE_CHARACTERS):
            yield line[start : start + LINE_CHARACTERS]


def train(lines: Sequence[str], args: argparse.Namespace) -> bytes:
    """The trained model, serialised. Raises UserError if the vocabulary does not fit the text."""
    import sentencepiece

    print(f"training       on {len(lines):,} lines with {args.threads} threads", flush=True)
    model = io.BytesIO()
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)  # C++ does not look at Ctrl-C, and there is no file yet
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=args.model_type,
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            num_threads=args.threads,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            max_sentence_length=4 * LINE_CHARACTERS + 1,  # bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,  # apart from </s>: Megatron masks the loss of padding
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(explain(str(error), args)) from None
    finally:
        signal.signal(signal.SIGINT, previous)
    return model.getvalue()


def explain(message: str, args: argparse.Namespace) -> str:
    """Sentencepiece's complaint as one line with a remedy."""
    if bound := re.search(r"too high .*value <= (\d+)", message):
        return (
            f"--vocab-size {args.vocab_size}: this text is too small for so many tokens; use --vocab-size {bound[1]} "
            "or less, or give more text"
        )
    if bound := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {args.vocab_size}: too small for the 256 bytes and the characters of this text; use "
            f"--vocab-size {bound[1]} or more, or a lower --character-coverage (now {args.character_coverage})"
        )
    reason = " ".join(message.split())[:300]
    return f"--vocab-size {args.vocab_size}: sentencepiece cannot train ({reason}); change the text or the size"


def vocabulary_table(model: bytes) -> str:
    """A line ``piece <tab> score`` for each token, for reading; programs use the model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return "".join(
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.get_piece_size())
    )


def report(model: bytes, lines: Sequence[str], args: argparse.Namespace, seconds: float) -> None:
    """Prints what was made and how well it packs the text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    sample = lines[:: max(1, len(lines) // 2000)]
    size = sum(len(line.encode()) + 1 for line in sample)  # and its newline
    tokens = sum(map(len, processor.encode(list(sample)))) + len(sample)
    print(f"trained        {args.model_type}, {processor.get_piece_size():,} tokens, in {seconds:.1f} s")
    print(f"packing        {size / tokens:.2f} bytes per token on its own text")
    print(f"written        {args.output}.model, {args.output}.vocab")
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{args.output}.model"]
    print(f"use it with    {shlex.join(flags)}")


if __name__ == "__main__":
    main()
