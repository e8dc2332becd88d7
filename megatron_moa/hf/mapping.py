"""Maps names and layouts of parameters between Megatron and transformers: one table, read both ways.

Megatron's are those of a whole model with its local layers: ``linear_qkv`` holds for each group of queries their rows,
then those of the group's key and value; ``linear_fc1`` of a gated layer the activated branch, then the linear one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig

_OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # training pads their rows


def _same(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _first(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


@dataclass(frozen=True)
class Entry:
    """A parameter of Megatron's and what it is in transformers: itself, or several.

    Attributes:
        megatron: its name.
        hf: names it has there.
        split: Megatron's tensor -> theirs.
        join: theirs -> Megatron's.
    """

    megatron: str
    hf: tuple[str, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]] = _same
    join: Callable[[tuple[Tensor, ...]], Tensor] = _first


def entries(config: GPTMoAConfig) -> Iterator[Entry]:
    """All parameters of a model, in the order of its layers."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    if config.position_embedding_type == "learned_absolute":
        yield Entry("embedding.position_embeddings.weight", ("model.embed_positions.weight",))
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, f"decoder.layers.{layer}.", f"model.layers.{layer}.", config.moe_layers[layer])
    yield from _norm(config, "decoder.final_layernorm", "model.norm")
    if not config.tie_word_embeddings:
        yield Entry("output_layer.weight", ("lm_head.weight",))


def _layer(config: GPTMoAConfig, megatron: str, hf: str, is_moe: bool) -> Iterator[Entry]:
    yield from _norm(config, f"{megatron}input_layernorm", f"{hf}input_layernorm")
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        names = tuple(f"{hf}self_attn.{part}_proj.{kind}" for part in "qkv")
        yield Entry(f"{megatron}self_attention.linear_qkv.{kind}", names, _split_qkv(config), _join_qkv(config))
    yield from _linear(f"{megatron}self_attention.linear_proj", f"{hf}self_attn.o_proj", config.attention_output_bias)
    if config.qk_norm:
        yield from _norm(config, f"{megatron}self_attention.q_layernorm", f"{hf}self_attn.q_norm")
        yield from _norm(config, f"{megatron}self_attention.k_layernorm", f"{hf}self_attn.k_norm")
    yield from _norm(config, f"{megatron}pre_mlp_layernorm", f"{hf}post_attention_layernorm")
    if not is_moe:
        yield from _feed_forward(config, f"{megatron}mlp.", f"{hf}mlp.")
        return
    yield Entry(f"{megatron}mlp.router.weight", (f"{hf}mlp.router.weight",))
    if config.router_bias:
        yield Entry(f"{megatron}mlp.router.expert_bias", (f"{hf}mlp.router_bias",))
    for expert in range(config.num_experts):
        yield from _feed_forward(config, f"{megatron}mlp.experts.local_experts.{expert}.", f"{hf}mlp.experts.{expert}.")
    if config.shared_expert_intermediate_size:
        yield from _feed_forward(config, f"{megatron}mlp.shared_experts.", f"{hf}mlp.shared_expert.")
        if config.shared_expert_gate:
            yield Entry(f"{megatron}mlp.shared_experts.gate_weight", (f"{hf}mlp.shared_expert_gate.weight",))


def _feed_forward(config: GPTMoAConfig, megatron: str, hf: str) -> Iterator[Entry]:
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        fc1 = f"{megatron}linear_fc1.{kind}"
        if config.gated:
            yield Entry(fc1, (f"{hf}gate_proj.{kind}", f"{hf}up_proj.{kind}"), _halves, torch.cat)
        else:
            yield Entry(fc1, (f"{hf}up_proj.{kind}",))
        yield Entry(f"{megatron}linear_fc2.{kind}", (f"{hf}down_proj.{kind}",))
    for name in _coefficients(config):
        yield Entry(f"{megatron}coefficients.{name}", (f"{hf}coefficients.{name}",))


