"""Checks a tokenizer's flags and files, and builds Megatron's tokenizer from them."""

import argparse
import copy
import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_moa.command_line.quiet_imports import quiet_imports
from megatron_moa.errors import UserError, one_line, why_absent

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raises UserError unless the files of ``--tokenizer-type`` are there and look like it.

    It never uses the network.

    Args:
        args: Megatron's namespace, or one with only some of the attributes of its TokenizerConfig.
    """
    names = ("tokenizer_type", "tokenizer_model", "vocab_size", "vocab_file", "merge_file")
    tokenizer_type, tokenizer_model, vocab_size, vocab_file, merge_file = (getattr(args, name, None) for name in names)
    if tokenizer_type is None:
        raise UserError(
            "--tokenizer-type is missing; for a tokenizer of tools/train_tokenizer.py add --tokenizer-type "
            "SentencePieceTokenizer --tokenizer-model PREFIX.model"
        )
    if tokenizer_type in ("NullTokenizer", "NullMultimodalTokenizer"):
        if not vocab_size:
            raise UserError(f"--tokenizer-type {tokenizer_type}: has no vocabulary of its own; add --vocab-size N")
    elif tokenizer_type in SENTENCEPIECE_TYPES:
        _check_sentencepiece(tokenizer_type, tokenizer_model)
    elif tokenizer_type == "HuggingFaceTokenizer":
        _check_huggingface(tokenizer_model)
    elif tokenizer_type == "TikTokenizer":
        _require_file("--tokenizer-model", tokenizer_model, tokenizer_type)
    elif tokenizer_type in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"):
        _require_file("--vocab-file", vocab_file, tokenizer_type)
        if tokenizer_type == "GPT2BPETokenizer":
            _require_file("--merge-file", merge_file, tokenizer_type)


def _require_file(flag: str, path: str | None, tokenizer_type: str) -> str:
    if not path:
        raise UserError(f"--tokenizer-type {tokenizer_type}: needs a file; add {flag} FILE")
    if not os.path.exists(path):
        near = f"; did you mean {path}.model?" if os.path.exists(f"{path}.model") else "; check the path"
        raise UserError(f"{flag} {path}: {why_absent(path)}{near}")
    if not os.path.isfile(path):
        hint = " (for a folder of Hugging Face files use --tokenizer-type HuggingFaceTokenizer)"
        raise UserError(f"{flag} {path}: not a file; {tokenizer_type} wants one file{hint}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag} {path}: not readable; change its permissions (chmod +r)")
    if os.path.getsize(path) == 0:
        raise UserError(f"{flag} {path}: the file is empty; copy or train the tokenizer again")
    return path


def _check_sentencepiece(tokenizer_type: str, tokenizer_model: str | None) -> None:
    path = _require_file("--tokenizer-model", tokenizer_model, tokenizer_type)
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path).get_piece_size()
    except (RuntimeError, OSError):
        pieces = 0
    if not pieces:
        raise UserError(
            f"--tokenizer-model {path}: not a sentencepiece model; give the .model of tools/train_tokenizer.py, or use "
            "--tokenizer-type HuggingFaceTokenizer for a folder with tokenizer.json"
        )


def _check_huggingface(tokenizer_model: str | None) -> None:
    if not tokenizer_model:
        raise UserError("--tokenizer-type HuggingFaceTokenizer: needs a folder; add --tokenizer-model FOLDER")
    if os.path.isfile(tokenizer_model):
        raise UserError(
            f"--tokenizer-model {tokenizer_model}: a file; HuggingFaceTokenizer wants the folder of tokenizer.json"
        )
    if os.path.isdir(tokenizer_model):
        if not any(Path(tokenizer_model, name).is_file() for name in _HUGGINGFACE_FILES):
            raise UserError(
                f"--tokenizer-model {tokenizer_model}: no tokenizer files in this folder "
                f"({', '.join(_HUGGINGFACE_FILES)}); save one there with tokenizer.save_pretrained(FOLDER)"
            )
    elif not _in_huggingface_cache(tokenizer_model):
        raise UserError(
            f"--tokenizer-model {tokenizer_model}: no such folder, and no tokenizer of that name in the local Hugging "
            "Face cache; check the path, or fetch it once where there is a network (hf download NAME)"
        )


def tokenizer_digest(tokenizer_model: str) -> str:
    """A fingerprint (SHA-256, hexadecimal) of the files that decide token ids, wherever they lie.

    Args:
        tokenizer_model: ``--tokenizer-model``, checked by :func:`check_tokenizer`: a file, a Hugging Face folder, or
            a name in the local Hugging Face cache.
    """
    path = Path(tokenizer_model)
    if path.is_file():
        files = {"model": path}  # whatever its name
    elif path.is_dir():
        patterns = ("*.model", "*.py", "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*")
        files = {found.name: found for pattern in patterns for found in path.glob(pattern) if found.is_file()}
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = {name: try_to_load_from_cache(tokenizer_model, name) for name in _HUGGINGFACE_FILES}
        files = {name: Path(found) for name, found in cached.items() if isinstance(found, str)}
    digest = hashlib.sha256()
    for name, found in sorted(files.items()):
        digest.update(f"{name} {hashlib.sha256(found.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


_HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _in_huggingface_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _HUGGINGFACE_FILES)
    except HFValidationError:  # a path, not a name
        return False


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer for its own flags, without initialising Megatron; what fails is a UserError.

    Args:
        args: Megatron's namespace, or one with only some of the attributes of its TokenizerConfig.
    """
    with quiet_imports():
        from megatron.core.tokenizers.utils import build_tokenizer as megatron

        settings = copy.copy(args)
        for name, default in _TOKENIZER_DEFAULTS.items():
            if not hasattr(settings, name):
                setattr(settings, name, default)
        settings.pad_vocab_size = False  # the padded size depends on the parallel layout and is not wanted here
        try:
            return megatron.build_tokenizer(settings)
        except Exception as error:  # third-party loaders raise anything, and users must get one line
            reason = one_line(error)[:300]
            raise UserError(
                f"--tokenizer-model {args.tokenizer_model}: {args.tokenizer_type} cannot load it ({reason}); check "
                "--tokenizer-type and the files"
            ) from None


def adds_special_tokens(tokenizer: Any) -> bool:
    """Returns whether Megatron's tokenizer puts its model's first and last tokens around a text."""
    return getattr(tokenizer._tokenizer, "include_special_tokens", False)


_TOKENIZER_DEFAULTS = {
    "vocab_size": None,
    "vocab_file": None,
    "merge_file": None,
    "metadata_path": None,
    "special_tokens": None,
    "chat_template": None,
    "trust_remote_code": False,
    "tiktoken_pattern": None,
    "tiktoken_num_special_tokens": 1000,
    "tokenizer_hf_no_use_fast": False,
    "tokenizer_hf_no_include_special_tokens": False,
    "tokenizer_sentencepiece_legacy": False,
    "tokenizer_sentencepiece_ignore_extra_whitespaces": True,
}
