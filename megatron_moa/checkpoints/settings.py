"""Compares the settings a checkpoint was saved with to a run's, before anything of it is loaded.

Every checkpoint carries the args of the run that saved it, and in them the version of this project's format. Tensors of
equal shapes would load under another dictionary, order or gate without a word, so it is the settings that are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.command_line.megatron_flags import as_typed, relevant, same
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import (
    DEFAULT_GATE_INIT_STD,
    DEFAULT_INITIAL_COEFFICIENT,
    FORMAT_VERSION,
    refuse_changed_form,
)

# Decide which coefficients there are and what they mean. --moa-init and --moa-gate-init-std only say where they start,
# --moa-freeze-gates only whether they are trained: these may change.
_MIXTURE = ("moa_form", "moa_activations")
_GATES = ("moa_gate", "moa_gate_bias", "moa_amplitude")


def differing(
    names: Iterable[str],
    args: argparse.Namespace,
    saved: argparse.Namespace,
    unset: Mapping[str, object] = {},
    exactly: bool = False,
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the settings in which a run differs from a checkpoint: name, the run's value, the saved one.

    Args:
        unset: values of settings that ``saved``, of an older version, lacks; those without one are not compared.
        exactly: whether None, 0 and False are told apart, too; else :func:`same` compares.
    """
    for name in names:
        here = getattr(args, name)
        there = getattr(saved, name, unset.get(name, here))
        if here != there and (exactly or not same(name, here, there)):
            yield name, here, there


def upgrade_saved_settings(saved: argparse.Namespace, checkpoint: Checkpoint | Path) -> None:
    """Brings the args in a checkpoint to this format version, in place.

    Args without a version are of the first one.

    Args:
        checkpoint: where they are from, for the message.

    Raises:
        UserError: a format, or a form of it, that this version cannot read.
    """
    version = getattr(saved, "moa_format_version", 1)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"{checkpoint}: was saved in format version {version}, this megatron_moa reads versions up to "
            f"{FORMAT_VERSION}; load it with a megatron_moa that knows version {version}"
        )
    if version == 1:
        _upgrade_version_1(saved, checkpoint)


def _upgrade_version_1(saved: argparse.Namespace, checkpoint: Checkpoint | Path) -> None:
    if getattr(saved, "moa_mixing", "none") == "none":
        for name in ("moa_la_init", "moa_init_scale"):  # None there; without them today's defaults hold
            vars(saved).pop(name, None)
        return
    refuse_changed_form(saved.moa_form, str(checkpoint))
    gates = saved.moa_mixing == "moa"
    fixed = gates and saved.moa_amplitude == "fixed"
    start = vars(saved).pop("moa_la_init", None)
    saved.moa_init = [DEFAULT_INITIAL_COEFFICIENT] if fixed or not start else start  # gates never started there
    saved.moa_gate_init_std = saved.init_method_std if gates else DEFAULT_GATE_INIT_STD
    saved.moa_init_scale = "matched" if getattr(saved, "moa_init_scale", "mixture") == "swiglu" else "paper"