def _coefficients(config: GPTMoAConfig) -> list[str]:
    """What a layer's coefficients hold (megatron_moa.layers.coefficients)."""
    mixing = config.mixing
    if mixing is None:
        return []
    if mixing.get("mixing", "moa") == "la":
        return ["value"]
    optional = {
        "bias": mixing.get("gate_bias", False),
        "amplitude": mixing.get("amplitude") == "learned",
        "scale": config.mixing_scale,
    }
    return ["weight", *(name for name, is_there in optional.items() if is_there)]


def _norm(config: GPTMoAConfig, megatron: str, hf: str) -> Iterator[Entry]:
    return _linear(megatron, hf, bias=config.normalization == "LayerNorm")


def _linear(megatron: str, hf: str, bias: bool) -> Iterator[Entry]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Entry(f"{megatron}.{kind}", (f"{hf}.{kind}",))


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2)


def _split_qkv(config: GPTMoAConfig) -> Callable[[Tensor], tuple[Tensor, ...]]:
    groups, size = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        by_group = tensor.unflatten(0, (groups, queries + 2, size))  # [groups, queries + key + value, head size, ...]
        return tuple(part.flatten(0, 2) for part in by_group.split([queries, 1, 1], dim=1))

    return split


def _join_qkv(config: GPTMoAConfig) -> Callable[[tuple[Tensor, ...]], Tensor]:
    groups, size = config.num_key_value_heads, config.head_dim

    def join(tensors: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1, size)) for part in tensors], dim=1).flatten(0, 2)

    return join


def to_hf(
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: GPTMoAConfig,
    table: Iterable[Entry] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter of the transformers model, from those of the whole Megatron model.

    It takes Megatron's parameters one at a time.

    Args:
        state: Megatron's, vocabulary padded or not; ``_extra_state`` is passed over.
        table: of the model's parameters, :func:`entries` or another family's (megatron_moa.hf.families).

    Raises:
        UserError: a parameter that is missing, of another shape, or that the table does not have.
    """
    pending = {entry.megatron: entry for entry in (entries(config) if table is None else table)}
    surplus = []
    for name, tensor in state.items() if isinstance(state, Mapping) else state:
        if name.endswith("_extra_state"):
            continue
        entry = pending.pop(name, None)
        if entry is None:
            surplus.append(name)
            continue
        if name in _OF_VOCABULARY:
            if tensor.shape[0] < config.vocab_size:
                raise UserError(f"{name}: {tensor.shape[0]} rows, for a vocabulary of {config.vocab_size} tokens")
            tensor = tensor[: config.vocab_size]
        yield from zip(entry.hf, entry.split(tensor), strict=True)
    if pending:
        raise UserError(f"{next(iter(pending))}: not in the checkpoint; its settings promise it")
    if surplus:
        raise UserError(
            f"{', '.join(sorted(surplus)[:5])}: {len(surplus)} parameters that a {config.model_type} model has not"
        )


def from_hf(read: Callable[[str], Tensor], table: Iterable[Entry], padded_vocab_size: int) -> Callable[[str], Tensor]:
    """The inverse of :func:`to_hf`: what gives Megatron's parameter of a name, made when it is asked for.

    Args:
        read: gives the weight of a name among ``table``'s.
        table: of the model's parameters, :func:`entries` or another family's (megatron_moa.hf.families).
        padded_vocab_size: rows of embedding and output layer. Those beyond the vocabulary repeat its last one:
            Megatron's loss counts them, and the logits 0 of rows of 0 would weigh most in a model whose logits are
            all negative.
    """
    by_name = {entry.megatron: entry for entry in table}

    def megatron(name: str) -> Tensor:
        entry = by_name[name]
        tensor = entry.join(tuple(read(part) for part in entry.hf))
        if name in _OF_VOCABULARY and tensor.shape[0] < padded_vocab_size:
            padding = tensor[-1:].expand(padded_vocab_size - tensor.shape[0], *tensor.shape[1:])
            tensor = torch.cat((tensor, padding))
        return tensor

    return megatron


def is_buffer(name: str) -> bool:
    """Returns whether a tensor of transformers' model is no parameter.

    Such a tensor keeps its precision: an expert bias is a sum of small steps.
    """
    return name.endswith(("router_bias", "coefficients.scale"))
