"""Measures how well a model predicts texts that the model was not trained on.

    python tools/evaluate_text.py --load runs/demo/moa --text held-out.txt
    python tools/evaluate_text.py --load exports/moa --text held-out/*.txt --stride 256

The measures are nats a token, and bits and perplexity a byte. The folder is a Megatron checkpoint or a Hugging Face
folder, and both compute in float32, with --bf16 in bfloat16; further Megatron flags may follow for the former. Files
are read as by preprocess_data.py: a text file is one document, and so is a JSON line and a row of Parquet. The
end-of-document token stands before each, is not predicted, and has no bytes; nothing is predicted behind the last
token. Longer documents than the model's context are read in windows that overlap: --stride is how far a window moves,
so that all tokens but a document's first see at least window minus stride tokens. Bytes make models of different
tokenizers comparable. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.progress_bar import progress_bar
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.command_line.trained_model import check_source
from megatron_moa.data.corpus import add_reading_flags, read_documents
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

if TYPE_CHECKING:
    from megatron_moa.trained.text_model import TextModel

PROGRAM = "evaluate_text.py"
_ENOUGH = 1000  # letters that show as a rule whether a text has tokens


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what training's --save named, or an export")
    add_iteration_flag(parser)
    parser.add_argument("--text", required=True, nargs="+", metavar="FILE", help="text files, JSON lines or Parquet")
    add_reading_flags(parser)
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens a window moves by (default half a window)")
    parser.add_argument(
        "--window", type=positive, metavar="N", help="tokens a window has (default the model's context)"
    )
    return parser.parse_known_args(argv)


def has_token(model: TextModel, document: str) -> bool:
    """Whether a document has a token: spaces have none for some tokenizers, as for preprocess_data.py."""
    return bool(model.encode(document[:_ENOUGH]) or model.encode(document))


@one_line_errors(PROGRAM)
def main(argv: list[str] | None = None) -> None:
    """Loads, predicts, prints a line a file and their sum as JSON."""
    flags, megatron_flags = parse_flags(argv)
    check_source(flags, megatron_flags)
    files = {
        path: read_documents(Path(path), "--text", flags.json_key, flags.errors, True)
        for path in dict.fromkeys(flags.text)
    }
    # Imported after the flags are read: it takes seconds.
    from megatron_moa.load import load
    from megatron_moa.trained.text_model import TextLoss

    print(f"> loading {flags.load}", file=sys.stderr)
    with held_log():
        model = load(flags.load, megatron_flags, flags.iteration)
    for path, documents in files.items():
        files[path] = [document for document in documents if has_token(model, document)]
        if not files[path]:
            raise UserError(f"--text {path}: has no token for this model's tokenizer; give a file with text")
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"> predicting in {dtype}", file=sys.stderr)
    total = TextLoss(0.0, 0, 0)
    for path, documents in files.items():
        loss = TextLoss(0.0, 0, 0)
        with progress_bar(sum(len(document.encode()) for document in documents), path) as progress:
            for document in documents:
                loss += model.text_loss(document, flags.stride, flags.window, progress.update)
        print(f"{path}: {loss.loss_per_token:.4f} nats a token, {loss.bits_per_byte:.4f} bits a byte", file=sys.stderr)
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
        "dtype": dtype,
        "load": flags.load,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
