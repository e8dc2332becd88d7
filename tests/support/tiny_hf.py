"""Small models of transformers' side with random weights, for tests of what they do there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig
from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM

EQUAL = {"atol": 2e-5, "rtol": 1e-5}  # float32; logits of these models are of size 10
KINDS = {
    "moa": {
        "mixing": {"mixing": "moa", "form": "bi-sided", "activations": ["silu", "relu2", "tanh"], "gate_init_std": 0.3}
    },
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
        "mixing": {
            "mixing": "moa",
            "form": "type1",
            "activations": ["gelu", "relu2"],
            "gate_bias": True,
            "gate_init_std": 0.3,
        },
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
    """A model of :data:`KINDS` with other settings; large weights, so that a wrong factor or order shows."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return GPTMoAForCausalLM(GPTMoAConfig(**{**sizes, "initializer_range": 0.3, **KINDS[kind], **settings})).eval()


def tokens_of(model: GPTMoAForCausalLM, *shape: int) -> torch.Tensor:
    """Random ones, the same every time."""
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))


def in_parallel(folder: str) -> None:
    """Loads the models in a folder by their plans of tensor parallelism, and computes, on every rank.

    Rank 0 writes logits, generated text, gradients and how many rows of a feed-forward layer it has beside each model.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for path in sorted(Path(folder).iterdir()):
        if not (path / "config.json").is_file():
            continue
        model = GPTMoAForCausalLM.from_pretrained(path, tp_plan="auto").eval()
        tokens = tokens_of(model, 2, 9)
        text = model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False)
        result = model(tokens, labels=tokens)
        result.loss.backward()
        gradients = {
            name: getattr(parameter.grad, "full_tensor", lambda parameter=parameter: parameter.grad)()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        mlp = model.model.layers[0].mlp
        rows = (mlp if hasattr(mlp, "up_proj") else mlp.experts["0"]).up_proj.weight.to_local().shape[0]
        if os.environ["RANK"] == "0":
            saved = {"logits": result.logits.detach(), "text": text, "gradients": gradients, "rows": rows}
            torch.save(saved, path / "parallel.pt")
