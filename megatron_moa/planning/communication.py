"""Counts what a GPU sends in a step, over which wires, and how long a step takes.

Volumes follow Megatron-core 0.19.2's tensor, sequence, pipeline, data and expert parallelism. The mixture's messages
are those of docs/design/parallelism.md. Times are volumes over the bandwidths of megatron_moa.training.gpus, which no
network reaches, and a latency for each message: estimates to rank splits by, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_moa.planning.memory import FLOAT32
from megatron_moa.planning.model import Model, Split
from megatron_moa.planning.parameters import Cut, Kind, layer_weights, stage_weights
from megatron_moa.training.flops import Flops
from megatron_moa.training.gpus import Gpu

GPUS_PER_NODE = 8
LATENCY = 15e-6  # seconds a message takes however small it is: assumed


@dataclass(frozen=True)
class Traffic:
    """One kind of message of a step, on the GPU that sends most.

    Attributes:
        kind: TP, PP, DP, EP or CP, and what is sent.
        messages: collectives (or sends) a step.
        bytes: that a GPU sends in all of them.
        seconds: in all.
        exposed: of these, seconds in which it computes nothing.
    """

    kind: str
    messages: float
    bytes: float
    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step.

    Attributes:
        compute: of a GPU, if all had the same work and none waited; with what is recomputed.
        bubble: waiting for other pipeline stages, the longest stage's surplus included.
        traffic: messages, their exposed seconds the rest of the step.
    """

    compute: float
    bubble: float
    traffic: tuple[Traffic, ...]

    @property
    def exposed(self) -> float:
        """Seconds of communication in which the GPU computes nothing."""
        return sum(kind.exposed for kind in self.traffic)

    @property
    def seconds(self) -> float:
        """All."""
        return self.compute + self.bubble + self.exposed


def step_time(model: Model, split: Split, flops: Flops, gpu: Gpu, mfu: float) -> StepTime:
    """Time of a step.

    Args:
        flops: of one token.
        mfu: share of the GPU's peak that it reaches while it computes.
    """
    peak = gpu.peak_flops["bf16" if model.element == 2 else "fp32"]
    token = flops.total + recomputed_flops(model, split, flops)
    compute = token * model.tokens_per_step / (split.gpus * peak * mfu)
    m = split.micro_batches(model)
    # The last stage has the logits besides its layers.
    logits = 6 * model.padded_vocabulary(split.tp) * model.hidden / token
    longest = (1 - logits) / split.pp + logits if split.pp > 1 else 1.0
    in_turn = compute * split.pp * longest * (m + (split.pp - 1) / split.vpp) / m
    return StepTime(compute, in_turn - compute, tuple(_traffic(model, split, gpu, compute / m)))


def recomputed_flops(model: Model, split: Split, flops: Flops) -> float:
    """Operations of one token that are done a second time in backward."""
    if split.recompute == "full":
        return flops.total / 3 - 2 * model.padded_vocabulary(split.tp) * model.hidden  # the logits are not
    if split.recompute == "mixture":
        return flops.mixture / 3
    if split.recompute == "feed-forward":
        return flops.mixture / 3 + 2 * _active_feed_forward(model)
    return 0.0


def _active_feed_forward(model: Model) -> float:
    """Parameters of fc1, fc2, gates and routers that a token meets in all layers."""
    total = 0.0
    for is_moe in model.moe_layers:
        for weight in layer_weights(model, is_moe):
            if weight.cut is Cut.EXPERT:
                total += weight.elements / model.experts.number * model.experts.topk
            elif weight.kind is not Kind.OTHER and weight.name not in ("qkv", "projection"):
                total += weight.elements
    return total


def gpus_of_a_node(gpus: int, tp: int) -> int:
    """Returns how many GPUs a node has: as many as make all nodes alike.

    A node has whole groups of tensor-parallel ranks, where such a group fits into one.
    """
    alike = [size for size in range(1, GPUS_PER_NODE + 1) if gpus % size == 0]
    return max([size for size in alike if size % tp == 0] or alike)


def _bandwidth(split: Split, gpu: Gpu, stride: int, size: int) -> float:
    """Bytes/s of a group of ranks so far apart: NVLink's if it lies in a node, else the network's."""
    in_a_node = stride * size <= gpus_of_a_node(split.gpus, split.tp)
    return gpu.nvlink_bandwidth if in_a_node else gpu.network_bandwidth


