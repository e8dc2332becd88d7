"""Writes a Megatron checkpoint from a Hugging Face folder, to train on, and compares the two models.

Settings become flags; weights are written one at a time. What lies on disk is compared with transformers' model.
loading.py loads a folder as it is, without Megatron.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from megatron_moa import startup
from megatron_moa.checkpoints.settings import vocabulary_digest
from megatron_moa.checkpoints.writer import write_release
from megatron_moa.cpu.switch import is_enabled
from megatron_moa.data.tokenizers import build_tokenizer
from megatron_moa.errors import UserError, one_line
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.families import TANH_GELU, function_settings
from megatron_moa.hf.folder import HuggingFaceFolder, file_in
from megatron_moa.hf.mapping import from_hf
from megatron_moa.hf.modeling_gpt_moa import mixture_config
from megatron_moa.hf.settings import config_from_args, moe_aux_loss_coeff
from megatron_moa.hf.tokenizer import SAMPLE
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.trained.compare_logits import Comparison, VerificationError, compared_tokens, reference_logits
from megatron_moa.trained.from_megatron import empty_model, prepare_checkpoint
from megatron_moa.trained.upcycling import mixture_flags, stock_as_mixture, target_mixture, upcycled
from megatron_moa.training.arguments import parse_arguments
from megatron_moa.training.model import model_config_from_args

TOKENIZER = "tokenizer"  # its folder in the checkpoint
_LONGEST = 4096  # of the sequences to train on, unless --seq-length says more: memory, not the model, is the limit


@dataclass(frozen=True)
class TakenSplit:
    """Over how many ranks a run that takes its split from the checkpoint goes."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def check(self, own: GPTMoAConfig) -> None:
        """Raises UserError unless the model can be split so."""
        groups = own.num_key_value_heads
        dense = 0 if all(own.moe_layers) else own.intermediate_size  # which no layer has where all are of experts
        for flag, size, count, what in (
            ("--tp", self.tensor, own.num_attention_heads, "heads"),
            ("--tp", self.tensor, dense, "columns of a feed-forward layer (intermediate_size)"),
            ("--tp", self.tensor, own.moe_intermediate_size, "columns of an expert (moe_intermediate_size)"),
            ("--tp", self.tensor, own.shared_expert_intermediate_size, "columns of the shared expert"),
            ("--pp", self.pipeline, own.num_hidden_layers, "layers"),
            ("--ep", self.expert, own.num_experts, "experts"),
        ):
            if count % size:
                legal = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
                raise UserError(f"{flag} {size}: does not divide the model's {count} {what}; take one of {legal}")
        if groups % self.tensor and self.tensor % groups:
            raise UserError(
                f"--tp {self.tensor}: the model's {groups} key-value heads must be a multiple of it, or divide it"
            )
        if self.expert > 1 and not own.num_experts:
            raise UserError(f"--ep {self.expert}: the model has no experts; drop the flag")


# Settings.


def flags_from_config(own: GPTMoAConfig) -> list[str]:
    """Returns the flags that stand for a model, Megatron's and this project's.

    This is the inverse of :func:`megatron_moa.hf.settings.config_from_args`. Numbers are written so that they are read
    back to the last bit.
    """
    flags: list[Any] = []
    flags += ["--num-layers", own.num_hidden_layers, "--hidden-size", own.hidden_size]
    flags += ["--ffn-hidden-size", own.intermediate_size, "--max-position-embeddings", own.max_position_embeddings]
    flags += ["--num-attention-heads", own.num_attention_heads, "--kv-channels", own.head_dim]
    if own.num_key_value_heads != own.num_attention_heads:
        flags += ["--group-query-attention", "--num-query-groups", own.num_key_value_heads]
    flags += ["--normalization", own.normalization, "--norm-epsilon", own.norm_eps]
    flags += ["--init-method-std", own.initializer_range]
    flags += ["--position-embedding-type", own.position_embedding_type]
    if own.position_embedding_type == "rope":
        flags += _rope_flags(own.rope_parameters)
    biases = own.attention_bias, own.attention_output_bias, own.mlp_bias
    if biases != (True, True, True):
        flags += ["--disable-bias-linear", *(["--add-qkv-bias"] if own.attention_bias else [])]
    if own.qk_norm:
        flags.append("--qk-layernorm")
    if own.gated:
        flags.append("--swiglu")
    elif own.hidden_act != TANH_GELU:
        flags.append("--no-bias-gelu-fusion")  # with that it would be the tanh approximation
    if not own.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if own.num_experts:
        flags += _expert_flags(own)
    flags += _mixing_flags(own)
    return list(map(str, flags))


