"""Logits of an exported folder, computed without megatron_moa: run as ``python -I standalone.py FOLDER TOKENS LOGITS``.

A process of its own, in which the import of megatron_moa fails, so that what is compared is what a stranger will get.
TOKENS, [b, s], and LOGITS, [b, s, vocabulary] float32, are safetensors files.
"""

import sys

sys.modules["megatron_moa"] = None  # whoever imports it gets an ImportError

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def main(folder: str, tokens: str, logits: str) -> None:
    """Loads in float32, checks that every weight found its place, computes a row at a time."""
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[what]:
            raise SystemExit(f"{what}: {sorted(map(str, notes[what]))[:5]}")
    with torch.inference_mode():
        rows = [model.eval()(row[None]).logits.float() for row in load_file(tokens)["tokens"]]
    save_file({"logits": torch.cat(rows)}, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
