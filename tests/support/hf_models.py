"""Runs in a process of its own: a checkpoint as Megatron's model and as transformers', compared."""

from __future__ import annotations

import json
from pathlib import Path


def compare(checkpoint: str, results: str) -> None:
    """Writes the largest difference of logits, and what else was compared, as JSON."""
    import torch

    from megatron_moa.hf.mapping import entries, from_hf, to_hf
    from megatron_moa.hf.modeling_gpt_moa import GPTMoAForCausalLM
    from megatron_moa.hf.settings import config_from_args
    from megatron_moa.trained.from_megatron import load_model

    loaded = load_model(checkpoint)
    vocabulary = loaded.tokenizer.vocab_size
    config = config_from_args(loaded.args, loaded.mixture, vocabulary)
    state = {
        name.removeprefix("module."): tensor for name, tensor in loaded.model.state_dict().items() if tensor is not None
    }
    state = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    converted = dict(to_hf(state, config))
    model = GPTMoAForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(converted, strict=False)
    missing = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    assert not missing, missing
    assert not unexpected, unexpected
    model.tie_weights()

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocabulary, (2, loaded.args.seq_length), generator=generator)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        expected = loaded.model(tokens, positions, None)[..., :vocabulary].float()
        logits = model(tokens).logits.float()

    padded = state["embedding.word_embeddings.weight"].shape[0]
    table = list(entries(config))
    megatron = from_hf(converted.__getitem__, table, padded)
    back = {entry.megatron: megatron(entry.megatron) for entry in table}
    tables = ("embedding.word_embeddings.weight", "output_layer.weight")
    equal = [
        torch.equal(tensor[:vocabulary], state[name][:vocabulary])
        if name in tables
        else torch.equal(tensor, state[name])
        for name, tensor in back.items()
    ]
    report = {
        "difference": (logits - expected).abs().max().item() / expected.abs().max().item(),
        "spread": expected.std().item(),
        "round_trip": all(equal) and len(equal) == len([name for name in state if not name.endswith("_extra_state")]),
    }
    Path(results).write_text(json.dumps(report))
