"""Writes a checkpoint as a Hugging Face folder that needs nothing of this project.

    python tools/convert_to_hf.py --load runs/demo/moa --out exports/moa

The checkpoint may be of any split; settings and tokenizer come from it, further Megatron flags may follow
(``--tokenizer-model FILE`` for one that has moved). The folder appears when it is complete and its logits equal the
checkpoint's in float32. Exit codes: 1 if they do not, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.command_line.trained_model import check_megatron_flags
from megatron_moa.errors import OneLineParser, UserError, needs_extra, one_line_errors

PROGRAM = "convert_to_hf.py"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size(text: str) -> int:
    """An argparse type: ``500MB``, ``5GB``, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)?", text.upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"a size such as 500MB or 5GB is wanted, not {text}")
    return max(1, int(min(float(match[1]) * _UNITS[match[2] or ""], 1 << 62)))  # many digits are infinite as a float


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what training's --save named")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write, new or empty")
    add_iteration_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=["checkpoint", "float32", "bfloat16", "float16"],
        default="checkpoint",
        help="of the weights; default: as they are in the checkpoint",
    )
    parser.add_argument(
        "--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of a safetensors file (default 5GB)"
    )
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="transformers' class to export as, such as GPTMoAForCausalLM; default: one of its own that computes the "
        "same, if there is one",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits")
    return parser.parse_known_args(argv)


@one_line_errors(PROGRAM, "nothing was written")
def main(argv: list[str] | None = None) -> None:
    """Prepares, writes, compares, renames."""
    flags, megatron_flags = parse_flags(argv)
    check_megatron_flags(flags, megatron_flags)
    # Imported after the flags are read: it takes seconds.
    from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

    # isort: split
    with needs_extra("hf"):
        from megatron_moa.hf import export
    import torch

    from megatron_moa.trained.compare_logits import VerificationError
    from megatron_moa.trained.from_megatron import prepare_checkpoint

    # Layers of plain PyTorch: theirs are the names that megatron_moa/hf/mapping.py has.
    megatron_flags = ["--transformer-impl", "local", *megatron_flags]
    dtype = None if flags.dtype == "checkpoint" else getattr(torch, flags.dtype)
    target = Path(flags.out)
    try:
        with written_folder("--out", target) as partial:
            with held_log(VerificationError):
                prepared = prepare_checkpoint(flags.load, megatron_flags, flags.iteration)
                if prepared.args.params_dtype != torch.float32:
                    raise UserError("--bf16, --fp16: models are compared in float32; drop it, and say --dtype")
                exported = export.export(
                    prepared, partial, dtype, flags.max_shard_size, not flags.no_tokenizer, flags.architecture
                )
                comparison = None
                if not flags.no_verify:
                    print("> comparing the export's logits with the checkpoint's", file=sys.stderr)
                    comparison = export.verify(prepared, partial, dtype)
            card = export.model_card(prepared, target.resolve().name, exported, comparison)
            (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    except VerificationError as error:
        print(f"{PROGRAM}: error: --load {flags.load}: {error}; nothing was written", file=sys.stderr)
        raise SystemExit(1) from None
    for name, fact in exported.facts().items():
        print(f"{name:<11} {fact}")
    if comparison is None:
        print(f"WARNING: --no-verify: NOBODY HAS COMPARED {target} TO THE CHECKPOINT", file=sys.stderr)
    else:
        print(f"verified    {comparison}")
    print(f"written     {target}")


if __name__ == "__main__":
    main()
