"""Exports the tokenizer that a model was trained with to a folder for transformers.

The folder gives the same ids. A sentencepiece model becomes one of the tokenizers library, so that nothing has to be
installed to use it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moa.data.tokenizers import SENTENCEPIECE_TYPES, adds_special_tokens
from megatron_moa.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Scripts with and without spaces, right to left, combining marks, digits, code, runs of white space at the ends and in
# between, characters beyond the basic plane, joined emoji, and the mark that sentencepiece writes for a space.
SAMPLE = (
    "  The quick brown fox; l'été à Zürich, naïve façade. Żółć, İstanbul, ŉ, ﬁne, Ω≈ç√∫. "
    "Съешь же ещё этих мягких булок. Ξεσκεπάζω την ψυχοφθόρα. עברית עם נִקּוּד. العربية مع تشكيلٍ ٣٤٥. "
    "हिन्दी में लिखा है। தமிழ் எழுத்து. ภาษาไทยไม่มีช่องว่าง។ ខ្មែរ မြန်မာ ქართული Հայերեն አማርኛ ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ བོད་སྐད། "
    "日本語の文章、カタカナと漢字。简体中文没有空格，繁體中文。한국어 문장입니다. Tiếng Việt có dấu, e\u0301 and é. "
    "0 1 23 456 7890 3.14159 1e-05 ½ ² Ⅷ １２３ $5 €6 100%\n\n\tdef f(x):\r\n        return x ** 2  # ok\n    \n"
    "<b>a &amp; b</b> ==== ---- ...... aaaaaaa       end 🙂👩‍👩‍👧‍👦🇨🇭 𝔘𝔫𝔦 𒀀 \u200b\u00a0\ufeff \u2581x\u2581\u2581y  "
)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of pieces in a sentencepiece model


def export_tokenizer(tokenizer: Any, args: argparse.Namespace, folder: Path, config: PreTrainedConfig) -> bool:
    """Writes the tokenizer's files and compares their ids to the trained tokenizer's.

    They are compared on :data:`SAMPLE` and special tokens.

    Args:
        tokenizer: Megatron's.
        args: those it was built from.
        folder: exists.
        config: of the exported model, whose kind may decide which class of tokenizer transformers loads.

    Returns:
        False for a NullTokenizer, which has nothing to export.

    Raises:
        UserError: it cannot be exported, or would give other ids.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    library = tokenizer._tokenizer
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind == "NullTokenizer":
        return False
    if kind in SENTENCEPIECE_TYPES:
        if library.special_token_to_id:
            raise UserError(f"--special-tokens: added beside {model}, they cannot be exported; add --no-tokenizer")
        _from_sentencepiece(Path(model), args.seq_length).save_pretrained(folder)
    elif isinstance(getattr(library, "tokenizer", None), PreTrainedTokenizerBase):
        own = _as_in_its_folder(library.tokenizer, args)
        (own if adds_special_tokens(tokenizer) else _without_special_tokens(own)).save_pretrained(folder)
    else:
        raise UserError(f"--tokenizer-type {kind}: cannot be exported; add --no-tokenizer and put one there yourself")
    exported = AutoTokenizer.from_pretrained(folder)
    added = list(exported.get_added_vocab())
    text = SAMPLE + " ".join(added) + "x".join(added)
    expected, ids = tokenizer.tokenize(text), exported.encode(text)
    if ids != expected:
        first = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), len(ids))
        raise UserError(
            f"--tokenizer-model {model}: exported it would give other ids than in training, from token {first} on "
            f"({ids[first : first + 4]} instead of {expected[first : first + 4]}); add --no-tokenizer"
        )
    beside = AutoTokenizer.from_pretrained(folder, config=config)  # as beside config.json
    if beside.encode(text) != expected or beside.decode(expected) != exported.decode(expected):
        raise UserError(
            f"--tokenizer-model {model}: transformers reads it as another tokenizer beside a model of type "
            f"{config.model_type}; add --architecture GPTMoAForCausalLM, or --no-tokenizer"
        )
    return True


def _as_in_its_folder(trained: PreTrainedTokenizerBase, args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Returns a Hugging Face tokenizer without what Megatron adds to one: the tokens ``cls`` and ``sep``."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(
        args.tokenizer_model,
        use_fast=not getattr(args, "tokenizer_hf_no_use_fast", False),
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )
    if plain.get_added_vocab() != trained.get_added_vocab():  # --special-tokens, with which it was trained
        return trained
    plain.chat_template = trained.chat_template  # of --chat-template
    for name in ("is_local", "local_files_only"):  # how it was loaded
        plain.init_kwargs.pop(name, None)
    return plain


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a copy that puts nothing around a text, as --tokenizer-hf-no-include-special-tokens trained."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_bos_token = tokenizer.add_eos_token = False  # which is saved, where a kind of tokenizer goes by them
    if tokenizer.encode("a") != tokenizer.encode("a", add_special_tokens=False) and tokenizer.is_fast:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    return tokenizer


def _from_sentencepiece(path: Path, max_length: int) -> Any:
    """A transformers tokenizer of a sentencepiece model, BPE or unigram.

    Special tokens that a text spells out are text, as they were in training; ``split_special_tokens=False`` in a call
    makes them tokens.

    Raises:
        UserError: it is of another kind.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer, pieces = proto.trainer_spec, proto.normalizer_spec, list(proto.pieces)
    if trainer.model_type == trainer.BPE:
        model = models.BPE(
            {piece.piece: number for number, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    elif trainer.model_type == trainer.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        model = models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        raise UserError(f"--tokenizer-model {path}: neither BPE nor unigram; add --no-tokenizer")
    tokenizer = Tokenizer(model)
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(parts)
    added = [piece for piece in pieces if piece.type in (_CONTROL, _USER_DEFINED) and " " not in piece.piece]
    for piece in added:  # with a space it never matches: sentencepiece looks for it where spaces are U+2581
        if "\u2581" in piece.piece:
            raise UserError(f"--tokenizer-model {path}: its symbol {piece.piece!r} has a space; add --no-tokenizer")
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in added])
    specials = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id}
    specials["pad_token"] = trainer.pad_id
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **{name: pieces[number].piece for name, number in specials.items() if number >= 0},
    )


def _merges(pieces: list[Any]) -> list[tuple[str, str]]:
    """Returns the pairs that BPE joins, best first.

    Sentencepiece takes the pair whose joined piece has the best score, and of equal ones the leftmost. The latter joins
    runs of one character from the left, where longer left parts stand.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: -scores["".join(pair)])
