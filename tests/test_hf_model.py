"""megatron_moa/hf: the transformers model computes what Megatron's does, and does what transformers' models do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_moa.errors import UserError
from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.mapping import entries, from_hf, to_hf
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
from tests import hf_models, launch
from tests.training import MOE, ROOT, SWIGLU, TINY

EAGER = ["--moa-backend", "eager"]
MOA, STOCK = ["--moa-mixing", "moa", *EAGER], ["--moa-mixing", "none"]
SHARED = "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate".split()
SIGMOID = (
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 "
    "--moe-router-dtype fp32"
).split()
# Replace flags of the tiny model: the last one counts.
GPT2 = "--position-embedding-type learned_absolute --normalization LayerNorm --ffn-hidden-size 48".split()
WITH_BIASES, TIED = "--disable-bias-linear", "--untie-embeddings-and-output-weights"

CASES: dict[str, list[str]] = {
    "stock": [*SWIGLU, *STOCK],
    "la bi-sided": [
        *SWIGLU,
        "--moa-mixing",
        "la",
        *EAGER,
        "--moa-la-init",
        *"1 .5 .2 .1 .7 .3 .6 1 0 .1 .2 .3 .4 .5".split(),
    ],
    "moa bi-sided": [*SWIGLU, *MOA],
    "moa one-sided, softmax, bias": [*SWIGLU, *MOA, *"--moa-form one-sided --moa-gate softmax --moa-gate-bias".split()],
    "moa quadratic, tanh, amplitude": [
        *SWIGLU,
        *MOA,
        *"--moa-form quadratic --moa-gate tanh --moa-amplitude learned".split(),
    ],
    "moa with SwiGLU's scale": [*SWIGLU, *MOA, "--moa-init-scale", "swiglu"],
    "la type1, GPT-2-like, biases, tied": [*GPT2, "--moa-mixing", "la", *EAGER],
    "stock, GPT-2-like, biases, tied": [*GPT2, *STOCK],
    "q/k norm, bias of q, k, v, partial rotation": [
        *SWIGLU,
        *MOA,
        *"--qk-layernorm --add-qkv-bias --rotary-percent 0.5".split(),
    ],
    "LLaMA 3's rope": [*SWIGLU, *MOA, *"--use-rope-scaling --rope-scaling-factor 4 --rotary-base 500000".split()],
    "MoE, moa, shared expert with gate": [*SWIGLU, *MOE, *SHARED, *MOA, "--moe-router-pre-softmax"],
    "MoE, la, every second layer": [*SWIGLU, *MOE, "--moa-mixing", "la", *EAGER, "--moe-layer-freq", "2"],
    "MoE, moa, sigmoid router with bias": [*SWIGLU, *MOE, *SIGMOID, *MOA],
    "MoE, stock": [*SWIGLU, *MOE, *SHARED, *STOCK],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transformers_model_computes_megatrons_logits(case: str, tmp_path: Path) -> None:
    flags = [flag for flag in TINY if not ("biases, tied" in case and flag in (WITH_BIASES, TIED))]
    # Large initial weights, so that a wrong factor or order shows in the logits.
    flags += [*CASES[case], "--init-method-std", "0.3", "--train-iters", "2", "--save-interval", "2"]
    flags += ["--save", str(tmp_path / "checkpoint")]
    code, log = launch.launch(launch.script, (str(ROOT / "pretrain_gpt_moa.py"), flags), 1, tmp_path)
    assert code == 0, log[-1500:]
    results = tmp_path / "results.json"
    code, log = launch.launch(hf_models.compare, (str(tmp_path / "checkpoint"), str(results)), 1, tmp_path)
    assert code == 0, log[-1500:]
    report = json.loads(results.read_text())
    assert report["spread"] > 0.5
    assert report["difference"] < 1e-5
    assert report["round_trip"]


# What transformers' models do.

KINDS = {
    "moa": {"mixing": {"mixing": "moa", "form": "bi-sided", "activations": ["silu", "relu2", "tanh"]}},
    "la, experts": {
        "mixing": {"mixing": "la", "form": "quadratic", "activations": ["silu", "relu"]},
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "shared_expert_gate": True,
        "moe_layers": [False, True],
    },
    "GPT-2-like": {
        "mixing": {"mixing": "moa", "form": "type1", "activations": ["gelu", "relu2"], "gate_bias": True},
        "gated": False,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "tie_word_embeddings": True,
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
    },
}


def build(kind: str, **settings: object) -> GPTMoAForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return GPTMoAForCausalLM(GPTMoAConfig(**sizes, initializer_range=0.3, **{**KINDS[kind], **settings})).eval()


def tokens_of(model: GPTMoAForCausalLM, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_cache_padding_and_attention_change_nothing(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    logits = model(tokens).logits
    assert logits.std() > 0.1
    half = model(tokens[:, :5], use_cache=True)
    rest = model(tokens[:, 5:], past_key_values=half.past_key_values).logits
    torch.testing.assert_close(torch.cat((half.logits, rest), dim=1), logits, atol=1e-5, rtol=1e-5)
    # Three tokens of padding before the second sequence.
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), tokens), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(shifted, logits, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])


@pytest.mark.parametrize("kind", KINDS)
def test_generates_saves_and_comes_back(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(tokens, **settings)
    assert generated.shape == (2, 13)
    assert torch.equal(generated, model.generate(tokens, use_cache=False, **settings))
    model.save_pretrained(tmp_path)
    loaded = GPTMoAForCausalLM.from_pretrained(tmp_path)
    weights = loaded.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.mixing == model.config.mixing
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert len(hidden) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_trains_with_labels_and_gradient_checkpointing(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    plain = model(tokens, labels=tokens)
    logits = plain.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(plain.loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    plain.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    unused = {name for name, _ in model.named_parameters()} - set(gradients)
    assert not {name for name in unused if ".experts." not in name}  # an expert may have got no token
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)


def test_backends_agree() -> None:
    """Where megatron_moa is installed its kernels compute the mixture; the reference is what an export has without."""
    eager, compiled = build("moa"), build("moa", mixing_backend="compile")
    tokens = tokens_of(eager, 2, 9)
    torch.testing.assert_close(compiled(tokens).logits, eager(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_table_that_does_not_fit_is_an_error_by_name() -> None:
    model = build("moa")
    weights = model.state_dict()
    table = list(entries(model.config))
    megatron = from_hf(weights.__getitem__, table, 128)
    state = {entry.megatron: megatron(entry.megatron) for entry in table}
    assert state["output_layer.weight"].shape == (128, 32)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in to_hf(state, model.config))
    for broken, name, message in (
        ({**state, "decoder.layers.0.mlp.odd": torch.ones(1)}, "decoder.layers.0.mlp.odd", "has not"),
        (
            {key: value for key, value in state.items() if "layers.1.mlp.coefficients" not in key},
            "layers.1.mlp.coeff",
            "not in",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            list(to_hf(broken, model.config))
        assert name in str(caught.value)
    assert not state["output_layer.weight"][model.config.vocab_size :].any()


@pytest.mark.parametrize("setting", [{"normalization": "BatchNorm"}, {"router_score": "best"}, {"moe_layers": [True]}])
def test_a_configuration_that_cannot_be_is_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTMoAConfig(num_hidden_layers=2, **setting)
