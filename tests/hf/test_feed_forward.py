"""hf: experts, their balance, and the mixture's equations written out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from tests.support.tiny_hf import build, tokens_of


def test_balance_of_experts() -> None:
    """Compares the balancing loss with k times the mean over layers of Megatron's.

    Megatron's is experts * sum of (share of choices / k) * (mean probability).
    """
    model = build("la, experts", router_aux_loss_coef=0.5)
    tokens = tokens_of(model, 2, 9)
    plain = model(tokens, labels=tokens)
    assert plain.router_logits is None
    result = model(tokens, labels=tokens, output_router_logits=True)
    (logits,) = result.router_logits
    assert logits.shape == (18, 4)
    probabilities = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum(1).float()
    expected = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(result.aux_loss, expected)
    torch.testing.assert_close(result.loss, plain.loss + 0.5 * expected)
    # Padding does not count.
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    masked = model(tokens, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(masked, model(tokens[:, :6], output_router_logits=True).aux_loss)
    assert model(tokens, output_router_logits=True).loss is None
    # Sigmoid scores: their shares, as Megatron takes them.
    model = build("la, experts", router_score="sigmoid")
    tokens = tokens_of(model, 2, 9)
    scores = []
    router = model.model.layers[1].mlp.router
    router.register_forward_hook(lambda module, inputs, output: scores.append((inputs[0] @ module.weight.T).sigmoid()))
    result = model(tokens, output_router_logits=True)
    shares = scores[0] / scores[0].sum(-1, keepdim=True)
    torch.testing.assert_close(result.router_logits[0].softmax(-1), shares)


def test_a_biased_experts_output_is_scaled_with_its_bias() -> None:
    model = build("la, experts", mlp_bias=True)
    layer = model.model.layers[1].mlp
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 6, 32)
    _, probabilities, chosen = layer.router(x[0], None)
    expected = layer.shared_expert(x[0]) * (x[0] @ layer.shared_expert_gate.weight.T).sigmoid()
    for token in range(6):
        for probability, number in zip(probabilities[token], chosen[token], strict=True):
            expected[token] += probability * layer.experts[str(number.item())](x[0, token])
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-3, rtol=1e-4)


def test_experts_that_a_library_replaces_are_noticed() -> None:
    """Checks that experts which a library replaces are noticed.

    vLLM puts SwiGLU experts in the place of an nn.ModuleList ``experts``, or of one whose parameters are all 3-D.
    """
    model = build("la, experts")
    tokens = tokens_of(model, 1, 5)
    layer = model.model.layers[1].mlp
    assert not isinstance(layer.experts, torch.nn.ModuleList)
    assert {parameter.dim() for parameter in layer.experts.parameters()} == {1, 2}
    logits = model(tokens).logits
    layer.experts["2"] = torch.nn.Sequential(layer.experts["2"])  # in a wrapper it is still ours
    with pytest.raises(TypeError, match="takes 2 positional arguments"):  # and is called
        model(tokens.expand(8, 5))
    layer.experts["2"] = layer.experts["2"][0]
    assert torch.equal(model(tokens).logits, logits)
    layer.experts["2"] = torch.nn.Identity()
    with pytest.raises(TypeError, match="experts: Identity has taken their place"):
        model(tokens)
    layer.experts = torch.nn.Linear(32, 32)
    with pytest.raises(TypeError, match="experts: Linear has taken their place"):
        model(tokens)


@pytest.mark.parametrize("kind", ["la", "moa"])
@pytest.mark.parametrize("form", ["type1", "one-sided", "bi-sided", "quadratic"])
def test_feed_forward_layers_compute_the_papers_equations(form: str, kind: str) -> None:
    """Compares feed-forward layers with equations 3 to 10, written out in numpy.

    W1 is gate_proj (up_proj without a second branch), W2 is up_proj.
    """
    names = ["gelu", "silu", "tanh", "identity"]
    start = {"gate_init_std": 0.3} if kind == "moa" else {}
    model = build("moa", mixing={"mixing": kind, "form": form, "activations": names, **start}, gated=form != "type1")
    layer = model.model.layers[0].mlp.double()
    coefficients = layer.coefficients
    if kind == "la":
        torch.nn.init.normal_(coefficients.value)
    x = torch.randn(5, 32, dtype=torch.float64)

    def weight(module: torch.nn.Module) -> np.ndarray:
        return module.weight.detach().numpy()

    activations = [
        lambda v: v * scipy.stats.norm.cdf(v),
        lambda v: v / (1 + np.exp(-v)),
        np.tanh,
        lambda v: v,
    ]
    n = {"type1": 4, "one-sided": 4, "bi-sided": 8, "quadratic": 10}[form]
    if kind == "la":
        c = np.broadcast_to(coefficients.value.detach().float().numpy(), (5, n))  # as the model reads them
    else:
        assert coefficients.weight.shape == (n, 32)
        c = 1 / (1 + np.exp(-x.numpy() @ weight(coefficients).T))
    y = x.numpy() @ weight(layer.up_proj if form == "type1" else layer.gate_proj).T
    z = x.numpy() @ weight(layer.up_proj).T
    of_y, of_z = ([activation(branch) for activation in activations] for branch in (y, z))
    if form == "type1":
        mixed = sum(c[:, [k]] * of_y[k] for k in range(4))
    elif form == "one-sided":
        mixed = of_y[1] * sum(c[:, [k]] * of_z[k] for k in range(4))
    elif form == "bi-sided":
        mixed = sum(c[:, [k]] * of_y[k] for k in range(4)) * sum(c[:, [4 + k]] * of_z[k] for k in range(4))
    else:
        pairs = [(first, second) for first in range(4) for second in range(first, 4)]
        mixed = sum(c[:, [i]] * of_y[first] * of_z[second] for i, (first, second) in enumerate(pairs))
    expected = mixed @ weight(layer.down_proj).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
