"""Measures launch configurations of the mixture's kernels on the GPU at hand and writes the fastest to a file.

    python tools/tune_kernels.py --ffn 3072 8192 --output kernels.json
    MEGATRON_MOA_KERNELS=kernels.json python pretrain_gpt_moa.py ...        uses them

The file has an entry for each architecture; what it holds of others, and of other widths, stays. Nothing is tuned while
a model trains: all ranks must launch alike, and CUDA graphs be captured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_moa import accuracy
from megatron_moa.config import FORMS, MixingConfig
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

BLOCKS = (256, 512, 1024, 2048, 4096)
WARPS = (1, 2, 4, 8, 16)
COLUMNS = (2, 32)  # a thread's, fewest and most
ROWS = (4, 8, 16, 32)  # over which a program of LA's backward sums


def candidates(kernel: str, mixing: str) -> Iterator[Any]:
    """The configurations worth a try."""
    from megatron_moa.kernels.configurations import Configuration

    rows = ROWS if kernel == "backward" and mixing == "la" else (8,)
    for block, warps, row in itertools.product(BLOCKS, WARPS, rows):
        if COLUMNS[0] <= block // (32 * warps) <= COLUMNS[1]:
            yield Configuration(block, warps, row)


def launchers(mixing: MixingConfig, tokens: int, f: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What launches forward and backward on random numbers."""
    from megatron_moa.kernels import backend

    generator = torch.Generator(device="cuda").manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    z = normal(tokens, 2 * f if mixing.gated else f)
    leading = (tokens,) if mixing.mixing == "moa" else ()
    coefficients = normal(*leading, mixing.num_coefficients, dtype=torch.float32)
    grad = normal(tokens, f)
    needed = True, True, False
    return {
        "forward": lambda: backend.mixture_forward(z, coefficients, None, None, mixing),
        "backward": lambda: backend.mixture_backward(grad, z, coefficients, None, None, mixing, needed),
    }


def tune(mixing: MixingConfig, kernel: str, tokens: int, f: int, dtype: torch.dtype) -> dict[str, Any]:
    """The fastest configuration of a kernel as an entry of the file, after a line that says how fast."""
    from triton.testing import do_bench

    from megatron_moa.kernels.configurations import default_configuration, using

    launch = launchers(mixing, tokens, f, dtype)[kernel]
    before = do_bench(launch, return_mode="median")
    best, best_time = default_configuration(f), before
    for chosen in candidates(kernel, mixing.mixing):
        with using(kernel, mixing.form, f, chosen):
            time = do_bench(launch, return_mode="median")
        if time < best_time:
            best, best_time = chosen, time
    with using(kernel, mixing.form, f, best):
        accuracy.require(accuracy.check_mixture(mixing, dtype, "cuda", tokens=65, width=f))
    print(f"{mixing.form:10} {kernel:8} f {f}: {before:.4f} -> {best_time:.4f} ms, {best}", flush=True)
    return {"kernel": kernel, "form": mixing.form, "f": f, "block": best.block, "warps": best.warps, "rows": best.rows}


def write(path: Path, architecture: str, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a file, in place of those of the same kernel, form and width."""
    content = json.loads(path.read_text()) if path.exists() else {}
    new = {(entry["kernel"], entry["form"], entry["f"]) for entry in entries}
    kept = [e for e in content.get(architecture, []) if (e["kernel"], e["form"], e["f"]) not in new]
    content[architecture] = kept + entries
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    """Tunes every form, width and kernel asked for."""
    parser = OneLineParser(prog="tune_kernels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ffn", type=int, nargs="+", required=True, help="widths f (a tensor-parallel rank's)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=["type1", "one-sided", "bi-sided"])
    parser.add_argument("--mixing", choices=("moa", "la"), default="moa")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, required=True, help="the file; entries of others in it stay")
    with one_line_errors("tune_kernels.py"):
        arguments: argparse.Namespace = parser.parse_args()
        if not torch.cuda.is_available():
            raise UserError("tune_kernels.py: there is no GPU; run it where the model will be trained")
        from megatron_moa.kernels.configurations import architecture

        entries = []
        for form, f, kernel in itertools.product(arguments.form, arguments.ffn, ("forward", "backward")):
            mixing = MixingConfig(mixing=arguments.mixing, form=form, backend="triton")
            entries.append(tune(mixing, kernel, arguments.tokens, f, getattr(torch, arguments.dtype)))
        write(arguments.output, architecture(torch.device("cuda")), entries)


if __name__ == "__main__":
    main()
