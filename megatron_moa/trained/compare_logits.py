"""Compares the logits of two models on the same tokens: every conversion ends with it."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moa.trained.from_megatron import PreparedCheckpoint

_LONGEST = 256  # of a row that is compared: logits of a large vocabulary take memory


class VerificationError(Exception):
    """The result of a conversion does not compute what its source does."""


@dataclass(frozen=True)
class Comparison:
    """Logits of two models on the same tokens, both in float32.

    Attributes:
        difference: the largest, relative to the largest logit.
        agreement: share of the positions at which both have the same likeliest token.
        tokens: how many positions.
    """

    difference: float
    agreement: float
    tokens: int

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> Comparison:
        """Of logits [b, s, vocabulary] and those they should be."""
        return cls(
            difference=((found - expected).abs().max() / expected.abs().max()).item(),
            agreement=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            tokens=expected.shape[:-1].numel(),
        )

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most that; NaN never is."""
        return self.difference <= tolerance

    def __str__(self) -> str:
        return (
            f"largest difference of logits {self.difference:.1e} of the largest logit, same likeliest token at "
            f"{self.agreement:.2%} of {self.tokens} positions"
        )


def compared_tokens(vocab_size: int, length: int, text: Sequence[int] = ()) -> Tensor:
    """Returns what two models are given to be compared, tokens [b, s] int64.

    These are two rows of random tokens, and two of a text where there is one.

    Args:
        length: the models' longest sequence.
        text: its tokens, repeated as often as it takes.
    """
    length = min(length, _LONGEST)
    tokens = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1234))
    if not text:
        return tokens
    repeated = list(text) * math.ceil(2 * length / len(text))
    return torch.cat((tokens, torch.tensor(repeated[: 2 * length]).view(2, length)))


@torch.inference_mode()
def reference_logits(prepared: PreparedCheckpoint, tokens: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    """Returns logits of a checkpoint's model, the mixture computed by the reference.

    It is the reference whatever backend the run had. The model is in memory as long as this takes.

    Args:
        tokens: [b, s].
        rounded_to: a dtype to round the parameters to.

    Returns:
        [b, s, vocabulary] float32 on the CPU, without what pads the vocabulary.
    """
    if prepared.config.mixture is not None:
        prepared.config.mixture = dataclasses.replace(prepared.config.mixture, backend="eager")
    model = prepared.load().model
    if rounded_to is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(rounded_to).float()
    device = next(model.parameters()).device
    positions = torch.arange(tokens.shape[1], device=device)[None]
    rows = [model(row[None].to(device), positions, None)[..., : prepared.vocab_size].float().cpu() for row in tokens]
    del model
    gc.collect()
    return torch.cat(rows)
