"""Loads a trained model from a folder, Megatron's or Hugging Face's, to use it: text, logits, losses."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moa.command_line.trained_model import check_no_checkpoint_flags
from megatron_moa.errors import needs_extra
from megatron_moa.trained.text_model import TextModel


def load(folder: str | Path, megatron_flags: Sequence[str] = (), iteration: int | None = None) -> TextModel:
    """The model of a Megatron checkpoint of any split, or of a Hugging Face folder, on this one process.

    It computes in float32, whatever its weights are stored in, so that models of both kinds compare.

    Args:
        folder: what training's ``--save`` named, or a folder with a config.json.
        megatron_flags: ``--bf16`` or ``--fp16`` to compute in that; further flags for a checkpoint, such as
            ``--tokenizer-model FILE`` for one that has moved.
        iteration: which checkpoint; None for the latest.

    Raises:
        UserError: neither is there, it cannot be loaded, or flags that do not fit it.
    """
    if not (Path(folder) / "config.json").is_file():
        from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

        # isort: split
        from megatron_moa.trained.from_megatron import load_model

        return load_model(str(folder), megatron_flags, iteration)
    dtype = check_no_checkpoint_flags(folder, iteration, megatron_flags)
    with needs_extra("hf"):
        from megatron_moa.hf.loading import load_folder
    return load_folder(Path(folder), dtype)


def from_checkpoint(folder: str | Path, megatron_flags: Sequence[str] = (), iteration: int | None = None) -> TextModel:
    """Loads a model for a notebook, as :func:`load` does, in silence.

        model = megatron_moa.from_checkpoint("runs/demo/moa")
        model.generate("def ", num_tokens=20)[0].text
        model.logits("def f(x):")                       # [tokens, vocabulary]
        model.text_loss(text).bits_per_byte

    The call prints none of Megatron's messages and leaves no trace in the environment. It needs no torchrun, may be
    called again for other checkpoints, and leaves ``sys.argv`` alone. A checkpoint's
    :class:`megatron_moa.trained.from_megatron.LoadedModel` further has ``model``, ``tokenizer``, ``mixture``, ``args``
    and ``iteration``; a folder's :class:`megatron_moa.hf.loading.FolderModel` the first three, and ``config``.
    """
    with _silence(), _environment_stays():
        return load(folder, megatron_flags, iteration)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _environment_stays() -> Iterator[None]:
    """Puts the environment's variables back at the end, as they were before.

    What Megatron is told there (RANK, MASTER_PORT, …) would mislead programs that a notebook starts later.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