def _traffic(model: Model, split: Split, gpu: Gpu, micro_batch_seconds: float) -> Iterator[Traffic]:
    """Yields what a GPU sends in a step, one kind of message at a time.

    Ranks lie as Megatron places them: tensor-parallel ones side by side, then context-, data-parallel, stages.
    """
    tp, pp, vpp, ep, cp = split.tp, split.pp, split.vpp, split.ep, split.cp
    m = split.micro_batches(model)
    h, e = model.hidden, model.element
    t = model.sequence * split.micro_batch / cp
    layers = model.layers / pp * m  # that a GPU passes in a step

    def traffic(kind: str, messages: float, size: float, bandwidth: float, hidden: float = 0.0) -> Traffic:
        seconds = size / bandwidth + messages * LATENCY
        return Traffic(kind, messages, size, seconds, max(0.0, seconds - hidden))

    if tp > 1:
        # Gathers and scatters of [t, h] a layer around attention and dense feed-forward layer or shared expert, forward
        # 2 a block, backward 2 and one more gather for the weight's gradient; of [t, n] for coefficients.
        cut = [not is_moe or model.experts.shared_ffn > 0 for is_moe in model.moe_layers]
        feed_forward = sum(cut) / pp * m
        again = {"full": layers + feed_forward, "feed-forward": feed_forward}.get(split.recompute, 0)
        # Embedding and logits: a scatter and a gather, and two gathers and a scatter, on the outer stages.
        number = 5 * (layers + feed_forward) + 2 * again + 5 * m
        gates = (2 + (again > 0)) * feed_forward * (model.coefficients > 0)
        size = t * (number * h * e + gates * model.coefficients * FLOAT32) * (tp - 1) / tp
        yield traffic("TP", number + gates, size, _bandwidth(split, gpu, 1, tp))
    if pp > 1:
        # To and from the next stage in each direction; a send hides behind the computation of another micro-batch,
        # but while the pipeline fills and empties.
        number = 2 * m * vpp
        stride = split.gpus // pp
        wire = _bandwidth(split, gpu, stride, pp)
        yield traffic("PP", number, number * t / tp * h * e, wire, micro_batch_seconds * max(0, m - pp))
    if cp > 1:
        # Keys and values to the next rank, cp - 1 times, and their gradients: a ring.
        keys = 2 * t * model.groups * model.head_size * e / tp
        yield traffic("CP", 3 * (cp - 1) * layers, 3 * (cp - 1) * layers * keys, _bandwidth(split, gpu, tp, cp))
    if ep > 1:
        # Every token's copies to its experts and back, forward and backward, but for those that stay.
        moe = sum(model.moe_layers) / pp * m
        number = 4 + 2 * (split.recompute in ("full", "feed-forward"))
        size = t / tp * model.experts.topk * h * e * (ep - 1) / ep
        yield traffic("EP", number * moe, number * moe * size, _bandwidth(split, gpu, 1, ep))
    yield from _data_parallel(model, split, gpu, micro_batch_seconds, traffic)


def _data_parallel(
    model: Model, split: Split, gpu: Gpu, micro_batch_seconds: float, traffic: Callable[..., Traffic]
) -> Iterator[Traffic]:
    """Yields the messages of data parallelism, each sent once a step.

    Where the training overlaps them, gradients are summed behind the last micro-batch's backward (two thirds of its
    time), weights are gathered behind the first one's forward.
    """
    groups = {
        "DP": (split.dp * split.cp, split.tp, lambda weight: weight.cut is not Cut.EXPERT),
        "DP of experts": (split.expert_dp, split.ep, lambda weight: weight.cut is Cut.EXPERT),
    }
    stages = [stage_weights(model, split, stage) for stage in {0, split.pp - 1}]
    hidden = {
        "gradients": micro_batch_seconds * 2 / 3 * model.overlaps_gradients,
        "weights": micro_batch_seconds / 3 * model.overlaps_weights,
    }
    # A rank that needs all sums gets them by an all-reduce: each sum is sent on to all.
    scattered = model.shards_optimizer and not model.shares_whole_weights
    sums = [("gradients", model.gradient if scattered else 2 * model.gradient)]
    if model.shards_optimizer:
        sums.append(("weights", model.element))
    for kind, (size, stride, belongs) in groups.items():
        elements = max(
            sum(number * weight.on_rank(split) for weight, number in weights.items() if belongs(weight))
            for weights in stages
        )
        if size == 1 or not elements:
            continue
        wire = _bandwidth(split, gpu, stride, size)
        share = (size - 1) / size
        for name, width in sums:
            sent = traffic(f"{kind}, {name}", 1, elements * width * share, wire, hidden[name])
            hidden[name] = max(0.0, hidden[name] - sent.seconds)
            yield sent
