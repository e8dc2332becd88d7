"""Counts parameters: each weight's size, how it is cut, and what a rank holds of it."""

from __future__ import annotations

import enum
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_moa.planning.model import Model, Split


class Cut(enum.Enum):
    """Over which ranks a weight is cut; the others hold copies."""

    NOT = "not"
    TENSOR = "tensor-parallel"
    EXPERT = "expert-parallel"


class Kind(enum.Enum):
    """The kind of a weight to the optimizer.

    Matrix-wise optimizers leave all but matrices to Adam (docs/mixture.md).
    """

    MATRIX = "matrix"
    OTHER = "other"
    MIXTURE = "mixture"


@dataclass(frozen=True)
class Weight:
    """One weight of the model; an expert's stands for those of all experts.

    ``elements`` then counts those of all experts together.
    """

    name: str
    elements: int
    cut: Cut = Cut.NOT
    kind: Kind = Kind.OTHER

    def on_rank(self, split: Split) -> int:
        """Elements that a rank holds."""
        return self.elements // {Cut.NOT: 1, Cut.TENSOR: split.tp, Cut.EXPERT: split.ep}[self.cut]

    def copies(self, split: Split) -> int:
        """Data-parallel ranks that hold the same elements, and share out the optimizer's state for them."""
        return split.expert_dp if self.cut is Cut.EXPERT else split.dp * split.cp


Weights = Mapping[Weight, int]  # how often each is there


@functools.cache
def layer_weights(model: Model, is_moe: bool) -> tuple[Weight, ...]:
    """Of one transformer layer: two norms, attention, and a feed-forward layer or experts."""
    h, size = model.hidden, model.head_size
    queries, keys = model.heads * size, model.groups * size
    weights = [
        Weight("input norm", model.norm_vectors * h),
        Weight("qkv", (queries + 2 * keys) * h, Cut.TENSOR, Kind.MATRIX),
        Weight("projection", queries * h, Cut.TENSOR, Kind.MATRIX),
        Weight("feed-forward norm", model.norm_vectors * h),
    ]
    if model.qkv_bias:
        weights.append(Weight("qkv bias", queries + 2 * keys, Cut.TENSOR))
    if model.linear_bias:
        weights.append(Weight("projection bias", h))
    if model.qk_norm:
        weights.append(Weight("query and key norm", 2 * model.norm_vectors * size))
    if not is_moe:
        return (*weights, *_feed_forward(model, "feed-forward", model.ffn))
    experts = model.experts
    weights.append(Weight("router", experts.number * h, kind=Kind.MATRIX))
    if model.linear_bias:
        weights.append(Weight("router bias", experts.number))
    weights += _feed_forward(model, "experts", experts.ffn, experts.number)
    if experts.shared_ffn:
        weights += _feed_forward(model, "shared expert", experts.shared_ffn)
    if experts.shared_gate:
        weights.append(Weight("shared expert's gate", h, kind=Kind.MATRIX))
    return tuple(weights)


def _feed_forward(model: Model, name: str, f: int, experts: int = 0) -> Iterable[Weight]:
    """fc1, fc2, biases and the mixture's; ``experts``: so many of them, routed."""
    h, number = model.hidden, experts or 1
    columns, whole = (Cut.EXPERT, Cut.EXPERT) if experts else (Cut.TENSOR, Cut.NOT)
    yield Weight(f"{name} fc1", number * model.halves * f * h, columns, Kind.MATRIX)
    yield Weight(f"{name} fc2", number * f * h, columns, Kind.MATRIX)
    if model.linear_bias:
        yield Weight(f"{name} fc1 bias", number * model.halves * f, columns)
        yield Weight(f"{name} fc2 bias", number * h, whole)
    if mixture := mixture_parameters(model):
        yield Weight(f"{name} mixture", number * mixture, whole, Kind.MIXTURE)


def mixture_parameters(model: Model) -> int:
    """Of one feed-forward layer or expert: n h for gates, n each for their bias and amplitude; n for LA."""
    mixture = model.mixture
    if mixture is None:
        return 0
    n = mixture.num_coefficients
    if mixture.kind == "la":
        return n
    return n * (model.hidden + mixture.gate_bias + (mixture.amplitude == "learned"))


def first_weights(model: Model, tp: int) -> list[Weight]:
    """Of the first stage beside its layers."""
    weights = [Weight("embedding", model.padded_vocabulary(tp) * model.hidden, Cut.TENSOR)]
    if model.positions:
        weights.append(Weight("positions", model.positions * model.hidden))
    return weights


def last_weights(model: Model, tp: int, *, other_stage: bool) -> list[Weight]:
    """Returns the weights of the last stage beside its layers.

    A tied embedding has its copy there, where that is another stage than the first.
    """
    weights = [Weight("final norm", model.norm_vectors * model.hidden)]
    if not model.tied or other_stage:
        weights.append(Weight("output layer", model.padded_vocabulary(tp) * model.hidden, Cut.TENSOR))
    return weights


def stage_weights(model: Model, split: Split, stage: int) -> Weights:
    """What is on the ranks of a pipeline stage."""
    weights: Counter[Weight] = Counter()
    for is_moe, number in Counter(model.moe_layers[layer] for layer in split.layers(model, stage)).items():
        weights.update(dict.fromkeys(layer_weights(model, is_moe), number))
    if stage == 0:
        weights.update(first_weights(model, split.tp))
    if stage == split.pp - 1:
        weights.update(last_weights(model, split.tp, other_stage=split.pp > 1))
    return weights


@dataclass(frozen=True)
class Parameters:
    """Counts of a model.

    Attributes:
        total: all, a tied embedding once.
        active: those that one token meets: of the routed experts only its own; embeddings all.
        mixture: of the total, those of gates, amplitudes and LA coefficients.
        active_mixture: of the active ones.
    """

    total: int
    active: int
    mixture: int
    active_mixture: int


def count(model: Model, tp: int = 1) -> Parameters:
    """The model's parameters, its vocabulary padded for so many tensor-parallel ranks."""
    total = active = mixture = active_mixture = 0
    one = Split(gpus=tp, tp=tp)
    for weight, number in stage_weights(model, one, 0).items():
        elements = number * weight.elements
        chosen = elements
        if weight.cut is Cut.EXPERT:
            chosen = elements // model.experts.number * model.experts.topk
        total += elements
        active += chosen
        if weight.kind is Kind.MIXTURE:
            mixture += elements
            active_mixture += chosen
    return Parameters(total, active, mixture, active_mixture)
