"""How well a model predicts texts it was not trained on: nats a token, bits and perplexity a byte.

    python tools/evaluate_text.py --load runs/demo/moa --text held-out.txt
    python tools/evaluate_text.py --load exports/moa --text held-out/*.txt --stride 256

The folder is a Megatron checkpoint or a Hugging Face folder; further Megatron flags may follow for the former. A file
is one document, in UTF-8; of a file of JSON lines every "text" is one. The end-of-document token stands before each,
is not predicted, and has no bytes; nothing is predicted behind the last token. Longer documents than the model's
context are read in windows that overlap: --stride is how far a window moves, so that all tokens but a document's first
see at least window minus stride tokens. Bytes make models of different tokenizers comparable. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from megatron_moa.data import read_documents
from megatron_moa.errors import OneLineParser, one_line_errors
from megatron_moa.tool_flags import add_iteration_flag

PROGRAM = "evaluate_text.py"


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what training's --save named, or an export")
    add_iteration_flag(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="text files, or JSON lines (.jsonl)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens a window moves by (default half a window)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens a window has (default the model's context)")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Loads, predicts, prints a line a file and their sum as JSON."""
    with one_line_errors(PROGRAM):
        flags, megatron_flags = parse_flags(argv)
        files = {path: read_documents(path) for path in map(Path, flags.text)}
        # Imported after the flags are read: it takes seconds.
        from megatron_moa.inference import TextLoss, load

        with contextlib.redirect_stdout(sys.stderr):  # Megatron's log
            model = load(flags.load, megatron_flags, flags.iteration)
        total = TextLoss(0.0, 0, 0)
        for path, documents in files.items():
            loss = TextLoss(0.0, 0, 0)
            for document in documents:
                loss += model.text_loss(document, flags.stride, flags.window)
            print(
                f"{path}: {loss.loss_per_token:.4f} nats a token, {loss.bits_per_byte:.4f} bits a byte", file=sys.stderr
            )
            total += loss
    result = {
        "loss_per_token": total.loss_per_token,
        "bits_per_byte": total.bits_per_byte,
        "byte_perplexity": total.byte_perplexity,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "documents": sum(map(len, files.values())),
        "window": flags.window or model.context,
        "stride": flags.stride or max(1, (flags.window or model.context) // 2),
        "load": flags.load,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
