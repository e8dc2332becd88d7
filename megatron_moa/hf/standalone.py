"""Computes an export's logits without megatron_moa: ``python -P standalone.py FOLDER TOKENS LOGITS``.

It also generates with the cache, whose name differs between releases of transformers. A process of its own, in which
the import of megatron_moa fails, so that what is compared is what a stranger will get.
TOKENS, [b, s], and LOGITS, [b, s, vocabulary] float32, are safetensors files.
"""

import sys

sys.modules["megatron_moa"] = None  # whoever imports it gets an ImportError

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

_CACHE_TOLERANCE = 1e-4  # of the largest logit: sums in another order; a wrong cache is off by a good part of 1


def main(folder: str, tokens: str, logits: str) -> None:
    """Loads in float32, checks that every weight found its place, computes a row at a time."""
    model, notes = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[what]:
            raise SystemExit(f"{what}: {sorted(map(str, notes[what]))[:5]}")
    with torch.inference_mode():
        given = load_file(tokens)["tokens"]
        rows = [model.eval()(row[None]).logits.float() for row in given]
        check_cache(model, given[:1, : given.shape[1] // 2])
    save_file({"logits": torch.cat(rows)}, logits)


def check_cache(model: torch.nn.Module, prompt: torch.Tensor) -> None:
    """Ends the program where generating with the cache gives other logits than the model without.

    Tokens are generated greedily.

    Args:
        prompt: [1, s]; at most s tokens are generated.
    """
    count = min(8, prompt.shape[1])
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # else the prompt's tokens of pad_token_id are taken for padding
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    cached = torch.stack(made.logits, dim=1)  # [1, generated, vocabulary]
    whole = model(made.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    if not torch.allclose(cached, whole, rtol=0, atol=_CACHE_TOLERANCE * whole.abs().max().item()):
        raise SystemExit(f"transformers {transformers.__version__} generates other logits with a cache than without")


if __name__ == "__main__":
    main(*sys.argv[1:])
