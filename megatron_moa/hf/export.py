"""Writes a checkpoint as a Hugging Face folder that stands alone, and compares the two models' logits."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig

from megatron_moa import __version__
from megatron_moa.checkpoints.tensors import ModelTensors
from megatron_moa.command_line.progress_bar import counting_bar
from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.families import OWN, TANH_GELU, Family, family_of, stock_family
from megatron_moa.hf.folder import read_json
from megatron_moa.hf.mapping import is_buffer, to_hf
from megatron_moa.hf.settings import config_from_args, router_aux_loss_coef
from megatron_moa.hf.tokenizer import SAMPLE, export_tokenizer
from megatron_moa.runs.curves import read_course
from megatron_moa.trained.compare_logits import Comparison, VerificationError, compared_tokens, reference_logits
from megatron_moa.trained.from_megatron import PreparedCheckpoint

TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit; fp32 on both sides
TRANSFORMERS = "5.12 to 5.24"  # releases that exports were tried with: setup.py's range
_CODE = Path(__file__).parent


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        architecture: the model's class.
        activation: the fixed one; None for a mixture.
        reason: why it is this project's class and not transformers' own; None if it is not.
        parameters, bytes, shards, dtype: of the weights.
        tokenizer: whether there is one in the folder.
    """

    architecture: str
    activation: str | None
    reason: str | None
    parameters: int
    bytes: int
    shards: int
    dtype: torch.dtype
    tokenizer: bool

    def facts(self) -> dict[str, str]:
        """For reading, by name."""
        return {
            "class": f"{self.architecture} ({self.reason or 'no custom code'})",
            "parameters": f"{self.parameters:,}",
            "weights": f"{str(self.dtype).removeprefix('torch.')}, {self.bytes / 1e6:,.1f} MB in {self.shards} file"
            + ("s" if self.shards > 1 else ""),
            "tokenizer": "exported" if self.tokenizer else "NOT IN THIS FOLDER",
        }


def export(
    prepared: PreparedCheckpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    with_tokenizer: bool,
    architecture: str | None = None,
) -> Exported:
    """Writes an export's files, everything but the model card.

    Never more than one shard and one of Megatron's tensors is in memory.

    Args:
        prepared: the checkpoint.
        folder: exists, empty.
        dtype: of the weights; None for the checkpoint's.
        max_shard_bytes: a larger single tensor is a shard of its own.
        with_tokenizer: whether to export the tokenizer.
        architecture: the class to export as; None for one of transformers' own if there is one, else this project's.

    Raises:
        UserError: a setting, a tensor or a tokenizer that cannot be exported.
    """
    tokenizer, saved = prepared.tokenizer, prepared.saved
    config = config_from_args(prepared.args, prepared.config.mixture, prepared.vocab_size)
    if any(config.moe_layers):
        config.router_aux_loss_coef = router_aux_loss_coef(saved, config)
    generation = getattr(saved, "moa_generation", None) or {}  # of the Hugging Face folder that the model came from
    for name, number in (("bos", "bos"), ("eos", "eod"), ("pad", "pad")):
        token = generation.get(f"{name}_token_id", _token(tokenizer, number, config.vocab_size))
        setattr(config, f"{name}_token_id", token)
    if prepared.saved_ends is not None:  # a list where there are several
        ends = list(prepared.saved_ends)
        config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    family, reason = _family(config, architecture)
    final = family.from_own(config)
    has_tokenizer = with_tokenizer and export_tokenizer(tokenizer, prepared.args, folder, final)
    weights = ShardWriter(folder, max_shard_bytes)
    table = list(family.entries(config))
    tensors = to_hf(ModelTensors(prepared.checkpoint.path, prepared.build_empty()), config, table)
    weights.write(_converted(tensors, dtype), sum(len(entry.hf) for entry in table))
    final.dtype = weights.dtype
    final.architectures = [family.architecture]
    final.save_pretrained(folder)  # with the code of ours
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**tokens).save_pretrained(folder)
    # Beside the class, which does not save everything that it loads with a warning.
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**generation, **read_json(path)}, indent=2) + "\n")
    return Exported(
        family.architecture,
        config.hidden_act if config.mixing is None else None,
        reason,
        weights.parameters,
        weights.bytes,
        weights.shards,
        weights.dtype,
        has_tokenizer,
    )


def _family(config: GPTMoAConfig, architecture: str | None) -> tuple[Family, str | None]:
    """The class to export as, and why it is this project's, if it is."""
    if architecture is None:
        family, reason = stock_family(config)
        return (OWN, reason) if family is None else (family, None)
    family = family_of(architecture, "--architecture")
    if family is OWN:
        return OWN, f"--architecture {architecture}"
    reason = family.why_not(config)
    if reason is not None:
        raise UserError(f"--architecture {architecture}: this model is none: {reason}; leave the flag out")
    return family, None


