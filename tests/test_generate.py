"""Sampling: temperature, top-k and top-p."""

from __future__ import annotations

import torch

from megatron_moa.inference import choose

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(4000, 1)


def draw(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Share of each token among 4000 draws."""
    drawn = choose(LOGITS, temperature, top_k, top_p, torch.Generator().manual_seed(1))
    return torch.bincount(drawn, minlength=4) / 4000


def test_zero_temperature_is_the_likeliest() -> None:
    assert draw(temperature=0).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_softmax() -> None:
    torch.testing.assert_close(draw(), LOGITS[0].softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(draw(temperature=2), (LOGITS[0] / 2).softmax(-1), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    expected = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(-1)
    torch.testing.assert_close(draw(top_k=2), expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # Probabilities 0.64, 0.24, 0.09, 0.03: 0.64 alone misses 0.7, with 0.24 it is reached.
    assert (draw(top_p=0.7) > 0).tolist() == [False, True, True, False]
    assert (draw(top_p=0.6) > 0).tolist() == [False, True, False, False]
