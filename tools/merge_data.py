"""Puts together what several runs of preprocess_data.py --part K/N have written.

    python tools/merge_data.py --output-prefix corpus

writes corpus.bin and corpus.idx from corpus.part-00001-of-00008.* and so on: byte for byte what one run without --part
would have written, shuffled if the parts were made with --shuffle-documents. It refuses parts that are missing, damaged
or made from another input, tokenizer or settings. The parts stay, unless --remove-parts is given.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence

from megatron_moa.command_line import output_files
from megatron_moa.command_line.progress_bar import progress_bar
from megatron_moa.data import dataset, dataset_writer
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "merge_data.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags and merges."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up
    with one_line_errors(PROGRAM, "nothing written, the parts are as they were"):
        merge(args)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of this tool."""
    parser = OneLineParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="as the parts were made with")
    parser.add_argument("--overwrite", action="store_true", help="replace PREFIX.bin and PREFIX.idx if they exist")
    parser.add_argument("--remove-parts", action="store_true", help="delete the parts once the dataset is there")
    return parser.parse_args(argv)


def merge(args: argparse.Namespace) -> None:
    """Everything after the flags. Raises UserError."""
    prefix = args.output_prefix
    start = time.perf_counter()
    targets = output_files.check_output("--output-prefix", prefix, (".bin", ".idx"), args.overwrite)
    parts, manifests = dataset_writer.finished_parts(prefix)
    tokens = sum(manifest.tokens for manifest in manifests)
    if not tokens:
        raise UserError(f"--output-prefix {prefix}: no document with text in any part; give files that are not empty")
    needed = sum(sum(manifest.expected_sizes.values()) for manifest in manifests)
    free = shutil.disk_usage(os.path.dirname(prefix) or ".").free
    if free < needed:
        raise UserError(
            f"--output-prefix {prefix}: {needed / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free; free space"
        )
    data_bytes = sum(manifest.expected_sizes[".bin"] for manifest in manifests)
    with output_files.written_whole("--output-prefix", targets, args.overwrite) as (bin_path, idx_path):
        with progress_bar(data_bytes, "merging") as bar:
            dataset_writer.merge(parts, manifests, bin_path, idx_path, bar.update)
        if args.overwrite:
            dataset_writer.drop_index_cache(prefix)
    with one_line_errors(PROGRAM, "the dataset is whole, parts may be left"):
        written = dataset.read_index(prefix, "--output-prefix")
        assert written.tokens == tokens, f"{written.tokens} tokens instead of {tokens}"
        seconds = time.perf_counter() - start
        print(f"parts          {len(parts)}")
        print(f"documents      {written.sequences:,}")
        print(f"tokens         {tokens:,}")
        print(f"written        {targets[0]}, {targets[1]} in {seconds:.1f} s, {data_bytes / seconds / 1e6:,.0f} MB/s")
        if args.remove_parts:
            dataset_writer.remove_parts(parts)
        else:
            parts_files = f"{shlex.quote(prefix)}.part-*-of-*.*"
            print(f"kept           {needed / 1e9:,.3f} GB of parts; when they are not wanted: rm {parts_files}")


if __name__ == "__main__":
    main()
