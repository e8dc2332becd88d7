"""A small SentencePiece model of this project's own sources."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import sentencepiece

from tests.support.training import ROOT


def train_sentencepiece(path: Path, kind: str = "bpe", **settings: object) -> sentencepiece.SentencePieceProcessor:
    """Writes a model of 1200 tokens, as tools/train_tokenizer.py makes them.

    The same settings are trained once.
    """
    path.write_bytes(_trained(kind, json.dumps(settings)))
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@functools.cache
def _trained(kind: str, settings: str) -> bytes:
    sources = sorted((ROOT / "megatron_moa").rglob("*.py"))
    model = io.BytesIO()
    defaults = {
        "vocab_size": 1200,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    defaults |= {"allow_whitespace_only_pieces": True, "split_digits": True, "byte_fallback": True}
    defaults |= {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for source in sources for line in source.read_text().split("\n")),
        model_writer=model,
        model_type=kind,
        **{**defaults, **json.loads(settings)},
    )
    return model.getvalue()
