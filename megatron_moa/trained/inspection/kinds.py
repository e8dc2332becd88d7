"""Sorts parameters into kinds by their names."""

from __future__ import annotations

import re

from megatron_moa.checkpoints.tensors import OPTIMIZER

KINDS = ("embedding", "attention", "feed-forward", "experts", "norms", "mixture", "other")


def kind_of(key: str) -> str:
    """Returns which of :data:`KINDS` a parameter is, by its name; ``optimizer`` for the optimizer's state."""
    if key.startswith(OPTIMIZER):
        return "optimizer"
    patterns = {
        "mixture": r"\.coefficients\.",
        "norms": r"norm",
        "embedding": r"^(embedding|output_layer)\.",
        "attention": r"attention\.",
        "experts": r"\.(shared_)?experts\.|\.router\.",
        "feed-forward": r"\.mlp\.",
    }
    return next((kind for kind, pattern in patterns.items() if re.search(pattern, key)), "other")