def _rope_flags(rope: dict[str, Any]) -> list[Any]:
    flags: list[Any] = ["--rotary-base", int(rope["rope_theta"])]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        flags += ["--rotary-percent", rope["partial_rotary_factor"]]
    if rope["rope_type"] == "llama3":
        flags += ["--use-rope-scaling", "--rope-scaling-factor", float(rope["factor"])]
    elif rope["rope_type"] == "linear":
        flags += ["--rotary-seq-len-interpolation-factor", int(rope["factor"])]
    return flags


def _expert_flags(own: GPTMoAConfig) -> list[Any]:
    flags: list[Any] = ["--num-experts", own.num_experts, "--moe-router-topk", own.num_experts_per_tok]
    flags += ["--moe-layer-freq", _layer_freq(own.moe_layers)]
    flags += ["--moe-ffn-hidden-size", own.moe_intermediate_size]
    flags += ["--moe-router-score-function", own.router_score, "--moe-token-dispatcher-type", "alltoall"]
    if own.shared_expert_intermediate_size:
        flags += ["--moe-shared-expert-intermediate-size", own.shared_expert_intermediate_size]
    if own.router_scaling_factor != 1.0:
        flags += ["--moe-router-topk-scaling-factor", own.router_scaling_factor]
    if own.router_float32:
        flags += ["--moe-router-dtype", "fp32"]
    for name, flag in (
        ("shared_expert_gate", "--moe-shared-expert-gate"),
        ("router_pre_softmax", "--moe-router-pre-softmax"),
        ("router_bias", "--moe-router-enable-expert-bias"),
    ):
        flags += [flag] if getattr(own, name) else []
    return flags


def _layer_freq(moe_layers: list[bool]) -> str:
    """Returns which layers are MoE layers as a distance if there is one, else as a pattern.

    Of a pattern Megatron's checkpoints have the layers one by one.
    """
    for distance in range(1, len(moe_layers) + 1):
        if moe_layers == [layer % distance == 0 for layer in range(len(moe_layers))]:
            return str(distance)
    return "+".join(f"[{int(is_moe)}]" for is_moe in moe_layers)


def _mixing_flags(own: GPTMoAConfig) -> list[str]:
    mixture = mixture_config(own)
    if mixture is None:
        return ["--moa-mixing", "none"]
    return replace(mixture, init_scale="matched" if own.mixing_scale else mixture.init_scale).to_flags()


