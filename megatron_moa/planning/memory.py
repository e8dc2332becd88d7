"""Counts a GPU's memory by part: what stays, what a micro-batch leaves for its backward, and the peak.

Activations are counted as this package's layers save them (mixture/autograd.py; docs/planning.md has the list),
attention as a fused kernel, which keeps no s x s scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_moa.planning.model import Model, Split
from megatron_moa.planning.parameters import Cut, Kind, Weight, Weights, stage_weights

FLOAT32, INT64 = 4, 8
GIBIBYTE = 2**30

# Not counted by formulas, set aside: CUDA's context, cuBLAS's and NCCL's buffers, and what the caching allocator
# cannot use of what it holds. Assumed, not measured.
ALLOWANCE_BYTES = 4 * GIBIBYTE
ALLOWANCE_SHARE = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank of a pipeline stage.

    Attributes:
        weights: as the model computes with them.
        gradients: summed over micro-batches.
        optimizer: its copy of the weights and its moments.
        activations: kept for backward, of all micro-batches in flight.
        logits: what the loss holds at once, on the last stage.
        workspace: what the backward of one layer, or the optimizer's step, holds beyond all that.
        stage: the pipeline stage.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    stage: int

    @property
    def tensors(self) -> float:
        """The peak: all parts, as they are there at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.workspace

    @property
    def allowance(self) -> float:
        """Set aside for what is not counted, on a GPU."""
        return ALLOWANCE_BYTES + ALLOWANCE_SHARE * self.tensors

    @property
    def total(self) -> float:
        """The peak with the allowance."""
        return self.tensors + self.allowance


def peak(model: Model, split: Split) -> Memory:
    """Of the stage that needs most."""
    # Those between have fewer micro-batches in flight than the first, and neither embedding nor logits.
    layouts = {model.moe_layers[layer] for layer in range(model.layers)}
    stages = range(split.pp) if len(layouts) > 1 else {0, split.pp - 1}
    return max((stage_memory(model, split, stage) for stage in stages), key=lambda memory: memory.tensors)


def stage_memory(model: Model, split: Split, stage: int) -> Memory:
    """Of a rank of one stage, at its peak.

    The peak is one of four moments: the loss of the last micro-batch (all activations and the logits), the backward of
    the output layer, or of a layer (all activations and its gradients), the optimizer's step (no activations).
    """
    weights = stage_weights(model, split, stage)
    elements = sum(number * weight.on_rank(split) for weight, number in weights.items())
    state, stepped = _optimizer_state(model, dataclasses.replace(split, micro_batch=1, recompute="none"), stage)
    layers = activations_in_flight(model, split, stage)
    backward = max(_backward_workspace(model, split, is_moe) for is_moe in _kinds(model, split, stage))
    final = logits = output = 0.0
    if stage == split.pp - 1:
        final, logits, output = _head(model, split)
    step = FLOAT32 * (stepped if model.gpu_kernels else 2 * _largest(model, split, weights))
    moments = {
        layers + final + logits: (layers + final, logits, 0.0),
        layers + final + output: (layers + final, 0.0, output),
        layers + backward: (layers, 0.0, backward),
        step: (0.0, 0.0, step),
    }
    kept, loss, workspace = moments[max(moments)]
    return Memory(
        weights=model.element * elements,
        gradients=model.gradient * elements,
        optimizer=state,
        activations=kept,
        logits=loss,
        workspace=workspace,
        stage=stage,
    )


def _kinds(model: Model, split: Split, stage: int) -> set[bool]:
    return {model.moe_layers[layer] for layer in split.layers(model, stage)}


@functools.cache
def _optimizer_state(model: Model, split: Split, stage: int) -> tuple[float, float]:
    """Bytes of the optimizer's state on the rank that has most, and elements of Adam's step there.

    Adam keeps two moments, Muon one of matrices. A half-precision model has a float32 copy of its weights besides.
    """
    copy = FLOAT32 if model.element < FLOAT32 else 0
    weights = stage_weights(model, split, stage)
    state = stepped = 0.0
    for is_expert in (False, True):
        own = [(weight, number) for weight, number in weights.items() if (weight.cut is Cut.EXPERT) is is_expert]
        if not own:
            continue
        ranks = own[0][0].copies(split) if model.shards_optimizer else 1
        tensors = []  # elements, bytes of the optimizer's state, elements of Adam's
        for weight, number in own:
            is_muons = model.optimizer == "muon" and weight.kind is Kind.MATRIX
            size = _tensor(model, split, weight)
            tensor = size, size * (copy + (1 if is_muons else 2) * FLOAT32), 0 if is_muons else size
            tensors += [tensor] * round(number * weight.on_rank(split) / size)
        shares = _dealt(tensors, ranks) if model.shares_whole_weights else [tensors]
        divisor = 1 if model.shares_whole_weights else ranks
        state += max(sum(tensor[1] for tensor in share) for share in shares) / divisor
        stepped += max(sum(tensor[2] for tensor in share) for share in shares) / divisor
    return state, stepped