def check_saved_settings(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raises UserError unless a run's settings mean the checkpoint's parameters.

    Args:
        args: the run's, validated by Megatron.
        saved: those in the checkpoint.
        checkpoint: where they are from, for the message.
    """
    mixing, saved_mixing = args.moa_mixing, getattr(saved, "moa_mixing", "none")
    if saved_mixing == "none" and mixing != "none":
        raise UserError(
            f"{checkpoint}: has stock {_stock_activation(saved)} layers, which have no coefficients for --moa-mixing "
            f"{mixing}; convert it with tools/convert_mixing.py first (docs/upcycling.md), or take --moa-mixing none"
        )
    names = ["moa_mixing"]
    if mixing != "none":
        names += _MIXTURE
    if mixing == "moa":
        names += _GATES
        if args.moa_amplitude == "fixed":
            names.append("moa_init_scale")  # a factor kept beside the gates; elsewhere it is in the parameters
    if not getattr(args, "moe_use_upcycling", False):  # which makes a MoE of a dense checkpoint
        names += relevant(args)
    for name, here, there in differing(names, args, saved):
        raise UserError(_difference(as_typed(name, here), as_typed(name, there), checkpoint, args.use_checkpoint_args))


def _difference(here: str, there: str, checkpoint: Checkpoint, takes_saved: bool) -> str:
    remedy = "drop the flag" if takes_saved else "give that, or add --use-checkpoint-args"
    if here.startswith("no "):
        return f"this run lacks {there}, which the checkpoint was trained with ({checkpoint}); {remedy}"
    if there.startswith("no "):
        return f"{here}: the checkpoint was trained without it ({checkpoint}); drop the flag"
    return f"{here}: the checkpoint was trained with {there} ({checkpoint}); {remedy}"


# Which tokens a training sees, in what samples and in which order.
_DATA = (
    "data_path",
    "train_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "mock_data",
    "split",
    "seed",
    "dataloader_type",
    "data_sharding",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
)


def changed_data(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[str]:
    """Yields a line for each setting by which a run reads other data than before its checkpoint.

    The run that goes on from a checkpoint is compared with the one that saved it. Arguments are those of
    :func:`check_saved_settings`.
    """
    if args.finetune or args.skip_train or checkpoint.flag != "--load":
        return
    if args.seq_length != getattr(saved, "seq_length", args.seq_length):
        yield (
            f"--seq-length {args.seq_length}: the checkpoint was trained with --seq-length {saved.seq_length} "
            f"({checkpoint}); samples are cut anew, those already seen are other tokens now, and the log counts all "
            f"of them as {args.seq_length} tokens"
        )
    for name, here, there in differing(_DATA, args, saved):
        yield (
            f"{as_typed(name, here)}: the checkpoint was trained with {as_typed(name, there)} "
            f"({checkpoint}); training goes on at the same sample number of other data"
        )


def loads_optimizer(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> bool:
    """Whether the run goes on with the checkpoint's optimizer state, rather than with its weights alone."""
    fresh = args.finetune or args.no_load_optim or checkpoint.flag != "--load" or checkpoint.iteration is None
    return not fresh and not getattr(saved, "no_save_optim", False)


def vocabulary_digest(tokenizer: Any) -> str | None:
    """Returns a fingerprint of what every id of Megatron's tokenizer stands for.

    The fingerprint is a SHA-256, hexadecimal. For a tokenizer of numbers alone it is None.
    """
    try:
        pieces = tokenizer.inv_vocab
    except (AttributeError, NotImplementedError):  # NullTokenizer, and that of bytes
        return None
    return hashlib.sha256("\n".join(f"{id_} {pieces[id_]!r}" for id_ in sorted(pieces)).encode()).hexdigest()


def changed_tokens(args: argparse.Namespace, saved: argparse.Namespace, checkpoint: Checkpoint) -> Iterator[str]:
    """Yields a line if a run that finetunes has other tokens than the checkpoint it starts from.

    It compares the run's tokenizer with that of the run that saved the checkpoint. Arguments are those of
    :func:`check_saved_settings`.

    Raises:
        UserError: the tokens differ, and the run does not finetune.
    """
    trained = getattr(saved, "moa_vocabulary", None)  # None of an older version and of numbers alone
    if None in (trained, args.moa_vocabulary) or args.moa_vocabulary == trained:
        return
    change = (
        f"--tokenizer-model {args.tokenizer_model}: has other tokens than the tokenizer that the checkpoint was "
        f"trained with, {saved.tokenizer_model} ({checkpoint})"
    )
    if not args.finetune:
        raise UserError(f"{change}; give that one")
    yield change


def check_vocabulary(
    args: argparse.Namespace, saved: argparse.Namespace, vocab_size: int, checkpoint: Checkpoint
) -> None:
    """Raises UserError if the checkpoint's embedding does not fit the tokenizer's vocabulary.

    Megatron lets padded vocabularies differ, and would cut the larger one off or leave rows of the smaller one as they
    start.

    Args:
        vocab_size: the run's tokenizer's, without padding.
    """
    padded = getattr(saved, "padded_vocab_size", None)
    if padded is None:
        return
    multiple = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    fits = padded in (args.padded_vocab_size, multiple * math.ceil(vocab_size / multiple))
    if not fits or vocab_size > padded:  # with --use-checkpoint-args the run's padded size is the checkpoint's
        raise UserError(
            f"{checkpoint}: has an embedding of {padded} tokens (a vocabulary padded to a multiple of {multiple}), the "
            f"tokenizer has {vocab_size}; give the tokenizer it was trained with"
        )


def _stock_activation(saved: argparse.Namespace) -> str:
    names = {"swiglu": "SwiGLU", "squared_relu": "squared ReLU", "quick_geglu": "quick GEGLU"}
    return next((text for name, text in names.items() if getattr(saved, name, False)), "GELU")