def check_dtype(folder: HuggingFaceFolder, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the checkpoint's parameters.

    Args:
        wanted: None for the folder's.

    Raises:
        UserError: the folder has several, and nothing says which.
    """
    if wanted is not None:
        return wanted
    dtypes = sorted(_name(dtype) for dtype in folder.dtypes)
    if len(dtypes) > 1:
        raise UserError(
            f"--hf {folder.root}: its weights are of {' and '.join(dtypes)}; add --dtype {dtypes[0]} or another one"
        )
    return folder.dtypes.pop()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(flags: Sequence[str], world_size: int = 1) -> tuple[argparse.Namespace, MixtureConfig | None]:
    """Args and mixture of a training with these flags on so many ranks; nothing global is left behind.

    Raises:
        UserError: invalid flags.
    """
    startup.prepare()
    before, program, arguments = os.environ["WORLD_SIZE"], sys.argv[0], sys.argv[1:]
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv[1:] = list(flags)  # Megatron reads nothing else
    try:
        return parse_arguments(as_global=False)
    finally:
        os.environ["WORLD_SIZE"] = before
        sys.argv[:] = [program, *arguments]


def check_function(args: argparse.Namespace, mixture: MixtureConfig | None, own: GPTMoAConfig) -> None:
    """Raises UserError if the args, with what the user added, are of another model than the folder's."""
    ours, theirs = function_settings(config_from_args(args, mixture, own.vocab_size)), function_settings(own)
    if own.mixing is not None:
        theirs["mixing"] = mixture_config(own).to_json()  # where they start is no part of it
    for name, value in theirs.items():
        if ours.get(name, value) != value:
            raise UserError(
                f"Megatron's flags make {name} {ours[name]}, and the folder's model has {value}; drop the flag that "
                "changes it"
            )


# Tokenizer.

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
_ENOUGH = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def copy_tokenizer(folder: HuggingFaceFolder, target: Path) -> Any | None:
    """Copies the tokenizer's files and checks that training's ids will be transformers'.

    Returns:
        Megatron's tokenizer of them; None where the folder has no tokenizer.

    Raises:
        UserError: it cannot be loaded (code of its own is never run), has more tokens than the model, or gives other
            ids in Megatron.
    """
    there = [name for name in _TOKENIZER_FILES if (folder.root / name).is_symlink() or (folder.root / name).exists()]
    if not any(name in there for name in _ENOUGH):
        return None
    target.mkdir()
    for name in there:
        shutil.copyfile(file_in(folder.root, name, f"--hf {folder.root}"), target / name)
    remedy = "add --no-tokenizer, and give training one with --tokenizer-model"
    try:
        # Its class may be told by the model's alone.
        theirs = AutoTokenizer.from_pretrained(target, config=folder.config, trust_remote_code=False)
        settings = argparse.Namespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(target))
        theirs.save_pretrained(target)  # with its class, so that it can be loaded without the model's settings
        ours = build_tokenizer(settings)
    except Exception as error:  # whatever a damaged file makes a library raise
        reason = one_line(error)[:200]
        raise UserError(f"--hf {folder.root}: its tokenizer cannot be loaded ({reason}); {remedy}") from None
    if ours.vocab_size > folder.own.vocab_size:
        raise UserError(
            f"--hf {folder.root}: its tokenizer has {ours.vocab_size} tokens, the model's vocab_size is "
            f"{folder.own.vocab_size}; {remedy}"
        )
    if ours.tokenize(SAMPLE) != theirs(SAMPLE).input_ids:
        raise UserError(f"--hf {folder.root}: its tokenizer gives other ids in Megatron than in transformers; {remedy}")
    return ours


