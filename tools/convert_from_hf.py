"""Turns a Hugging Face folder into a checkpoint from which Megatron goes on training.

    python tools/convert_from_hf.py --hf models/Qwen3-0.6B --out runs/start

Models of transformers' own classes (docs/conversion.md has the table) and this project's exports. Settings become
Megatron's and travel in the checkpoint, the tokenizer too; any split loads it, --tp, --pp and --ep are those that a run
takes from it. The folder is data: no code in it is run. Its logits are compared with transformers' own model in
float32. Further Megatron flags may follow. Exit codes: 1 if the logits differ, 2 for a mistake; nothing is left then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.command_line.tool_flags import add_target_flags, add_tolerance_flag, target_settings
from megatron_moa.command_line.trained_model import check_megatron_flags
from megatron_moa.errors import OneLineParser, needs_extra, one_line_errors

if TYPE_CHECKING:
    from megatron_moa.hf.folder import HuggingFaceFolder
    from megatron_moa.hf.importing import Imported

PROGRAM = "convert_from_hf.py"
DTYPES = ("checkpoint", "float32", "bfloat16", "float16")


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf", required=True, type=Path, metavar="FOLDER", help="config.json, weights, a tokenizer")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="the folder to write, new or empty")
    for flag, what in (("--tp", "tensor"), ("--pp", "pipeline"), ("--ep", "expert")):
        parser.add_argument(
            flag, type=positive, default=1, metavar="N", help=f"{what}-parallel size of a run from it; default 1"
        )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights; default: the folder's")
    parser.add_argument(
        "--seq-length", type=positive, metavar="N", help="to train with; default: all positions, 4096 at most"
    )
    add_target_flags(parser, required=False)
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights (pytorch_model.bin), tensors and nothing else"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    add_tolerance_flag(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare logits")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Opens, writes, compares, renames."""
    with one_line_errors(PROGRAM, "nothing was written"):
        flags, megatron_flags = parse_flags(argv)
        check_megatron_flags(flags, megatron_flags)
        target = target_settings(flags)
        # Imported after the flags are read: it takes seconds.
        from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

        # isort: split
        with needs_extra("hf"):
            from megatron_moa.checkpoints.writer import TRAIN_ON
            from megatron_moa.hf import importing
            from megatron_moa.hf.folder import open_folder
            from megatron_moa.trained.compare_logits import VerificationError
        import torch

        folder = open_folder(flags.hf, flags.allow_pickle)
        dtype = importing.check_dtype(folder, None if flags.dtype == DTYPES[0] else getattr(torch, flags.dtype))
        split = importing.TakenSplit(flags.tp, flags.pp, flags.ep)
        try:
            with written_folder("--out", flags.out) as partial, held_log(VerificationError):
                imported = importing.import_folder(
                    folder,
                    partial,
                    final=flags.out.absolute(),
                    split=split,
                    dtype=dtype,
                    seq_length=flags.seq_length,
                    target=target,
                    with_tokenizer=not flags.no_tokenizer,
                    megatron_flags=megatron_flags,
                )
                comparison = None
                if not flags.no_verify:
                    print("> comparing the checkpoint's logits with those of transformers' model", file=sys.stderr)
                    comparison = importing.verify(folder, partial, imported, dtype, flags.tolerance)
        except VerificationError as error:
            print(f"{PROGRAM}: error: --hf {flags.hf}: {error}; nothing was written", file=sys.stderr)
            raise SystemExit(1) from None
    for name, fact in facts(folder, imported).items():
        print(f"{name:<11} {fact}")
    if comparison is None:
        print(f"WARNING: --no-verify: NOBODY HAS COMPARED {flags.out} TO THE FOLDER", file=sys.stderr)
    else:
        print(f"verified    {comparison}")
    print(
        f"written     {flags.out}; train on from iteration 0 with a new optimizer, adding data and schedule:\n"
        f"  {TRAIN_ON.format(flags.out)}"
    )


_BALANCE = "router_aux_loss_coef is --moe-aux-loss-coeff {}: add it to the training, which has no such loss without it"


def facts(folder: HuggingFaceFolder, imported: Imported) -> dict[str, str]:
    """For reading, by name."""
    args = imported.args
    split = f"TP {args.tensor_model_parallel_size}, PP {args.pipeline_model_parallel_size}"
    precision = {"torch.bfloat16": " (train with --bf16)", "torch.float16": " (train with --fp16)"}
    dtype = str(args.params_dtype)
    return {
        "source": f"{folder.root} ({folder.family.architecture})",
        "parameters": f"{imported.parameters:,} in {dtype.removeprefix('torch.')}{precision.get(dtype, '')}",
        "mixing": "none: stock layers" if imported.mixture is None else imported.mixture.describe(),
        "vocabulary": f"{folder.own.vocab_size:,}, padded to {args.padded_vocab_size:,}",
        "tokenizer": f"{args.tokenizer_model}, {imported.tokens:,} tokens"
        if imported.tokens
        else "NONE (NullTokenizer): give training one with --tokenizer-type and --tokenizer-model",
        **({"balance": _BALANCE.format(args.moe_aux_loss_coeff)} if args.moe_aux_loss_coeff else {}),
        "split": f"{split}, EP {args.expert_model_parallel_size}; sequences of {args.seq_length}",
    }


if __name__ == "__main__":
    main()
