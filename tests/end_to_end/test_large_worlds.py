"""Builds the largest recipes as single ranks of worlds of 64, 512 and 4096 ranks.

Compared are shapes, counts, and the bytes of the mixture's messages.

The MoE model is moe-1b, whose 12 layers 4 pipeline stages divide, with widths rounded up for tensor parallelism.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.worlds import ROOT, Job, ParameterInfo, RankReport, visit

pytestmark = pytest.mark.slow

COEFFICIENTS = {"dense-2b": 14, "moe-1b": 7}  # seven activations, bi-sided and (with routed experts) one-sided
FFN_MULTIPLE = 128
VOCABULARY = 32_000


@functools.cache
def recipe(name: str, ffn_multiple: int = FFN_MULTIPLE) -> tuple[str, ...]:
    """A recipe's array of flags, as bash reads it."""
    script = f'set -eu; source examples/models/{name}.sh; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    environment = {**os.environ, "FFN_MULTIPLE": str(ffn_multiple)}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


def sizes(flags: tuple[str, ...]) -> dict[str, int]:
    """The numbers among the flags, by name."""
    return {flag: int(value) for flag, value in itertools.pairwise(flags) if flag.startswith("--") and value.isdigit()}


@dataclass(frozen=True)
class Split:
    """How a model lies over a world's ranks."""

    recipe: str
    world: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1
    sp: bool = False
    mixing: str = "moa"

    def __str__(self) -> str:
        words = [self.recipe, self.mixing, str(self.world), f"tp{self.tp}", f"pp{self.pp}"]
        words += [f"{name}{size}" for name, size in (("ep", self.ep), ("etp", self.etp), ("vpp", self.vpp)) if size > 1]
        return " ".join(words + ["sp"] * self.sp)

    @property
    def flags(self) -> tuple[str, ...]:
        """Of pretrain_gpt_moa.py."""
        flags = [*recipe(self.recipe), "--moa-mixing", self.mixing, "--use-distributed-optimizer"]
        flags += ["--tensor-model-parallel-size", self.tp, "--pipeline-model-parallel-size", self.pp]
        if "moe" in self.recipe:
            flags += ["--expert-model-parallel-size", self.ep, "--expert-tensor-parallel-size", self.etp]
        if self.vpp > 1:
            flags += ["--num-virtual-stages-per-pipeline-rank", self.vpp]
        if self.sp:
            flags.append("--sequence-parallel")
        return tuple(map(str, flags))

    @property
    def one_rank_a_stage(self) -> tuple[int, ...]:
        """Picks one rank of each pipeline stage, the first and the last rank of the world among them.

        Stages are blocks of ranks, and the rank is at another place in each. One stage alone gives its first and last
        rank.
        """
        block = self.world // self.pp
        if self.pp == 1:
            return (0, self.world - 1)
        return tuple(stage * block + stage * (block - 1) // (self.pp - 1) for stage in range(self.pp))

    def layers(self, rank: int) -> list[int]:
        """Numbers of the layers on a rank: its stage's, and with virtual stages every pp-th run of them."""
        number = sizes(recipe(self.recipe))["--num-layers"]
        run = number // (self.pp * self.vpp)
        stage = rank // (self.world // self.pp)
        return [(chunk * self.pp + stage) * run + layer for chunk in range(self.vpp) for layer in range(run)]

    def expected(self, report: RankReport) -> dict[str, tuple[int, ...]]:
        """Every parameter's shape on this rank, by name."""
        size = sizes(recipe(self.recipe))
        h, f = size["--hidden-size"], size["--ffn-hidden-size"]
        stage = report.rank // (self.world // self.pp)
        vocabulary = report.padded_vocab_size // self.tp
        shapes: dict[str, tuple[int, ...]] = {}
        if stage == 0:
            shapes["embedding.word_embeddings.weight"] = (vocabulary, h)
        if stage == self.pp - 1:
            shapes["decoder.final_layernorm.weight"] = (h,)
            shapes["output_layer.weight"] = (vocabulary, h)
        for layer in self.layers(report.rank):
            block = f"decoder.layers.{layer}."
            shapes[block + "input_layernorm.weight"] = shapes[block + "pre_mlp_layernorm.weight"] = (h,)
            shapes[block + "self_attention.linear_qkv.weight"] = (3 * h // self.tp, h)
            shapes[block + "self_attention.linear_proj.weight"] = (h, h // self.tp)
            if "--num-experts" not in size:
                shapes |= self._feed_forward(block + "mlp.", h, f // self.tp)
                continue
            shapes[block + "mlp.router.weight"] = (size["--num-experts"], h)
            for expert in range(size["--num-experts"] // self.ep):
                name = f"{block}mlp.experts.local_experts.{expert}."
                shapes |= self._feed_forward(name, h, size["--moe-ffn-hidden-size"] // self.etp)
            shared = size["--moe-shared-expert-intermediate-size"]
            shapes |= self._feed_forward(block + "mlp.shared_experts.", h, shared // self.tp)
        return shapes

    def _feed_forward(self, name: str, h: int, f: int) -> dict[str, tuple[int, ...]]:
        own = {"linear_fc1.weight": (2 * f, h), "linear_fc2.weight": (h, f)}
        if self.mixing == "moa":
            own["coefficients.weight"] = (COEFFICIENTS[self.recipe], h)
        elif self.mixing == "la":
            own["coefficients.value"] = (COEFFICIENTS[self.recipe],)
        return {name + key: shape for key, shape in own.items()}

    def total(self, padded_vocabulary: int) -> int:
        """Parameters of the whole model: embeddings, norms, attention 4 h², feed-forward 3 h f, mixture."""
        size = sizes(recipe(self.recipe))
        h, layers = size["--hidden-size"], size["--num-layers"]
        experts = size.get("--num-experts", 0)
        if experts:
            width = experts * size["--moe-ffn-hidden-size"] + size["--moe-shared-expert-intermediate-size"]
            mixtures, others = experts + 1, experts * h  # the router
        else:
            width, mixtures, others = size["--ffn-hidden-size"], 1, 0
        n = COEFFICIENTS[self.recipe]
        mixture = {"none": 0, "la": n, "moa": n * h}[self.mixing]
        block = 2 * h + 4 * h * h + 3 * h * width + others + mixtures * mixture
        return 2 * padded_vocabulary * h + h + layers * block


SPLITS = (
    Split("dense-2b", 64, tp=4, pp=4, sp=True),
    Split("dense-2b", 512, tp=8, pp=4, vpp=7, sp=True),
    Split("dense-2b", 4096, tp=8, pp=2, mixing="la"),
    Split("moe-1b", 64, tp=2, pp=4, ep=8, sp=True),
    Split("moe-1b", 512, pp=2, ep=32, mixing="la"),
    Split("moe-1b", 4096, tp=4, pp=4, ep=8, etp=2, vpp=3, sp=True),
)
FURTHER_SPLITS = (
    Split("dense-2b", 64, tp=8, mixing="la"),
    Split("dense-2b", 512, pp=4, mixing="none"),
    Split("dense-2b", 512, tp=2, pp=4, mixing="la", sp=True),
    Split("dense-2b", 4096, tp=8, pp=4, sp=True),
    Split("moe-1b", 64, ep=32, mixing="la"),
    Split("moe-1b", 512, tp=4, pp=4, ep=16, sp=True),
    Split("moe-1b", 512, tp=8, pp=2, ep=4, etp=8, sp=True, mixing="none"),
    Split("moe-1b", 4096, tp=2, pp=4, ep=32, sp=True),
)


def assert_shapes(split: Split, reports: list[RankReport]) -> None:
    for report in reports:
        assert {name: info.shape for name, info in report.parameters.items()} == split.expected(report), report.rank


def elements(info: ParameterInfo) -> int:
    return math.prod(info.shape)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Split, list[RankReport]]:
    jobs = [Job(split.flags, split.world, split.one_rank_a_stage) for split in SPLITS]
    return dict(zip(SPLITS, visit(jobs, tmp_path_factory.mktemp("worlds") / "built.json"), strict=True))


@pytest.fixture(scope="module")
def further_built(tmp_path_factory: pytest.TempPathFactory) -> dict[Split, list[RankReport]]:
    jobs = [Job(split.flags, split.world, split.one_rank_a_stage) for split in FURTHER_SPLITS]
    return dict(zip(FURTHER_SPLITS, visit(jobs, tmp_path_factory.mktemp("worlds") / "built.json"), strict=True))


def assert_built(split: Split, reports: list[RankReport]) -> None:
    """Shapes on one rank of each stage; and what these ranks' like hold together is the model."""
    assert_shapes(split, reports)
    seen = {report.rank // (split.world // split.pp): report for report in reports}
    assert len(seen) == split.pp
    found = sum(elements(info) * info.pieces for report in seen.values() for info in report.parameters.values())
    assert found == split.total(reports[0].padded_vocab_size)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_shape_and_the_count_of_parameters(built: dict[Split, list[RankReport]], split: Split) -> None:
    assert_built(split, built[split])


@pytest.mark.full
@pytest.mark.parametrize("split", FURTHER_SPLITS, ids=str)
def test_further_splits(further_built: dict[Split, list[RankReport]], split: Split) -> None:
    assert_built(split, further_built[split])


@pytest.mark.full
@pytest.mark.parametrize("split", [split for split in SPLITS if split.world == 64], ids=str)
def test_all_ranks_of_a_world_hold_the_model(split: Split, tmp_path: Path) -> None:
    (reports,) = visit([Job(split.flags, split.world, tuple(range(split.world)))], tmp_path / "built.json")
    assert_shapes(split, reports)
    held = sum(elements(info) / info.replicas for report in reports for info in report.parameters.values())
    assert held == split.total(reports[0].padded_vocab_size)


@pytest.mark.parametrize(
    ("name", "stock", "feed_forwards", "h"),
    [("dense-2b", 2_085_210_112, 28, 2048), ("moe-1b", 1_058_931_712, 12 * 33, 1024)],
)
def test_parameters_of_the_recipes(name: str, stock: int, feed_forwards: int, h: int) -> None:
    """At their exact widths, with the vocabulary of the paper's sizes."""
    size = sizes(recipe(name, ffn_multiple=1))
    width = size["--ffn-hidden-size"]
    experts = 0
    if name == "moe-1b":
        width += 32 * size["--moe-ffn-hidden-size"]
        experts = 32
    layers = size["--num-layers"]
    assert 2 * 50_304 * h + h + layers * (2 * h + 4 * h * h + experts * h + 3 * h * width) == stock
    none, moa = (Split(name, 1, mixing=mixing).total(VOCABULARY) for mixing in ("none", "moa"))
    assert moa - none == feed_forwards * COEFFICIENTS[name] * h


# Messages. One micro-batch of s tokens through layers as wide as the recipe's, on four tensor-parallel ranks of 64.

TOKENS = 16
FLOAT32 = 4

Traffic = dict[tuple[str, str, str], tuple[int, int]]  # phase, operation, group -> collectives more, bytes more


@dataclass(frozen=True)
class Exchange:
    """A model, and what its mixture sends beyond what the stock model sends."""

    recipe: str
    layers: int
    mixing: str
    flags: str
    added: Traffic

    def __str__(self) -> str:
        return f"{self.recipe} {self.mixing} {self.flags}"

    def job(self, mixing: str) -> Job:
        """The model with this mixing, to be counted."""
        flags = [*recipe(self.recipe), "--num-layers", self.layers, "--seq-length", TOKENS, "--vocab-size", 1024]
        flags += ["--tensor-model-parallel-size", 4, *self.flags.split(), "--moa-mixing", mixing]
        flags += [] if mixing == "none" else ["--moa-backend", "eager"]
        return Job(tuple(map(str, flags)), world_size=64, ranks=(5,), messages=True)


def _exchanges() -> list[Exchange]:
    layers = 2
    n, h = COEFFICIENTS["dense-2b"], 2048
    per_token, gates, free = (FLOAT32 * count for count in (TOKENS * n, n * h, n))
    m, expert_h = COEFFICIENTS["moe-1b"], 1024
    expert_per_token, expert_gates, expert_free = (FLOAT32 * count for count in (TOKENS * m, m * expert_h, m))
    local = 32 // 8  # experts on a rank

    def all_layers(traffic: Traffic) -> Traffic:
        return {key: (layers * number, layers * size) for key, (number, size) in traffic.items()}

    def free_sum(size: int) -> Traffic:
        return {("backward", "allreduce", "tp"): (1, size)}

    def sequence_parallel(size: int) -> Traffic:
        return {
            ("forward", "allgather_base", "tp"): (1, size),
            ("backward", "reduce_scatter_base", "tp"): (1, size),
        }

    dense_sum, dense_sp = {("backward", "allreduce", "tp"): (1, per_token)}, sequence_parallel(per_token)

    def gradients(group: str, size: int) -> Traffic:
        return {("finalize", "allreduce_coalesced", group): (0, size)}

    def sp_gradients(size: int) -> Traffic:
        return {("finalize", "allreduce", "tp"): (0, size)}

    sp, expert = (
        "--sequence-parallel",
        "--sequence-parallel --expert-model-parallel-size 8 --expert-tensor-parallel-size",
    )
    shared_moa = sequence_parallel(expert_per_token) | gradients("dp", expert_gates) | sp_gradients(expert_gates)
    return [
        Exchange("dense-2b", layers, "moa", "", all_layers(dense_sum | gradients("dp", gates))),
        Exchange("dense-2b", layers, "moa", sp, all_layers(dense_sp | gradients("dp", gates) | sp_gradients(gates))),
        Exchange("dense-2b", layers, "la", "", all_layers(free_sum(free) | gradients("dp", free))),
        Exchange("dense-2b", layers, "la", sp, all_layers(free_sum(free) | gradients("dp", free))),
        Exchange("moe-1b", 1, "moa", f"{expert} 1", shared_moa | gradients("edp", local * expert_gates)),
        Exchange(
            "moe-1b",
            1,
            "moa",
            f"{expert} 2",
            shared_moa
            | gradients("edp", local * expert_gates)
            | {("backward", "allreduce", "etp"): (local, local * expert_gates)},
        ),
        Exchange(
            "moe-1b",
            1,
            "moa",
            f"{expert} 1 --moe-shared-expert-overlap",
            {("backward", "allreduce", "tp"): (1, expert_gates)}
            | gradients("dp", expert_gates)
            | gradients("edp", local * expert_gates),
        ),
        Exchange(
            "moe-1b",
            1,
            "la",
            f"{expert} 2",
            free_sum(expert_free)
            | gradients("dp", expert_free)
            | gradients("edp", local * expert_free)
            | {("backward", "allreduce", "etp"): (local, local * expert_free)},
        ),
    ]


EXCHANGES = [
    pytest.param(exchange, marks=() if index in (1, 4, 7) else pytest.mark.full, id=str(exchange))
    for index, exchange in enumerate(_exchanges())
]


@pytest.fixture(scope="module")
def traffic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traffic]:
    """What each model sent beyond the stock one, kinds without a difference left out."""
    specs = [item.callspec.params for item in request.session.items if item.module is request.module]
    exchanges = [params["exchange"] for params in specs if "exchange" in params]
    jobs = (exchange.job(mixing) for exchange in exchanges for mixing in ("none", exchange.mixing))
    once = list(dict.fromkeys(jobs))
    reports = visit(once, tmp_path_factory.mktemp("worlds") / "messages.json")
    sent: dict[Job, Traffic] = {
        job: {(m.phase, m.operation, m.group): (m.number, m.bytes) for m in report.messages}
        for job, (report,) in zip(once, reports, strict=True)
    }
    more: dict[str, Traffic] = {}
    for exchange in exchanges:
        stock, mixed = sent[exchange.job("none")], sent[exchange.job(exchange.mixing)]
        difference = {
            key: tuple(m - s for m, s in zip(mixed.get(key, (0, 0)), stock.get(key, (0, 0)), strict=True))
            for key in stock | mixed
        }
        more[str(exchange)] = {key: change for key, change in difference.items() if change != (0, 0)}
    return more


@pytest.mark.full
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bytes_of_each_collective_the_mixture_adds(traffic: dict[str, Traffic], exchange: Exchange) -> None:
    assert traffic[str(exchange)] == exchange.added
