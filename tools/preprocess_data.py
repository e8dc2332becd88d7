"""Turns text into a Megatron dataset: PREFIX.bin with the tokens and PREFIX.idx with the documents.

    python tools/preprocess_data.py --input corpus/ --glob '**/*.txt' --output-prefix corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

writes corpus.bin and corpus.idx; train on them with ``--data-path corpus``. A plain text file is one document, and so
is each line of a JSON-lines file and each row of a Parquet file. Documents keep the order of the input, whatever the
number of workers. Megatron takes the validation split from the end of that order: with --shuffle-documents it is a fair
sample.

Several machines share the work with --part K/N, or under Slurm

    srun --nodes 8 --ntasks-per-node 1 python tools/preprocess_data.py … --part slurm

and tools/merge_data.py puts the parts together, to the bytes that one process would have written. A part that was
interrupted is made again alone; finished ones are skipped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_moa.command_line.numbers import within
from megatron_moa.data import corpus, dataset_writer, tokenizers
from megatron_moa.data.preprocessing import preprocess
from megatron_moa.errors import OneLineParser, one_line_errors

PROGRAM = "preprocess_data.py"
_MOST_WORKERS = 1024
TOKENIZER_TYPES = (*tokenizers.SENTENCEPIECE_TYPES, "HuggingFaceTokenizer")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags, tokenizes, writes PREFIX.bin and PREFIX.idx."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up
    with one_line_errors(PROGRAM, "nothing written"):
        preprocess(args)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the flags of this tool; those of the tokenizer are Megatron's."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    corpus.add_input_flags(parser)
    group = parser.add_argument_group("tokenizer (as in training)")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    group.add_argument("--tokenizer-model", metavar="PATH", help="a .model file, or a Hugging Face folder")
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="do not add the tokens that a Hugging Face tokenizer puts around a text",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    group.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    group.add_argument(
        "--shuffle-documents", type=within(int, 0), metavar="SEED", help="put the documents in a random order"
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        type=within(int, 1, _MOST_WORKERS),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes on this machine; default: its cores",
    )
    group.add_argument(
        "--part",
        type=dataset_writer.part_from_flag,
        metavar="K/N",
        help="do the K-th of N shares of the input, for tools/merge_data.py; slurm: the task of srun that this is",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
