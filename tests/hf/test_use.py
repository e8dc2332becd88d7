"""Tests what transformers' users do with the model.

That is Trainer, LoRA, tensor parallelism, and other libraries' layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
from tests.support import launch
from tests.support.tiny_hf import KINDS, build, in_parallel, tokens_of

# 64 sequences that count upwards: a small model learns that in a few steps.
COUNTING = [{"input_ids": (row := (torch.arange(16) + start) % 101), "labels": row} for start in range(64)]


def train(model: GPTMoAForCausalLM, folder: Path, resume: bool = False, **settings: object) -> tuple[list[float], dict]:
    """Losses of 20 steps, or of the last 10 where it resumes, and the weights after them."""
    arguments = TrainingArguments(
        folder,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=COUNTING)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-10") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_and_resumes(kind: str, tmp_path: Path) -> None:
    losses, weights = train(build(kind, initializer_range=0.05), tmp_path)
    assert losses[-1] < 0.6 * losses[0]
    again, resumed = train(build(kind, initializer_range=0.05), tmp_path, resume=True)
    assert again[-10:] == losses[-10:]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())


def test_trainer_trains_experts_in_bf16_with_their_balance(tmp_path: Path) -> None:
    model = build("la, experts", initializer_range=0.05, output_router_logits=True, router_aux_loss_coef=0.01)
    losses, _ = train(model, tmp_path, bf16=True, gradient_checkpointing=True)
    assert losses[-1] < 0.6 * losses[0]


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_lora_adapts_linear_layers_and_merges(kind: str, names: str | list[str]) -> None:
    model = build(kind, mlp_bias=True)
    tokens = tokens_of(model, 4, 24)
    before = model(tokens).logits.detach()
    # Adapters that start with random numbers on both sides: each has a gradient and an effect at once.
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    taken = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert taken == (
        set(names) if isinstance(names, list) else LINEAR - ({"gate_proj"} if kind == "GPT-2-like" else set())
    )
    result = adapted(input_ids=tokens, labels=tokens)
    result.loss.backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora" in name for name in trained)
    assert not [name for name, gradient in trained.items() if gradient is None or not gradient.any()]
    assert (result.logits - before).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    assert isinstance(merged, GPTMoAForCausalLM)
    torch.testing.assert_close(merged(tokens).logits, result.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_can_train_coefficients_beside_it(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    tokens = tokens_of(model, 4, 24)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["coefficients"])
    adapted = get_peft_model(model, settings)
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters() if "modules_to_save" in name}
    optimizer = torch.optim.AdamW([tensor for tensor in adapted.parameters() if tensor.requires_grad], lr=0.05)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = dict(adapted.named_parameters())
    assert before
    assert not [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    logits = adapted(input_ids=tokens).logits
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind), tmp_path)
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits)


# Every place where what all ranks hold meets what they share out; gradients of such places are sums over the ranks.
SPLIT = {
    "gates": ("moa", {"qk_norm": True}),
    "gates, biases": ("GPT-2-like", {}),
    "constants, experts": ("la, experts", {"qk_norm": True}),
    "gates, experts with biases": (
        "la, experts",
        {"mixing": KINDS["moa"]["mixing"], "mlp_bias": True, "router_score": "sigmoid", "router_bias": True},
    ),
    "gates, experts in every layer": ("la, experts", {"mixing": KINDS["moa"]["mixing"], "moe_layers": [True, True]}),
    "stock activation, experts": ("la, experts", {"mixing": None}),
}


@pytest.mark.slow
@pytest.mark.distributed
def test_tensor_parallelism_of_transformers(tmp_path: Path) -> None:
    models = {name: build(kind, vocab_size=102, **settings) for name, (kind, settings) in SPLIT.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    code, log = launch.launch(in_parallel, (str(tmp_path),), 2, tmp_path)
    assert code == 0, log[-1500:]
    assert "match nothing" not in log  # of a plan with modules that the model has not
    for name, model in models.items():
        tokens = tokens_of(model, 2, 9)
        expected = model(tokens, labels=tokens)
        expected.loss.backward()
        result = torch.load(tmp_path / name / "parallel.pt")
        assert result["rows"] == (12 if name == "gates, experts in every layer" else 24), name  # half of 24 or 48
        torch.testing.assert_close(result["logits"], expected.logits, atol=5e-5, rtol=1e-4)
        assert torch.equal(result["text"], model.generate(tokens[:, :4], max_new_tokens=4, do_sample=False)), name
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        assert set(result["gradients"]) == set(gradients), name
        for key, gradient in gradients.items():
            largest = gradient.abs().max().item()
            torch.testing.assert_close(
                result["gradients"][key],
                gradient,
                rtol=1e-3,
                atol=1e-4 * largest + 1e-7,
                msg=lambda m, k=key: f"{k}: {m}",
            )


class Replaced(nn.Module):
    """Takes a linear layer's place, as a layer of vLLM's or of a quantization does.

    It computes the same, without weight or bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.compute = linear.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(x)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_can_be_replaced(kind: str) -> None:
    """Checks that nothing reaches past a linear layer's module to its weight.

    So layers of other libraries can take its place.
    """
    model = build(kind, mlp_bias=True)
    tokens = tokens_of(model, 2, 9)
    logits = model(tokens).logits
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    assert {name for _, name in places} <= LINEAR | {"lm_head"}
    for parent, name in places:
        setattr(parent, name, Replaced(getattr(parent, name)))
    assert torch.equal(model(tokens).logits, logits)