def _token(tokenizer: Any, name: str, vocab_size: int) -> int | None:
    try:
        number = getattr(tokenizer, name)
    except (AttributeError, NameError, NotImplementedError, TypeError):  # libraries differ in what they lack
        return None
    return number if isinstance(number, int) and 0 <= number < vocab_size else None


def _converted(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        target = tensor.dtype if dtype is None or is_buffer(name) else dtype
        # A copy of its own: safetensors takes no two views of one tensor.
        yield name, tensor.detach().to(target, copy=True, memory_format=torch.contiguous_format)


@dataclass
class ShardWriter:
    """Writes tensors as safetensors files of bounded size, and their index where there are several.

    Attributes:
        folder: where to.
        max_bytes: of a shard.
        parameters, bytes, shards: of what was written.
        dtype: of the first tensor, the embedding.
    """

    folder: Path
    max_bytes: int
    parameters: int = 0
    bytes: int = 0
    shards: int = 0
    dtype: torch.dtype | None = None
    _shard: dict[str, Tensor] = field(default_factory=dict)
    _names: list[list[str]] = field(default_factory=list)

    def write(self, tensors: Iterable[tuple[str, Tensor]], count: int) -> None:
        """All of them, with a line that says how far it is; ``count`` is how many there will be."""
        size = 0
        with counting_bar(count, "exported", " tensors") as progress:
            for name, tensor in tensors:
                self.dtype = self.dtype or tensor.dtype
                if self._shard and size + tensor.nbytes > self.max_bytes:
                    self._flush()
                    size = 0
                self._shard[name] = tensor
                size += tensor.nbytes
                self.bytes += tensor.nbytes
                self.parameters += tensor.numel()
                progress.set_postfix_str(f"{self.bytes / 1e6:,.1f} MB", refresh=False)
                progress.update()
        self._flush()
        _return_memory()
        self.shards = len(self._names)
        if self.shards == 1:
            (self.folder / "0.safetensors").rename(self.folder / "model.safetensors")
            return
        files = {}
        for number, names in enumerate(self._names):
            file = f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / file)
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(files.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        file = self.folder / f"{len(self._names)}.safetensors"  # how many there will be shows at the end
        try:
            save_file(self._shard, file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from error
        file.chmod(0o666 & ~_umask())  # safetensors 0.8 leaves a file to its owner alone
        self._names.append(list(self._shard))
        self._shard = {}


def _umask() -> int:
    """This process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _return_memory() -> None:
    """Gives freed memory back to the system.

    Of thousands of small tensors glibc keeps it: a whole shard, beside the model that is verified next (4.5 GiB of
    moe-2b).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


# Verification.


def verify(prepared: PreparedCheckpoint, folder: Path, rounded_to: torch.dtype | None) -> Comparison:
    """Compares the exported model's logits to those of the checkpoint's model.

    The export runs in a process without megatron_moa. The two models run one after the other.

    Args:
        folder: the export.
        rounded_to: the dtype that was asked for: the checkpoint's weights are rounded to it, too.

    Raises:
        VerificationError: the export cannot be loaded, or differs by more than :data:`TOLERANCE`.
    """
    text = [] if prepared.args.tokenizer_type == "NullTokenizer" else prepared.tokenizer.tokenize(SAMPLE)
    tokens = compared_tokens(prepared.vocab_size, prepared.args.seq_length, text)
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": tokens}, given)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-P", str(_CODE / "standalone.py"), *map(str, (folder, given, result))]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise VerificationError(f"the exported model cannot be loaded without megatron_moa: {last}")
        logits = load_file(result)["logits"]
    comparison = Comparison.of(logits, reference_logits(prepared, tokens, rounded_to))
    if not comparison.within(TOLERANCE):
        raise VerificationError(f"{comparison}; at most {TOLERANCE:.0e} is allowed")
    return comparison


# Model card.

_ACTIVATIONS = {"silu": "SwiGLU", "gelu": "GELU", TANH_GELU: "GELU, tanh approximation"}


def validation_loss(saved: argparse.Namespace, root: Path) -> float | None:
    """Returns the last validation loss up to the checkpoint, in nats a token.

    The loss is read from the TensorBoard files or the log of the checkpoint's run, in the folder of checkpoints or the
    one around it. It is None where neither folder tells it.
    """
    tokens = getattr(saved, "consumed_train_samples", 0) * saved.seq_length
    for folder in (root, root.parent):
        try:
            curve = read_course(folder).validation
        except UserError:
            continue  # no run's log there
        before = curve.values[curve.tokens <= tokens * (1 + 1e-6)]  # TensorBoard keeps tokens as float32
        if len(before):
            return float(before[-1])
    return None


def model_card(prepared: PreparedCheckpoint, name: str, exported: Exported, comparison: Comparison | None) -> str:
    """README.md of the folder.

    Args:
        name: the folder's, as a title.
        exported: what :func:`export` wrote.
        comparison: None if there was none.
    """
    saved, mixture = prepared.saved, prepared.config.mixture
    loss = validation_loss(saved, prepared.checkpoint.root)
    source, tokens = getattr(saved, "moa_source", None), getattr(saved, "consumed_train_samples", 0) * saved.seq_length
    origin, since, imported = "pretrained with", "", ""
    if source is not None:
        origin, since = "of", " since the last conversion"
        imported = f"\nIt was imported from {source['name']} ({source['architecture']}): see there for its licence."
    rows = {
        **exported.facts(),
        "iteration": "released" if prepared.checkpoint.iteration is None else f"{prepared.checkpoint.iteration:,}",
        f"tokens trained on{since}": f"{tokens:,}",
        "validation loss": "not recorded" if loss is None else f"{loss:.4f} nats a token, the last one measured",
        "logits against training's": "NOT VERIFIED" if comparison is None else str(comparison),
    }
    if mixture is None:
        feed_forward = {"mixing": f"none: {_ACTIVATIONS[exported.activation]}"}
    else:
        feed_forward = {"mixing": mixture.kind, "form": mixture.form, **_FORMS[mixture.form]}
        feed_forward |= {"c": _COEFFICIENTS[mixture.kind], "activations s_1 to s_K": " ".join(mixture.activations)}
        if mixture.kind == "moa":
            feed_forward |= {"gate": mixture.gate, "gate bias": mixture.gate_bias, "amplitude": mixture.amplitude}
        feed_forward["--moa-init-scale"] = mixture.init_scale
    data = {
        f"--{flag.replace('_', '-')}": value if not isinstance(value, list) else " ".join(map(str, value))
        for flag in (
            *("data_path", "train_data_path", "valid_data_path", "data_args_path", "mock_data", "split"),
            *("seq_length", "global_batch_size", "train_iters", "train_samples", "optimizer", "lr", "seed"),
        )
        if (value := getattr(saved, flag, None)) not in (None, False, [])
    }
    classes = ["AutoModelForCausalLM", *(["AutoTokenizer"] if exported.tokenizer else [])]
    remote = ", trust_remote_code=True" if exported.reason else ""
    usage = [f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})']
    if exported.tokenizer:
        usage.append(f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{remote}, padding_side="left")')
    tags = "\n".join(f"- {tag}" for tag in ("megatron-moa", *([mixture.kind] if mixture else [])))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {name}

