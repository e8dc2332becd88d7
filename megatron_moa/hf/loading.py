"""Loads the model of a Hugging Face folder in transformers, to generate and evaluate with it.

This project's exports load with this package's classes, other models with transformers' own; code that lies in the
folder is never run. importing.py writes a Megatron checkpoint from a folder instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.folder import file_in, indexed_files, read_json
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM, GPTMoAModel, mixture_config
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.trained.text_model import TextModel, tokens_before_text


@dataclass(frozen=True)
class FolderModel(TextModel):
    """A model of transformers in evaluation mode, with its tokenizer.

    Attributes:
        model: on a GPU if there is one.
        tokenizer: None if the folder has none.
        mixture: its mixture, None for a fixed activation.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    mixture: MixtureConfig | None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's settings."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings

    @property
    def end(self) -> int | None:
        eos = self.config.eos_token_id
        if eos in (None, []) and self.tokenizer is not None:
            eos = self.tokenizer.eos_token_id
        return next(iter(eos), None) if isinstance(eos, list) else eos

    @property
    def ends(self) -> tuple[int, ...]:
        """Those of generation_config.json, by which transformers and vLLM generate."""
        ends = self.model.generation_config.eos_token_id
        return super().ends if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer is not None

    def _some_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UserError(f"{self.config.name_or_path}: has no tokenizer; put its files there, or give tokens")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        # Not verbose: it would warn of texts longer than the context, which are taken in windows.
        return self._some_tokenizer().encode(text, add_special_tokens=False, verbose=False)

    @property
    def before_text(self) -> list[int]:
        return [] if self.tokenizer is None else tokens_before_text(self.tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._some_tokenizer().decode(tokens, skip_special_tokens=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def _continued(self, rows: list[list[int]], steps: int, choose_next: Callable[[Tensor], Tensor]) -> list[list[int]]:
        """transformers' generate, with its cache; padded on the left, which the mask hides."""
        longest = max(map(len, rows))
        padding = 0 if self.end is None else self.end
        tokens = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(longest, device=self.device) >= longest - lengths[:, None]
        settings = GenerationConfig(
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(self.ends) or None,
            pad_token_id=padding,
        )
        # What else a folder has for generate, such as a penalty of repetitions, would change what is chosen;
        # transformers fills in from the model's what a given configuration leaves open.
        folders, self.model.generation_config = self.model.generation_config, settings
        try:
            chosen = LogitsProcessorList([_Chosen(choose_next)])
            result = self.model.generate(tokens, attention_mask=mask.long(), logits_processor=chosen)
        finally:
            self.model.generation_config = folders
        return result[:, longest:].tolist()


class _Chosen(LogitsProcessor):
    """Leaves one token to take, so that transformers' greedy search takes what ours chooses."""

    def __init__(self, choose_next: Callable[[Tensor], Tensor]) -> None:
        self.choose_next = choose_next

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, self.choose_next(scores)[:, None], 0.0)


def register() -> None:
    """Tells transformers' Auto classes of GPTMoA.

    Exports then load with this package's code, not that in their folder. Another call changes nothing.
    """
    AutoConfig.register("gpt_moa", GPTMoAConfig, exist_ok=True)
    AutoModel.register(GPTMoAConfig, GPTMoAModel, exist_ok=True)
    AutoModelForCausalLM.register(GPTMoAConfig, GPTMoAForCausalLM, exist_ok=True)


def load_folder(folder: Path, dtype: str = "float32") -> FolderModel:
    """Loads an export of this project, or a causal language model that transformers knows.

    Nothing is downloaded.

    Args:
        folder: with config.json and safetensors files.
        dtype: to compute in, whatever the weights are stored in: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UserError: no such folder, a model that needs other code, or files that are damaged or do not fit.
    """
    register()
    _check_config(folder)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **local
        )
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        has_tokenizer = any((folder / name).is_file() for name in names)
        tokenizer = AutoTokenizer.from_pretrained(folder, **local) if has_tokenizer else None
    except UserError as error:
        raise UserError(f"--load {folder}: {error}") from None
    except Exception as error:  # damaged files raise whatever they like
        raise UserError(f"--load {folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes.get(what):
            named, kind = ", ".join(sorted(map(str, notes[what]))[:3]), what.removesuffix("_keys")
            raise UserError(f"--load {folder}: weights do not fit config.json, {kind}: {named}; export it again")
    if not getattr(model.config, "max_position_embeddings", None):
        raise UserError(f"{folder / 'config.json'}: has no max_position_embeddings, which says how long a text may be")
    mixture = mixture_config(model.config) if isinstance(model.config, GPTMoAConfig) else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FolderModel(model.eval().requires_grad_(False).to(device), tokenizer, mixture)


def _check_config(folder: Path) -> None:
    """Raises UserError for a model that no code here is for, and for files that lie elsewhere."""
    path = file_in(folder, "config.json", f"--load {folder}")
    kind = read_json(path).get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path}, model_type {kind}: is neither this project's nor one that transformers knows without code from "
            "the folder, which is not run"
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        indexed_files(folder, index)
