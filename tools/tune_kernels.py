"""Finds the fastest launch configurations of the mixture's kernels on the GPU at hand.

    python tools/tune_kernels.py --ffn 3072 8192 --output kernels.json
    MEGATRON_MOA_KERNELS=kernels.json python pretrain_gpt_moa.py ...        uses them

Configurations are measured, and the fastest are written to a file. The file has an entry for each architecture, kernel,
form and width; what it holds of others stays. Nothing is tuned while a model trains: all ranks must launch alike, and
CUDA graphs be captured. Times are of kernels alone, with an empty cache; the fastest is compared with float64 before it
is written.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.output_files import written_whole
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.autograd import MixtureInputs
from megatron_moa.mixture.config import FORMS, MIXINGS, MixtureConfig
from megatron_moa.research.benchmarks import conditions, kernel_errors, timing

PROGRAM = "tune_kernels.py"

BLOCKS = (256, 512, 1024, 2048, 4096)
WARPS = (1, 2, 4, 8, 16)
COLUMNS = (2, 32)  # a thread's, fewest and most
ROWS = (4, 8, 16, 32)  # over which a program of LA's backward sums
KERNELS = ("forward", "backward")


def candidates(kernel: str, mixing: str) -> Iterator[Any]:
    """The configurations worth a try."""
    from megatron_moa.mixture.triton_backend.tile_sizes import Configuration

    rows = ROWS if kernel == "backward" and mixing == "la" else (8,)
    for block, warps, row in itertools.product(BLOCKS, WARPS, rows):
        if COLUMNS[0] <= block // (32 * warps) <= COLUMNS[1]:
            yield Configuration(block, warps, row)


def launchers(
    mixture: MixtureConfig, tokens: int, f: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """What launches forward and backward on random numbers."""
    from megatron_moa.mixture.triton_backend import backend

    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    z = normal(tokens, 2 * f if mixture.gated else f)
    leading = (tokens,) if mixture.kind == "moa" else ()
    inputs = MixtureInputs(z, normal(*leading, mixture.num_coefficients, dtype=torch.float32))
    grad = normal(tokens, f)
    return {
        "forward": lambda: backend.mixture_forward(inputs, mixture),
        "backward": lambda: backend.mixture_backward(inputs, mixture, grad, (True, True, False)),
    }


def tune(
    mixture: MixtureConfig,
    kernel: str,
    launch: Callable[[], object],
    f: int,
    dtype: torch.dtype,
    device: torch.device,
    tried: Sequence[Any],
    rounds: int,
) -> dict[str, Any]:
    """Returns the fastest of the configurations ``tried`` and the one in use, as an entry of the file.

    Prints a line before that, which says how fast it is.

    Raises:
        AccuracyError: its results are wrong.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    from megatron_moa.mixture.triton_backend.tile_sizes import configuration, using

    def run_with(chosen: Any) -> timing.Run:
        def run(lap: timing.Lap) -> None:
            with using(kernel, mixture.form, f, chosen):
                launch()
            lap(kernel)

        return run

    before = configuration(kernel, mixture.form, f, device)
    runs: dict[str, timing.Run] = {}
    by_name = {str(chosen): chosen for chosen in (before, *tried)}
    for name, chosen in by_name.items():
        run = run_with(chosen)
        try:
            run(timing.no_lap)  # compiles
        except (OutOfResources, PTXASError):
            if chosen is before:
                raise
            continue
        runs[name] = run
    timings = timing.time_alternately(runs, device, rounds, flush=True)
    name = timings.fastest(runs)
    best = by_name[name]
    with using(kernel, mixture.form, f, best):
        kernel_errors.require(kernel_errors.check_mixture(mixture, dtype, device, tokens=65, width=f))
    print(
        f"{mixture.kind} {mixture.form} {kernel}, f {f}: {timings.median(str(before)):.4f} -> "
        f"{timings.median(name):.4f} ms, {best}; {len(runs)} tried, {len(by_name) - len(runs)} did not fit",
        flush=True,
    )
    return {"kernel": kernel, "form": mixture.form, "f": f, "block": best.block, "warps": best.warps, "rows": best.rows}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What a file holds; nothing if it is not there.

    Raises:
        UserError: it is there and holds something else.
    """
    try:
        content = json.loads(path.read_text())
        for entries in content.values():
            for entry in entries:
                entry["kernel"], entry["form"], entry["f"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"--output {path}: not a file of this tool ({error!r}); name another") from error
    return content


def write(path: Path, architecture: str, entries: list[dict[str, Any]]) -> None:
    """Adds entries to a file, in place of those of the same kernel, form and width.

    A reader sees the old file or the new one.

    Raises:
        UserError: it cannot be read or written.
    """
    content = read(path)
    new = {(entry["kernel"], entry["form"], entry["f"]) for entry in entries}
    kept = [e for e in content.get(architecture, []) if (e["kernel"], e["form"], e["f"]) not in new]
    content[architecture] = kept + entries
    with written_whole("--output", [str(path)]) as (temporary,):
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    description = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=description)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--ffn", **size, nargs="+", required=True, help="widths f (of a tensor-parallel rank)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    parser.add_argument(
        "--mixing", choices=MIXINGS, default="moa", help="default: moa; the file has one entry for both"
    )
    parser.add_argument("--tokens", **size, default=8192, help="default: 8192")
    parser.add_argument("--dtype", choices=tuple(conditions.DTYPES), default="bf16", help="default: bf16")
    parser.add_argument("--rounds", **size, default=15, help="repetitions of each, in alternation (default: 15)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="what it holds of others stays")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Tunes every form, width and kernel asked for."""
    with one_line_errors(PROGRAM):
        options = parse(argv)
        if not torch.cuda.is_available():
            raise UserError("no GPU here; run this where the model will be trained")
        from megatron_moa.mixture.triton_backend.tile_sizes import architecture

        device, dtype = torch.device("cuda"), conditions.DTYPES[options.dtype]
        write(options.output, architecture(device), [])  # what fails, fails before minutes are spent
        print(conditions.describe(conditions.environment(device)), flush=True)
        for form, f in itertools.product(options.form, options.ffn):
            mixture = MixtureConfig(kind=options.mixing, form=form, backend="triton")
            launches = launchers(mixture, options.tokens, f, dtype, device)
            for kernel in KERNELS:
                tried = list(candidates(kernel, options.mixing))
                try:
                    entry = tune(mixture, kernel, launches[kernel], f, dtype, device, tried, options.rounds)
                except kernel_errors.AccuracyError as error:
                    print(f"{PROGRAM}: {error}")
                    raise SystemExit(1) from None
                write(options.output, architecture(device), [entry])  # one by one: a run cut short keeps what it found


if __name__ == "__main__":
    main()
