"""Loads a trained model from a Megatron checkpoint into one process, with the settings it carries."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer
from megatron.training.global_vars import unset_global_variables
from megatron.training.initialize import initialize_megatron
from megatron.training.utils import print_rank_0

from megatron_moa import startup
from megatron_moa.checkpoints.files import Checkpoint
from megatron_moa.checkpoints.guard import EarlierIsComplete, changed_scales, check_before_setup, match_tensors
from megatron_moa.checkpoints.names import EXTRA_STATE
from megatron_moa.checkpoints.tensors import CheckpointTensors, check_pickles
from megatron_moa.data.tokenizers import adds_special_tokens, build_tokenizer, check_tokenizer
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.trained.text_model import TextModel, tokens_before_text
from megatron_moa.training.arguments import parse_arguments
from megatron_moa.training.model import MixedGPTModelBuilder, MixedGPTModelConfig, check_mixture, model_config_from_args

_prepared = False  # whether Megatron's global state in this process is ours to take back


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A model in evaluation mode, with what belongs to it.

    Attributes:
        model: the GPT model, whole, on this process's device.
        args: Megatron's args, the model's settings as in the checkpoint.
        mixture: its mixture, None for stock feed-forward layers.
        tokenizer: the one it was trained with.
        rows: of the embedding, without padding; an imported model may have more than its tokenizer has tokens.
        iteration: the training iteration it was saved at.
        saved_ends: the tokens that end a text by the Hugging Face folder it came from; None for the tokenizer's.
    """

    model: GPTModel
    args: argparse.Namespace
    mixture: MixtureConfig | None
    tokenizer: Any
    rows: int
    iteration: int
    saved_ends: Sequence[int] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.args.params_dtype

    @property
    def vocab_size(self) -> int:
        return self.rows

    @property
    def context(self) -> int:
        return self.args.max_position_embeddings

    @property
    def end(self) -> int | None:
        end = self.tokenizer.eod
        return None if end is None or end < 0 else end  # sentencepiece has -1 for none

    @property
    def ends(self) -> tuple[int, ...]:
        return super().ends if self.saved_ends is None else tuple(self.saved_ends)

    @property
    def before_text(self) -> list[int]:
        return tokens_before_text(self.tokenizer._tokenizer.tokenizer) if adds_special_tokens(self.tokenizer) else []

    def encode(self, text: str) -> list[int]:
        if adds_special_tokens(self.tokenizer):
            return self.tokenizer._tokenizer.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        try:
            return self.tokenizer.tokenize(text)
        except ValueError:
            if self.args.tokenizer_type != "NullTokenizer":
                raise
            raise UserError(
                f"--load {self.args.load}: was trained on numbers, without a tokenizer; write tokens as 1 2 3, or add "
                "--tokenizer-type and --tokenizer-model"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.detokenize(list(tokens))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(tokens, positions, None)[..., : self.vocab_size]

    def _continued(
        self, rows: list[list[int]], steps: int, choose_next: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[list[int]]:
        """Whole sequences are computed again for each token: for looking at a model, not for serving one.

        Padded on the right, which a causal model does not see.
        """
        longest = max(map(len, rows)) + steps
        padding = self.end or 0
        tokens = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        every = torch.arange(len(rows), device=self.device)
        finished = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        ends = torch.tensor(self.ends, dtype=torch.long, device=self.device)
        for step in range(steps):
            logits = self.forward(tokens[:, : int(lengths.max()) + step])
            chosen = choose_next(logits[every, lengths + step - 1].float())
            tokens[every, lengths + step] = torch.where(finished, padding, chosen)
            finished |= torch.isin(chosen, ends)
            if finished.all():
                break
        return [row[len(given) : len(given) + steps] for row, given in zip(tokens.tolist(), rows, strict=True)]


@dataclass(frozen=True)
class PreparedCheckpoint:
    """A checkpoint whose settings have been read and whose files have been checked.

    Its weights have not been read yet.

    Attributes:
        args: Megatron's args, the model's settings as in the checkpoint.
        saved: the args it was saved with.
        checkpoint: where it is.
        config: what a model of it is built from.
        tokenizer: the one it was trained with.
    """

    args: argparse.Namespace
    saved: argparse.Namespace
    checkpoint: Checkpoint
    config: MixedGPTModelConfig
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """Returns the number of rows of the embedding without padding.

        An imported model may have more rows than its tokenizer has tokens; ``--vocab-size`` has their number then.
        """
        known = self.args.vocab_size if self.args.tokenizer_type == "HuggingFaceTokenizer" else None
        return max(self.tokenizer.vocab_size, known or 0)

    @property
    def saved_ends(self) -> Sequence[int] | None:
        """Returns the tokens that end a text by the Hugging Face folder the model came from.

        This is None where the tokenizer says which: the model came from no such folder, or from one that names none.
        """
        ends = getattr(self.saved, "moa_end_tokens", None)
        if ends is None and hasattr(self.saved, "moa_end_tokens") and self.args.tokenizer_type == "NullTokenizer":
            return ()  # a NullTokenizer's end is its last number, which may be any token of the folder's vocabulary
        return ends

    def build_empty(self) -> GPTModel:
        """:func:`empty_model` of its settings."""
        return empty_model(self.config)

    def load(self) -> LoadedModel:
        """Builds the model and loads its weights."""
        models = MixedGPTModelBuilder(self.config).build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        check_mixture(models, self.config.mixture)
        model = unwrap_model(models[0])
        _load_weights(model, self.checkpoint.path)
        for parameter in model.parameters():
            parameter.requires_grad = False
        iteration = self.checkpoint.iteration or 0
        mixture, rows = self.config.mixture, self.vocab_size
        return LoadedModel(models[0].eval(), self.args, mixture, self.tokenizer, rows, iteration, self.saved_ends)


def _load_weights(model: GPTModel, folder: Path) -> None:
    """Megatron's loading, into the parameters' own memory.

    What lies in the checkpoint in several parts, as the first linear map of a gated layer does, Megatron would put
    together anew: a second copy of 40 % of a model. The parts are views of the parameter, so nothing has to be.
    """
    checkpoint = CheckpointTensors(folder)
    state = model.sharded_state_dict(metadata=dict(checkpoint.content_metadata))
    match_tensors(state, str(folder))
    if change := changed_scales(model.config, checkpoint):
        print_rank_0(f"WARNING: --load {folder}: {change}")
    state = {name: place.build() if isinstance(place, ShardedTensorFactory) else place for name, place in state.items()}
    loaded = dist_checkpointing.load({"model": state}, str(folder))["model"]
    if model.config.fp8:
        model.load_state_dict({name: loaded[name] for name in loaded if EXTRA_STATE in name}, strict=False)
    tensors = [value for value in nested_values([loaded]) if isinstance(value, torch.Tensor)]
    filled = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for name, tensor in model.state_dict().items():
        is_there = name.endswith(EXTRA_STATE) or tensor.untyped_storage().data_ptr() in filled
        assert is_there, f"{name} was not loaded in place"


def empty_model(config: MixedGPTModelConfig) -> GPTModel:
    """A model on the meta device: names and shapes, no memory. Grouped experts are there one by one."""
    config = copy.copy(config)
    config.transformer = copy.copy(config.transformer)
    # Megatron's layers leave the device to torch then, and start nothing.
    config.transformer.use_cpu_initialization = True
    config.transformer.perform_initialization = False
    config.transformer.moe_grouped_gemm = False
    with torch.device("meta"):
        return MixedGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def load_model(folder: str, megatron_flags: Sequence[str] = (), iteration: int | None = None) -> LoadedModel:
    """Loads a checkpoint, saved under any split, into this one process.

    Args and errors as :func:`prepare_checkpoint`.
    """
    return prepare_checkpoint(folder, megatron_flags, iteration).load()


def prepare_checkpoint(
    folder: str, megatron_flags: Sequence[str] = (), iteration: int | None = None
) -> PreparedCheckpoint:
    """Reads a checkpoint's settings, checks its files, and sets Megatron up for it in this one process.

    Its pickled parts are first read by rules that admit no code, so that Megatron meets no stranger's.

    A later call sets Megatron up anew; models of earlier calls stay as they are and can be used.

    Args:
        folder: what training's ``--save`` named.
        megatron_flags: further Megatron flags, such as ``--tokenizer-model`` for one that has moved.
        iteration: which checkpoint; None for the latest.

    Raises:
        UserError: no checkpoint there, one that is damaged or hostile, or flags that do not fit it.
    """
    given = [word.split("=")[0] for word in megatron_flags]
    for flag in given:
        if flag in ("--ckpt-step", "--moa-load-last-complete"):
            raise UserError(f"{flag}: is for training; which checkpoint is taken here, --iteration N says")
    check_pickles(Path(folder), iteration)
    flags = ["--load", folder, "--use-checkpoint-args", "--micro-batch-size", "1", "--no-load-optim", "--no-load-rng"]
    if iteration is not None:
        flags += ["--ckpt-step", str(iteration)]
    if "--tokenizer-model" in given:
        flags.append("--no-use-tokenizer-model-from-checkpoint-args")
    try:
        return _prepared_by([*flags, *megatron_flags])
    except EarlierIsComplete as error:
        raise UserError(f"{error.problem}: add --iteration {error.iteration}") from None


def _prepared_by(flags: Sequence[str]) -> PreparedCheckpoint:
    startup.prepare()
    _forget_earlier_call()
    program, arguments = sys.argv[0], sys.argv[1:]
    sys.argv[1:] = flags  # Megatron reads nothing else
    try:
        args, mixture = parse_arguments(_check_tokenizer)
    finally:
        sys.argv[:] = [program, *arguments]
    initialize_megatron(allow_no_cuda=True)
    if (
        parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_pipeline_model_parallel_world_size()
        != 1
    ):
        raise UserError(f"--load {args.load}: loads into one process; drop the flags that split the model")
    config = model_config_from_args(args, mixture)
    tokenizer = get_tokenizer()
    checkpoint, saved = check_before_setup(args, tokenizer, trains=False)
    return PreparedCheckpoint(args, saved, checkpoint, config, tokenizer)


def _check_tokenizer(args: argparse.Namespace) -> None:
    try:
        check_tokenizer(args)
        build_tokenizer(args)
    except UserError as error:
        of_checkpoint = args.use_tokenizer_model_from_checkpoint_args
        remedy = "; it is the checkpoint's: if it has moved, add --tokenizer-model" if of_checkpoint else ""
        raise UserError(f"{error}{remedy}") from None


def _forget_earlier_call() -> None:
    """Takes back what an earlier :func:`prepare_checkpoint` has set, whether it came to its end or not.

    Groups of processes stay: those of one process are the same for all checkpoints, and earlier models hold them.
    """
    global _prepared
    if _prepared:
        unset_global_variables()
        destroy_rerun_state_machine()
    _prepared = True