# The whole of it.


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        args: what the checkpoint carries.
        mixture: the model's mixture.
        parameters: how many there are, without padding.
        tokens: of the tokenizer; None for none.
    """

    args: argparse.Namespace
    mixture: MixtureConfig | None
    parameters: int
    tokens: int | None


def import_folder(
    folder: HuggingFaceFolder,
    root: Path,
    *,
    final: Path,
    split: TakenSplit,
    dtype: torch.dtype,
    seq_length: int | None = None,
    target: dict[str, Any] | None = None,
    with_tokenizer: bool = True,
    megatron_flags: Sequence[str] = (),
) -> Imported:
    """Writes the checkpoint: settings, tokenizer, weights. One weight is in memory at a time.

    Args:
        root: where to, as ``--save`` names it; exists, empty.
        final: the name it will have, for the tokenizer's path in the args.
        dtype: of the parameters.
        seq_length: None for all positions, :data:`_LONGEST` at most.
        target: ``mixing`` and others, of :func:`megatron_moa.trained.upcycling.target_mixture`: the mixture to become;
            None for the folder's own.
        megatron_flags: further ones, for the args.

    Raises:
        UserError: a split, a mixture, a tokenizer or flags that the model cannot have.
    """
    own = folder.own
    split.check(own)
    folder.check_tied()
    longest = own.max_position_embeddings
    if seq_length is not None and seq_length > longest:
        raise UserError(f"--seq-length {seq_length}: the model has {longest} positions; give at most that")
    flags = [*flags_from_config(own), "--seq-length", str(seq_length or min(longest, _LONGEST))]
    flags += ["--micro-batch-size", "1", "--hidden-dropout", "0", "--attention-dropout", "0"]
    flags += ["--make-vocab-size-divisible-by", "1"]  # no more padding than the split needs: the loss counts it
    if any(own.moe_layers):
        flags += ["--moe-aux-loss-coeff", str(moe_aux_loss_coeff(own))]
    flags += {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(dtype, [])
    tokenizer = copy_tokenizer(folder, root / TOKENIZER) if with_tokenizer else None
    kind = ["HuggingFaceTokenizer", "--tokenizer-model", str(final / TOKENIZER)] if tokenizer else ["NullTokenizer"]
    flags += ["--vocab-size", str(own.vocab_size), "--tokenizer-type", *kind, *megatron_flags]
    sizes = ["--tensor-model-parallel-size", str(split.tensor), "--pipeline-model-parallel-size", str(split.pipeline)]
    sizes += ["--expert-model-parallel-size", str(split.expert)]
    args, mixture = parse([*flags, *sizes], split.tensor * split.pipeline * split.expert)
    check_function(args, mixture, own)
    if args.params_dtype != dtype:
        raise UserError(f"--{'bf16' if args.bf16 else 'fp16'}: not what is to be written; drop it, and say --dtype")
    multiple = args.make_vocab_size_divisible_by * split.tensor
    args.padded_vocab_size = multiple * math.ceil(own.vocab_size / multiple)  # as building the tokenizer sets it
    args.moa_end_tokens = folder.end_tokens or None  # a tokenizer has one, and chat models often end by several
    args.moa_generation = folder.generation
    args.moa_source = {"name": folder.name, "architecture": folder.family.architecture}
    args.moa_vocabulary = tokenizer and vocabulary_digest(tokenizer)

    # Layers of plain PyTorch on one process: theirs are the names that megatron_moa/hf/mapping.py has.
    whole, _ = parse([*flags, "--transformer-impl", "local"])
    whole.padded_vocab_size = args.padded_vocab_size
    _one_process()
    read = from_hf(folder.read, folder.entries, args.padded_vocab_size)
    if target is None:
        model = empty_model(model_config_from_args(whole, mixture))
    else:
        source = stock_as_mixture(args) if mixture is None else mixture
        result = target_mixture(source, stock=mixture is None, routed_experts=bool(args.num_experts), **target)
        for some in (args, whole):
            vars(some).update(mixture_flags(result))
        model = empty_model(model_config_from_args(whole, result))
        read = upcycled(read, model, source, result, stock=mixture is None)
        mixture = result
    write_release(model, args, root, read)
    parameters = sum(math.prod(folder.weights[name].shape) for entry in folder.entries for name in entry.hf)
    return Imported(args, mixture, parameters, tokenizer and tokenizer.vocab_size)


def _one_process() -> None:
    """Megatron's groups on this process alone, which :func:`prepare_checkpoint` goes on with."""
    if torch.distributed.is_initialized():
        return
    backend = "gloo" if is_enabled() else "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


# Verification.


def verify(
    folder: HuggingFaceFolder, root: Path, imported: Imported, dtype: torch.dtype, tolerance: float
) -> Comparison:
    """Compares the checkpoint, as Megatron loads it, with transformers' own model, in float32.

    The two models run one after the other.

    Args:
        root: of the checkpoint.
        dtype: of its parameters, to which the folder's weights are rounded, too.
        tolerance: the largest difference of logits, relative to the largest logit.

    Raises:
        VerificationError: they differ by more than that, or transformers cannot load the folder.
    """
    text = [] if imported.tokens is None else AutoTokenizer.from_pretrained(root / TOKENIZER)(SAMPLE).input_ids
    tokens = compared_tokens(folder.own.vocab_size, imported.args.seq_length, text)
    expected = _source_logits(folder, tokens, dtype)
    flags = ["--transformer-impl", "local"]
    if imported.tokens is not None:
        flags += ["--tokenizer-model", str(root / TOKENIZER)]
    prepared = prepare_checkpoint(str(root), flags)
    comparison = Comparison.of(reference_logits(prepared, tokens), expected)
    if not comparison.within(tolerance):
        raise VerificationError(f"{comparison}; --tolerance {tolerance:g} allows less")
    return comparison


def _source_logits(folder: HuggingFaceFolder, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Of transformers' own model, in a process of its own, whose memory goes with it."""
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": tokens}, given)
        rounded = _name(dtype) if folder.dtypes != {dtype} else "float32"
        command = [sys.executable, "-m", "megatron_moa.hf.source_logits", *map(str, (folder.root, given, result))]
        command += [folder.family.architecture, rounded, *(["pickled"] if folder.pickled else [])]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise VerificationError(f"transformers cannot load the folder: {last}")
        return load_file(result)["logits"]