def _dealt(tensors: list[tuple[float, ...]], ranks: int) -> list[list[tuple[float, ...]]]:
    """Deals tensors to ranks as Megatron's layer-wise optimizer does: by size, forth and back."""
    shares = [[] for _ in range(min(ranks, len(tensors)))]
    for index, tensor in enumerate(sorted(tensors, key=lambda tensor: tensor[0])):
        place = index % (2 * ranks)
        shares[min(place, 2 * ranks - 1 - place)].append(tensor)
    return shares


def _tensor(model: Model, split: Split, weight: Weight) -> float:
    """Elements of one tensor on a rank: a matrix is one expert's, a mixture all experts'."""
    if weight.cut is Cut.EXPERT and weight.kind is not Kind.MIXTURE:
        return weight.on_rank(split) * split.ep / model.experts.number
    return weight.on_rank(split)


def _largest(model: Model, split: Split, weights: Weights) -> float:
    """Elements of the largest single tensor that Adam steps through."""
    is_cut = model.shards_optimizer and not model.shares_whole_weights
    return max(_tensor(model, split, weight) / (weight.copies(split) if is_cut else 1) for weight in weights)


def _head(model: Model, split: Split) -> tuple[float, float, float]:
    """Returns bytes on the last stage: of the final norm, the loss and the output layer.

    These are what is kept of the final norm; then what the loss holds; then the output layer's backward. Logits of the
    model's dtype become float32 probabilities, which become their gradient in place, which becomes the model's dtype
    again.
    """
    tokens = _tokens(model, split)
    u = tokens / split.tp
    final = _norm(model, u) + model.element * u * model.hidden  # its input, and the output layer's
    width = model.padded_vocabulary(split.tp) / split.tp
    half = model.element if model.element < FLOAT32 else 0
    gradient = model.element * width * (tokens + model.hidden)  # of the logits, of the weight
    return final, tokens * width * (FLOAT32 + half), gradient + model.element * tokens * model.hidden


def _tokens(model: Model, split: Split) -> float:
    """t: tokens of a micro-batch where the sequence is whole."""
    return model.sequence * split.micro_batch / split.cp


# Activations.


def in_flight(model: Model, split: Split, stage: int) -> float:
    """Returns how many micro-batches' activations a stage holds at most (Megatron's 1F1B schedules).

    They are counted in units of all the stage's layers.
    """
    micro_batches = split.micro_batches(model)
    if split.vpp == 1:
        return min(micro_batches, split.pp - stage)
    chunks = 2 * (split.pp - stage - 1) + (split.vpp - 1) * split.pp + 1
    return min(micro_batches * split.vpp, chunks) / split.vpp


def activations_in_flight(model: Model, split: Split, stage: int) -> float:
    """Bytes that a stage's layers keep for backward at most."""
    layers = [kept(model, split, model.moe_layers[layer]) for layer in split.layers(model, stage)]
    return in_flight(model, split, stage) * sum(layers)


_OUTSIDE_FEED_FORWARD = ("norms", "norms' outputs", "attention", "dropout")


