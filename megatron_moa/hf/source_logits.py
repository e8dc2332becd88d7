"""Computes logits of a Hugging Face folder by transformers' own class, to compare an import with.

    python -m megatron_moa.hf.source_logits FOLDER TOKENS LOGITS ARCHITECTURE DTYPE [pickled]

A process of its own, so that two models are never in memory together. The class is named, and not taken from the
folder: nothing of the folder's is run. TOKENS, [b, s], and LOGITS, [b, s, vocabulary] float32, are safetensors files;
parameters are rounded to DTYPE before they are used.
"""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM


def main(folder: str, tokens: str, logits: str, architecture: str, dtype: str, kind: str = "safetensors") -> None:
    """Loads, rounds, computes a row at a time."""
    own = architecture == GPTMoAForCausalLM.__name__
    model = (GPTMoAForCausalLM if own else getattr(transformers, architecture)).from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=kind == "safetensors",
        weights_only=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
        rows = [model.eval()(row[None]).logits.float() for row in load_file(tokens)["tokens"]]
    save_file({"logits": torch.cat(rows)}, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
