"""Continues prompts with a trained model.

    python tools/generate.py --load runs/demo/moa --prompt 'def ' --num-tokens 80
    python tools/generate.py --load exports/moa --prompts-file prompts.txt --temperature 0 --json

The folder is a Megatron checkpoint of any split or a Hugging Face folder, such as tools/convert_to_hf.py writes; which
one, it sees. A checkpoint's settings, mixture included, and its tokenizer come from it; further Megatron flags may
follow (``--tokenizer-model FILE`` for a tokenizer that has moved). No code that lies in a folder is run. All prompts
are one batch. Both kinds of models compute in float32, with --bf16 in bfloat16. A checkpoint's computes whole sequences
again for each token, a Hugging Face model has a cache; the tokens they choose are the same. One process: for looking at
a model, not for serving one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.numbers import positive, share, within
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.command_line.trained_model import check_source
from megatron_moa.data.corpus import add_reading_flags, text_file, texts
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

PROGRAM = "generate.py"
MOST_SAMPLES = 10_000  # all are one batch


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what training's --save named, or an export")
    add_iteration_flag(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to go on from, may be repeated; default: the start of a document",
    )
    parser.add_argument("--prompts-file", metavar="FILE", help="further prompts, one a line; JSON lines: their texts")
    add_reading_flags(parser)
    parser.add_argument(
        "--num-tokens", type=positive, default=100, metavar="N", help="new tokens at most (default 100)"
    )
    parser.add_argument(
        "--num-samples",
        type=within(int, 1, MOST_SAMPLES),
        default=1,
        metavar="N",
        help=f"how many continuations of each prompt, at most {MOST_SAMPLES:,}",
    )
    parser.add_argument(
        "--temperature", type=within(float, 0), default=1.0, metavar="T", help="0 takes the likeliest token"
    )
    parser.add_argument(
        "--top-k", type=within(int, 0), default=0, metavar="K", help="sample among the K likeliest; 0: all"
    )
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="sample among the likeliest of sum P")
    seeds = within(int, -(2**63), 2**64 - 1)  # what torch takes
    parser.add_argument("--seed", type=seeds, default=1, metavar="N", help="of the sampling")
    parser.add_argument("--json", action="store_true", help="a JSON object a line: prompt, text, tokens, ended")
    return parser.parse_known_args(argv)


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """The prompts of both flags, each as often as it is to be continued.

    Raises:
        UserError: a file that cannot be read, or a line that is no prompt.
    """
    prompts = list(flags.prompt or [])
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt {prompt!r}: is not UTF-8; give a text in UTF-8") from None
    if flags.prompts_file is not None:
        file = text_file(flags.prompts_file, "--prompts-file", flags.json_key, flags.errors)
        read = list(texts(file))
        if not (file.json_lines or file.parquet):
            read = [line.removesuffix("\r") for line in read[0].split("\n") if line.strip()]
        if not read:
            raise UserError(f"{file.named}: has no line; give one prompt a line")
        prompts += read
    return [prompt for prompt in prompts or [""] for _ in range(flags.num_samples)]


@one_line_errors(PROGRAM)
def main(argv: list[str] | None = None) -> None:
    """Loads, continues and prints."""
    flags, megatron_flags = parse_flags(argv)
    check_source(flags, megatron_flags)
    prompts = read_prompts(flags)
    # Imported after the flags are read: it takes seconds.
    from megatron_moa.load import load

    with held_log():
        model = load(flags.load, megatron_flags, flags.iteration)
        continuations = model.generate(
            prompts, flags.num_tokens, flags.temperature, flags.top_k, flags.top_p, flags.seed
        )
    iteration = getattr(model, "iteration", None)
    print(f"> from {'' if iteration is None else f'iteration {iteration} of '}{flags.load}", file=sys.stderr)
    if not flags.json and not model.has_tokenizer:
        raise UserError(f"--load {flags.load}: has no tokenizer that makes text of tokens; add --json")
    for continuation in continuations:
        if flags.json:
            print(json.dumps(dataclasses.asdict(continuation), ensure_ascii=False))
        else:
            print(f"--- sample ---\n{continuation.prompt}{continuation.text}")
    full = sum(continuation.ended == "context" for continuation in continuations)
    if full:
        print(f"> {full} of {len(continuations)} end where the model's context is full", file=sys.stderr)


if __name__ == "__main__":
    main()
