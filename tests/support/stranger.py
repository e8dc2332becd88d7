"""An export in a process that has transformers and none of this project, as whoever downloads it has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS = ("megatron", "megatron_moa", "tools")


def use(folder: str, modules_cache: str, result: str) -> None:
    """Writes the model's class, logits, hidden states' shape and greedy tokens as JSON.

    It saves the model in ``saved`` beside that file, too. This is a target of launch.py.
    """
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(OURS)  # importing any of them is an ImportError from here on

    import torch
    from transformers import AutoModel, AutoModelForCausalLM, dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = modules_cache  # read from the environment when transformers was imported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = model(tokens).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)(tokens).last_hidden_state
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    seen = {"class": type(model).__name__, "logits": logits.tolist(), "hidden": list(hidden.shape)}
    Path(result).write_text(json.dumps({**seen, "generated": generated.tolist()}))
    model.save_pretrained(Path(result).with_name("saved"))
