"""Compares counted operations with torch's own counter, and with sums written by hand.

The counter counts matrix products of built models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_moa.command_line.flags import mixture_from_args
from megatron_moa.errors import UserError
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.training.flops import flops_per_token, install
from megatron_moa.training.model import MixedGPTModelBuilder, model_config_from_args
from megatron_moa.training.parser import add_all_arguments
from tests.support.training import MOE as ROUTED
from tests.support.training import SWIGLU, TINY

pytestmark = pytest.mark.usefixtures("megatron")

# TINY's and SWIGLU's.
SEQUENCE, HIDDEN, WIDTH, LAYERS, VOCABULARY = 32, 32, 48, 2, 64
# Megatron's log of balancing losses is one for the process, and of the first model's depth.
MOE = [*ROUTED, "--moe-router-load-balancing-type", "none"]
TYPE1 = ["--ffn-hidden-size", "48"]
SHARED = ["--moe-shared-expert-intermediate-size", "40"]
MTP = "--mtp-num-layers 2".split()


@dataclass(frozen=True)
class Model:
    """Flags, and what of the model is counted by hand here."""

    flags: list[str]
    routers: int = 0  # MoE layers, each with four experts
    shared_gates: int = 0
    predictions: int = 0  # layers of multi-token prediction


MODELS = {
    "none": Model([*SWIGLU, "--moa-mixing", "none"]),
    "la": Model([*SWIGLU, "--moa-mixing", "la"]),
    "type1": Model(TYPE1),
    "one-sided": Model([*SWIGLU, "--moa-form", "one-sided"]),
    "bi-sided": Model(SWIGLU),
    "quadratic": Model([*SWIGLU, "--moa-form", "quadratic", "--moa-activations", "silu", "tanh", "gelu"]),
    "as many groups as heads": Model([*SWIGLU, "--num-query-groups", "4"]),
    "experts": Model([*SWIGLU, *MOE], routers=2),
    "experts every other layer, shared": Model(
        [*SWIGLU, *MOE, *SHARED, "--moe-shared-expert-gate", "--moe-layer-freq", "[0,1]"], routers=1, shared_gates=1
    ),
    "la experts, shared": Model([*SWIGLU, *MOE, *SHARED, "--moa-mixing", "la"], routers=2),
    "stock experts": Model([*SWIGLU, *MOE, *SHARED, "--moa-mixing", "none"], routers=2),
    "multi-token prediction": Model([*SWIGLU, *MTP], predictions=2),
    "multi-token prediction of experts": Model([*SWIGLU, *MOE, *MTP], routers=4, predictions=2),
}


def parse(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[argparse.Namespace, MixtureConfig | None]:
    """Megatron's args, parsed and validated, without its global state, and the mixture."""
    from megatron.training.arguments import parse_args, validate_args

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moa.py", *TINY, "--train-iters", "1", "--bf16", *flags])
    args = parse_args(add_all_arguments)
    mixture = mixture_from_args(args)
    args.bias_swiglu_fusion = args.bias_gelu_fusion = False
    validate_args(args)
    args.padded_vocab_size = VOCABULARY
    return args, mixture


def matrix_products(args: argparse.Namespace, mixture: MixtureConfig | None) -> int:
    """Counts operations of forward and backward over one sequence, as torch's dispatcher saw them.

    Attention counts as if not causal.
    """
    config = model_config_from_args(args, mixture)
    # Float32, on which attention's plain products are the ones torch counts.
    config.transformer.bf16 = False
    config.transformer.pipeline_dtype = config.transformer.params_dtype = torch.float32
    model = MixedGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    tokens = torch.arange(SEQUENCE).view(1, SEQUENCE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens, None, labels=tokens, loss_mask=torch.ones(1, SEQUENCE)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_matrix_products_are_those_of_the_built_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]
    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {})  # keeps the sizes of an earlier test's model
    args, mixture = parse(monkeypatch, *model.flags)
    counted = flops_per_token(args, mixture)
    masked_half = 6 * SEQUENCE * HIDDEN * (LAYERS + model.predictions)
    routers = 6 * HIDDEN * (4 * model.routers + model.shared_gates)
    norms = 6 * 3 * HIDDEN * model.predictions  # the one thing that Megatron counts and is no matrix product
    products = counted.stock + counted.gates + masked_half + routers - norms
    assert matrix_products(args, mixture) == products * SEQUENCE


