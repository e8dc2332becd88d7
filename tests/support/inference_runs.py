"""Loads models, one after the other, as a notebook does, and writes what they say.

This runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

PROMPTS = ["def ", "import os\nclass A", "", "x = [1, 2"]
NEW = 15
TEXT = "def f(x):\n    return [y for y in x]\n\n\nclass Mixture:\n    '''Ünïcödé.'''\n" * 5
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 3}


def use(folders: list[str], results: str) -> None:
    """Writes, by folder, texts, logits and losses, and what loading left behind, as JSON."""
    import megatron_moa

    sys.argv = ["notebook", "--not-megatrons", "1"]
    before = dict(os.environ)
    printed = io.StringIO()
    models = {}
    with contextlib.redirect_stdout(printed):
        for folder in folders:
            models[folder] = megatron_moa.from_checkpoint(folder)
    report = {"printed": printed.getvalue(), "argv": sys.argv, "environment": dict(os.environ) == before}
    for folder, model in models.items():  # all are there at once
        greedy = model.generate(PROMPTS, NEW)
        report[folder] = {
            "greedy": [continuation.tokens for continuation in greedy],
            "ended": [continuation.ended for continuation in greedy],
            "alone": [model.generate([prompt], NEW)[0].tokens for prompt in PROMPTS],
            "sampled": [continuation.tokens for continuation in model.generate(PROMPTS, NEW, **SAMPLING)],
            "full": [continuation.ended for continuation in model.generate(["def "], 1000)],
            "logits": model.logits("def f(x):").tolist(),
            "batch": list(model.logits([[1, 2, 3], [4, 5, 6]]).shape),
            "vocabulary": model.vocab_size,
            "losses": [model.text_loss(TEXT, stride).loss for stride in (1, None, 32)],
            "tokens": [model.end, *model.encode(TEXT)],
            "mixing": model.mixture.describe(),
        }
    Path(results).write_text(json.dumps(report))
