"""hf: the model compiled, exported as a graph, and with flex attention computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import launch
from tests.support.tiny_hf import EQUAL, KINDS, build, tokens_of


def with_flex_attention() -> None:
    """A target of launch: compared to the default."""
    model = build("moa")
    tokens = tokens_of(model, 2, 9)
    with torch.no_grad():  # it has no backward on a CPU
        logits = model(tokens).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(tokens).logits, logits, **EQUAL)


@pytest.mark.full
def test_flex_attention_computes_the_same(tmp_path: Path) -> None:
    # In a process of its own: what others have compiled before decides whether torch can compile this one.
    code, log = launch.launch(with_flex_attention, (), 1, tmp_path)
    assert code == 0, log[-2000:]


# Every kind of router and expert, and models with and without dense layers.
ROUTERS = {
    "sigmoid, bias, biases": {"router_score": "sigmoid", "router_bias": True, "mlp_bias": True},
    "softmax before, all layers": {
        "router_pre_softmax": True,
        "moe_layers": [True, True],
        "mixing": KINDS["moa"]["mixing"],
    },
}


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_experts_as_one_graph_compute_the_same(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("la, experts", **settings)
    for name, buffer in model.named_buffers():
        if name.endswith("router_bias"):
            buffer.copy_(torch.tensor([3.0, 0, -3, 1]))
    tokens = tokens_of(model, 2, 9)
    results = []
    for is_compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_compiling: value)
        result = model(tokens, labels=tokens)
        parameters = dict(model.named_parameters())
        # An expert without tokens has no part in the loss, or one of 0.
        gradients = torch.autograd.grad(result.loss, parameters.values(), allow_unused=True, materialize_grads=True)
        results.append((result.logits, dict(zip(parameters, gradients, strict=True))))
    torch.testing.assert_close(results[1][0], results[0][0], **EQUAL)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_an_expert_that_overflows_for_others_tokens_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("la, experts")
    layer = model.model.layers[1].mlp
    x = torch.randn(1, 1, 32)
    chosen = layer.router(x[0], None)[2][0].tolist()
    expected = layer(x)
    spare = next(number for number in range(4) if number not in chosen)
    torch.nn.init.constant_(layer.experts[str(spare)].down_proj.weight, torch.inf)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(layer(x), expected, **EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moa", "la, experts", pytest.param("GPT-2-like", marks=pytest.mark.full)])
def test_compiles_as_one_graph(kind: str) -> None:
    model = build(kind)
    tokens = tokens_of(model, 2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if kind == "GPT-2-like" else "aot_eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens).logits, **EQUAL)


@pytest.mark.parametrize("kind", ["moa", "la, experts", pytest.param("GPT-2-like", marks=pytest.mark.full)])
def test_exports_as_a_graph_for_any_length(kind: str) -> None:
    model = build(kind, **({"router_score": "sigmoid", "router_bias": True} if kind == "la, experts" else {}))
    shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    arguments = {"input_ids": tokens_of(model, 2, 9), "use_cache": False}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False).module()
    for count in (9, 23):
        tokens = tokens_of(model, 2, count)
        torch.testing.assert_close(program(input_ids=tokens, use_cache=False).logits, model(tokens).logits, **EQUAL)
