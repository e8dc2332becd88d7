"""Makes feed-forward layers of plain PyTorch, such as models of others have."""

from __future__ import annotations

from torch import nn


def mlp(activation: nn.Module | None = None, bias: bool = True, width: int = 32) -> nn.Sequential:
    """A plain MLP of three modules."""
    return nn.Sequential(nn.Linear(16, width, bias), activation or nn.GELU(), nn.Linear(width, 16, bias))