def saved(model: Model, split: Split, is_moe: bool) -> Mapping[str, float]:
    """Bytes that one layer saves of one micro-batch, by part, nothing recomputed."""
    h, e = model.hidden, model.element
    t = _tokens(model, split)
    u = t / split.tp
    queries, keys = model.heads * model.head_size, model.groups * model.head_size
    parts = {
        "norms": 2 * _norm(model, u),
        "norms' outputs": 2 * u * h * e,
        # Rotated queries and keys, values, output; float32 sums of each head's softmax.
        "attention": t * ((2 * queries + 2 * keys) * e + FLOAT32 * model.heads) / split.tp,
    }
    if model.dropout:
        parts["dropout"] = 2 * u * h  # a byte an element, after attention and after the feed-forward layer
    if not is_moe:
        return {**parts, "feed-forward": _feed_forward(model, t, u, model.ffn / split.tp)}
    experts = model.experts
    routed = u * experts.topk  # token copies on a rank, if all experts get the same number
    parts["router"] = u * (2 * FLOAT32 * experts.number + 2 * INT64 * experts.topk) + routed * (2 * INT64)
    parts["dispatched tokens"] = routed * h * e
    parts["experts"] = _feed_forward(model, routed, routed, experts.ffn, routed=True)
    if experts.shared_ffn:
        parts["shared expert"] = _feed_forward(model, t, u, experts.shared_ffn / split.tp)
        parts["shared expert"] += u * h * e * experts.shared_gate  # its output, times its gate
    return parts


def _norm(model: Model, u: float) -> float:
    if model.norm_vectors == 1 and not model.gpu_kernels:
        return u * (2 * FLOAT32 * model.hidden + FLOAT32)
    return u * (model.element * model.hidden + model.norm_vectors * FLOAT32)


def _feed_forward(model: Model, t: float, u: float, f: float, routed: bool = False) -> float:
    """Returns the bytes that a feed-forward layer saves for its backward.

    These are fc1's output, fc2's input, and 4 n a token for coefficients: once as the gates gave them, once gathered.
    """
    unfused = model.mixture is None and model.gated and not model.gpu_kernels
    widths = model.halves + 1 + (2 + routed) * unfused  # routed: its output before the router's probability, too
    coefficients = FLOAT32 * model.coefficients * (t + (u if u != t else 0))
    return t * f * widths * model.element + coefficients


def kept(model: Model, split: Split, is_moe: bool) -> float:
    """Bytes that one layer keeps of one micro-batch, with what the split recomputes."""
    if split.recompute == "full":
        return model.element * _tokens(model, split) / split.tp * model.hidden
    return sum(saved(model, split, is_moe).values()) - _recomputed(model, split, is_moe)


def _recomputed(model: Model, split: Split, is_moe: bool) -> float:
    """Bytes of one layer and micro-batch that come back in backward, and are there for this layer alone."""
    parts = saved(model, split, is_moe)
    if split.recompute == "full":  # all but the input, which is kept
        return sum(parts.values()) - kept(model, split, is_moe)
    if split.recompute == "feed-forward":
        return sum(size for name, size in parts.items() if name not in _OUTSIDE_FEED_FORWARD)
    if split.recompute == "mixture":
        return model.element * _fc2_inputs(model, split, is_moe)
    return 0.0


def _fc2_inputs(model: Model, split: Split, is_moe: bool) -> float:
    """Elements of the mixtures' outputs of one layer and micro-batch."""
    t = _tokens(model, split)
    if not is_moe:
        return t * model.ffn / split.tp
    experts = model.experts
    return t / split.tp * (experts.topk * experts.ffn + experts.shared_ffn)


def _backward_workspace(model: Model, split: Split, is_moe: bool) -> float:
    """Returns the bytes that a feed-forward layer's backward holds at its peak.

    Counted is what it holds beyond what forward saved, and what is recomputed. Always there is the gradient of the
    layer's output. The peak is at fc2 (gradients of its input and weight), at the mixture (of fc1's output, and of
    fc2's input in place of that), or at fc1 (of its weight and input; all that the activation step saved is gone). A
    weight's gradient is made whole, and then added to the sum.
    """
    h = model.hidden
    t = _tokens(model, split)
    if is_moe:
        tokens, f, matrices = t / split.tp * model.experts.topk, model.experts.ffn, model.experts.number / split.ep
        gathered = 0.0
    else:
        tokens, f, matrices = t, model.ffn / split.tp, 1
        gathered = t * h if split.tp > 1 else 0.0  # fc1's input, again, of the whole sequence
    fc2 = tokens * f + matrices * f * h
    mixture = model.halves * tokens * f
    fc1 = matrices * model.halves * f * h + tokens * h + gathered - tokens * f
    gradients = tokens * h + max(fc2, mixture, fc1)
    return model.element * gradients + _recomputed(model, split, is_moe)