@pytest.mark.parametrize(
    ("flags", "gates", "mixture"),
    [
        ([*SWIGLU, "--moa-mixing", "none"], 0, 0),
        ([*SWIGLU, "--moa-mixing", "la"], 0, 2 * 6 * 14 * 48),
        (TYPE1, 2 * 6 * 32 * 5, 2 * 6 * 5 * 48),
        ([*TYPE1, "--moa-activations", "silu", "tanh"], 2 * 6 * 32 * 2, 2 * 6 * 2 * 48),
        ([*SWIGLU, "--moa-form", "one-sided"], 2 * 6 * 32 * 7, 2 * 6 * 7 * 48),
        (SWIGLU, 2 * 6 * 32 * 14, 2 * 6 * 14 * 48),
        ([*SWIGLU, "--moa-form", "quadratic"], 2 * 6 * 32 * 10, 2 * 6 * (10 + 4) * 48),
        # One-sided by default; two of four experts a token, of width 32, each with gates of its own.
        ([*SWIGLU, *MOE], 2 * 2 * 6 * 32 * 7, 2 * 2 * 6 * 7 * 32),
        ([*SWIGLU, *MOE, "--moa-form", "bi-sided"], 2 * 2 * 6 * 32 * 14, 2 * 2 * 6 * 14 * 32),
        ([*SWIGLU, *MOE, *SHARED], 2 * (2 + 1) * 6 * 32 * 7, 2 * 6 * 7 * (2 * 32 + 40)),
        # The first layer dense.
        ([*SWIGLU, *MOE, "--moe-layer-freq", "[0,1]"], (1 + 2) * 6 * 32 * 7, 6 * 7 * (48 + 2 * 32)),
        # Experts' input has the latent size.
        ([*SWIGLU, *MOE, "--moe-latent-size", "24"], 2 * 2 * 6 * 24 * 7, 2 * 2 * 6 * 7 * 32),
        ([*SWIGLU, *MTP], 4 * 6 * 32 * 14, 4 * 6 * 14 * 48),
    ],
)
def test_what_the_mixture_adds(flags: list[str], gates: int, mixture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = flops_per_token(*parse(monkeypatch, *flags))
    assert (counted.gates, counted.mixture) == (gates, mixture)
    assert counted.total == counted.stock + gates + mixture


@pytest.fixture
def stock_count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Megatron's own function, and after the test Megatron's again."""
    from megatron.training import training

    monkeypatch.setattr(training, "num_floating_point_operations", training.num_floating_point_operations)
    return training.num_floating_point_operations


def test_megatron_counts_the_mixture_once_it_is_installed(
    stock_count: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import training

    args, mixture = parse(monkeypatch, *SWIGLU)
    before = flops_per_token(args, mixture)
    install(args, mixture)
    install(args, mixture)
    assert flops_per_token(args, mixture) == before
    assert training.num_floating_point_operations(args, 3) == 3 * SEQUENCE * before.total
    # Packed sequences: the loop says how many tokens are real, by name or by place.
    added = before.gates + before.mixture
    packed = {"seqlen_squared_sum_in_batch": 900, "total_real_tokens_in_batch": 50}
    expected = stock_count(args, 3, 900, 50) + 50 * added
    assert training.num_floating_point_operations(args, 3, **packed) == expected
    assert training.num_floating_point_operations(args, 3, 900, 50) == expected


def test_args_stay_and_the_vocabulary_is_padded_as_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    args, mixture = parse(monkeypatch, *SWIGLU)
    counted = flops_per_token(args, mixture)
    args.padded_vocab_size = None
    before = dict(vars(args))
    assert flops_per_token(args, mixture) == counted
    assert vars(args) == before
    args.vocab_size = None
    with pytest.raises(UserError, match="--vocab-size: not given"):
        flops_per_token(args, mixture)