A GPT model {origin} megatron_moa {__version__}{"" if mixture is None else _EXPLANATION}.{imported}

    from transformers import {", ".join(classes)}

    {f"{chr(10)}    ".join(usage)}

Tried with transformers {TRANSFORMERS}. To generate for several prompts at once, pad them on the left: a model that
goes on behind padding writes other text.

{_table("model", rows)}
{_table("feed-forward layers", feed_forward)}
{"" if source is not None and not tokens else _table("trained with", data)}"""


_EXPLANATION = """, whose feed-forward layers mix activation functions
(mixture of activations, arXiv 2605.26647). `reference.py` has the equations; with megatron_moa installed its fused
kernels compute them"""
_COEFFICIENTS = {"la": "constants of the layer or expert, learned", "moa": "gates, computed from every token"}
_ONE = {"y": "the output of `up_proj`"}
_TWO = {"y, z": "the outputs of `gate_proj` and `up_proj`"}
_FORMS = {  # equations 3 to 10 of the paper
    "type1": {"input of `down_proj`": "`sum_k c_k s_k(y)`", **_ONE},
    "one-sided": {"input of `down_proj`": "`silu(y) * sum_k c_k s_k(z)`", **_TWO},
    "bi-sided": {"input of `down_proj`": "`(sum_k c_k s_k(y)) * (sum_k c_{K+k} s_k(z))`", **_TWO},
    "quadratic": {"input of `down_proj`": "`sum_{k <= l} c_kl s_k(y) s_l(z)`", **_TWO},
}


def _table(title: str, rows: dict[str, object]) -> str:
    cells = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |\n" for name, value in rows.items())
    return f"| {title} | |\n| --- | --- |\n{''.join(cells)}"
