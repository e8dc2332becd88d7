"""Samples text from a checkpoint.

    python tools/generate.py --load runs/demo/moa --prompt 'def ' --num-tokens 80

The model's settings, mixture included, and the tokenizer come from the checkpoint; further Megatron flags may follow
(``--tokenizer-model FILE`` for a tokenizer that has moved). One process, whole sequences recomputed for each token: for
looking at a model, not for serving one.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

from megatron_moa.errors import OneLineParser, UserError, one_line_errors


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        "generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what training's --save named")
    parser.add_argument("--prompt", default="", help="text to go on from; default: the start of a document")
    parser.add_argument("--num-tokens", type=int, default=100, metavar="N", help="tokens to sample at most")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many continuations")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest of sum P")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the sampling")
    flags, rest = parser.parse_known_args(argv)
    for name, value, legal in (
        ("--num-tokens", flags.num_tokens, flags.num_tokens > 0),
        ("--num-samples", flags.num_samples, flags.num_samples > 0),
        ("--temperature", flags.temperature, flags.temperature >= 0),
        ("--top-k", flags.top_k, flags.top_k >= 0),
        ("--top-p", flags.top_p, 0 < flags.top_p <= 1),
    ):
        if not legal:
            raise UserError(f"{name} {value}: out of range; see generate.py --help")
    return flags, rest


def choose(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """The next token of each sequence.

    Args:
        logits: [b, vocabulary].
        temperature: 0 takes the likeliest token.
        top_k: sample among that many; 0 among all.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum.

    Returns:
        [b] int64
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities, tokens = logits.softmax(-1).sort(descending=True)
    reached_before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(reached_before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)


def main(argv: list[str] | None = None) -> None:
    """Loads, samples and prints."""
    with one_line_errors("generate.py"):
        flags, megatron_flags = parse_flags(argv)
        # Imported after the flags are read: it takes seconds.
        from megatron_moa.checkpoint import load_model, next_token_logits

        with contextlib.redirect_stdout(sys.stderr):  # Megatron's log: standard output is for the text
            loaded = load_model(flags.load, megatron_flags)
    tokenizer = loaded.tokenizer
    prompt = tokenizer.tokenize(flags.prompt) if flags.prompt else [tokenizer.eod]
    device = next(loaded.model.parameters()).device
    tokens = torch.tensor(prompt, device=device).repeat(flags.num_samples, 1)  # [b, t]
    generator = torch.Generator(device).manual_seed(flags.seed)
    finished = torch.zeros(flags.num_samples, dtype=torch.bool, device=device)
    for _ in range(flags.num_tokens):
        logits = next_token_logits(loaded, tokens[:, -loaded.args.seq_length :])
        chosen = choose(logits, flags.temperature, flags.top_k, flags.top_p, generator)
        chosen = torch.where(finished, tokenizer.eod, chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        finished |= chosen == tokenizer.eod
        if finished.all():
            break
    print(f"> sampled from iteration {loaded.iteration} of {flags.load}", file=sys.stderr)
    for row in tokens.tolist():
        new = row[len(prompt) :]
        if tokenizer.eod in new:
            new = new[: new.index(tokenizer.eod)]
        print(f"--- sample ---\n{flags.prompt}{tokenizer.detokenize(new)}")


if __name__ == "__main__":
    main()
