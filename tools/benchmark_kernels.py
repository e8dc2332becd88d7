"""Times the activation step alone, beside SwiGLU's: every form, LA and MoA, every backend.

    python tools/benchmark_kernels.py --tokens 8192 --ffn 8192
    python tools/benchmark_kernels.py --grow activations          # also: ffn, tokens
    python tools/benchmark_kernels.py --check                     # accuracy against float64, nothing timed

Forward and backward are timed apart. Ratios are to Megatron's own fused SwiGLU (type1: to its fused bias and GELU),
compiled by torch.compile on CPUs too. GB/s counts what any implementation has to move, in tensors of tokens x f
elements, and nothing more:

  type1                             forward 2: read z, write out        backward 3: read z and grad, write grad z
  one-sided, bi-sided, quadratic    forward 3: read 2 z, write out      backward 5: read 2 z and grad, write 2 grad z
  MoA's coefficients, float32       forward: read tokens x n            backward: read and write tokens x n
  the gate                          forward: read x, write tokens x n   backward: read x, tokens x n; write grad x

"of copy" is that rate over the device's own for copying a tensor, measured in the same run. On a GPU every phase
starts with an empty cache and a queue that is full, so that times are the kernels' own. Results are compared with
float64 first; a wrong one ends the program with exit code 1 before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moa.command_line.numbers import positive
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line_errors
from megatron_moa.mixture.config import ACTIVATION_NAMES, DICTIONARIES, FORMS, GATES, MixtureConfig
from megatron_moa.mixture.functional import gate_coefficients, mixed_activation, resolve_backend
from megatron_moa.research.benchmarks import conditions, kernel_errors, tables, timing

PROGRAM = "benchmark_kernels.py"
BACKENDS = ("triton", "compile", "eager")

# K grows along this order: the paper's largest dictionary, then the other activations.
ORDER = tuple(dict.fromkeys((*DICTIONARIES["bi-sided"], *ACTIVATION_NAMES)))
GROWN = {
    "activations": tuple(range(1, len(ORDER) + 1)),
    "ffn": (1024, 2048, 4096, 8192, 16384),
    "tokens": (1024, 2048, 4096, 8192, 16384, 32768),
}


@dataclass(frozen=True)
class Sizes:
    """What is timed: tokens, f, h of the gate, K (None: the default dictionaries)."""

    tokens: int
    ffn: int
    hidden: int
    activations: int | None = None


@dataclass
class Contender:
    """One implementation.

    Attributes:
        forward: of new graph each call.
        leaves: what gradients are asked for.
        bytes: that have to be moved, by phase.
        facts: for the record.
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    bytes: dict[str, int]
    facts: dict[str, Any]


class Maker:
    """Makes contenders of one size; all share the same numbers."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.element = torch.empty((), dtype=dtype).element_size()
        self._generator = torch.Generator(device).manual_seed(1)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def activation_bytes(self, gated: bool, coefficients: int = 0) -> dict[str, int]:
        """See the module's docstring; ``coefficients`` those of a token."""
        one = self.sizes.tokens * self.sizes.ffn * self.element
        per_token = 4 * self.sizes.tokens * coefficients
        forward, backward = (3, 5) if gated else (2, 3)
        return {"forward": forward * one + per_token, "backward": backward * one + 2 * per_token}

    def preactivation(self, gated: bool) -> Tensor:
        width = self.sizes.ffn * (2 if gated else 1)
        return self.normal(self.sizes.tokens, width).requires_grad_()

    def fixed(self, gated: bool) -> dict[str, Contender]:
        """SwiGLU or GELU by others; the first is the baseline."""
        from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        z = self.preactivation(gated)
        if gated:
            functions = {"SwiGLU Megatron": lambda: bias_swiglu_impl(z, None)}
        else:
            bias = torch.zeros(self.sizes.ffn, dtype=self.dtype, device=self.device)
            functions = {"GELU Megatron": lambda: bias_gelu_impl(z, bias)}
        eager = _swiglu if gated else F.gelu
        compiled = torch.compile(eager, dynamic=True)
        name = "SwiGLU" if gated else "GELU"
        functions |= {f"{name} torch.compile": lambda: compiled(z), f"{name} eager": lambda: eager(z)}
        counted = self.activation_bytes(gated)
        facts = {"role": "fixed", "form": None, "mixing": None, "backend": None}
        made = {name: Contender(function, [z], counted, facts) for name, function in functions.items()}
        if gated and self.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            made["SwiGLU Liger"] = self._liger(z, counted, facts)
        return made

    def _liger(self, z: Tensor, counted: dict[str, int], facts: dict[str, Any]) -> Contender:
        """Liger takes the two halves as tensors of their own, so it gets them so."""
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        halves = [half.detach().contiguous().requires_grad_() for half in z.chunk(2, dim=-1)]
        return Contender(lambda: LigerSiLUMulFunction.apply(*halves), halves, counted, facts)

    def mixture(self, mixture: MixtureConfig) -> Contender:
        """The mixture with random coefficients around 0.5, as gates start."""
        z = self.preactivation(mixture.gated)
        n = mixture.num_coefficients
        per_token = mixture.kind == "moa"
        shape = (self.sizes.tokens, n) if per_token else (n,)
        coefficients = torch.sigmoid(self.normal(*shape, dtype=torch.float32)).requires_grad_()
        return Contender(
            lambda: mixed_activation(z, coefficients, mixture),
            [z, coefficients],
            self.activation_bytes(mixture.gated, n if per_token else 0),
            _facts(mixture, "mixture"),
        )

    def gate(self, mixture: MixtureConfig) -> Contender:
        """The gate of all tokens."""
        n, (tokens, hidden) = mixture.num_coefficients, (self.sizes.tokens, self.sizes.hidden)
        x = self.normal(tokens, hidden).requires_grad_()
        weight = (0.02 * self.normal(n, hidden, dtype=torch.float32)).to(self.dtype).requires_grad_()
        inputs, outputs = tokens * hidden * self.element, 4 * tokens * n
        return Contender(
            lambda: gate_coefficients(x, weight, mixture),
            [x, weight],
            {"forward": inputs + outputs, "backward": 2 * inputs + outputs},
            _facts(mixture, "gate"),
        )


def _facts(mixture: MixtureConfig, role: str) -> dict[str, Any]:
    facts = {"form": mixture.form, "mixing": mixture.kind, "backend": mixture.backend}
    return {"role": role, **facts, "activations": list(mixture.activations)}


def _swiglu(z: Tensor) -> Tensor:
    first, second = z.chunk(2, dim=-1)
    return F.silu(first) * second


def there(device: torch.device, asked: list[str] | None) -> list[str]:
    """The backends of this machine; those asked for must be there."""
    found = []
    for backend in asked or BACKENDS:
        try:
            found.append(resolve_backend(backend, device.type))
        except UserError as error:
            if asked:
                raise
            print(f"left out, {backend} backend: {error}")
    return found


def mixtures(options: argparse.Namespace, backends: list[str], activations: int | None = None) -> list[MixtureConfig]:
    """All that the flags ask for."""
    names = () if activations is None else ORDER[:activations]
    return [
        MixtureConfig(kind=mixing, form=form, activations=names, backend=backend)
        for form, mixing, backend in itertools.product(options.form, options.mixing, backends)
    ]


def measure(
    sizes: Sizes, wanted: list[MixtureConfig], options: argparse.Namespace, device: torch.device, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """A record for each contender: those with a linear branch, those without, gates."""
    maker = Maker(sizes, device, conditions.DTYPES[options.dtype])
    names = {"la": "LA", "moa": "MoA"}
    for gated in (True, False):
        own = {f"{names[m.kind]} {m.form} {m.backend}": m for m in wanted if m.gated == gated}
        if own:
            fixed = maker.fixed(gated)
            contenders = {**fixed, **{name: maker.mixture(mixture) for name, mixture in own.items()}}
            yield from _family(contenders, next(iter(fixed)), sizes, options, device, bandwidth)
    gates = {
        f"gate n {m.num_coefficients} {m.backend}": maker.gate(m)
        for m in wanted
        if m.kind == "moa" and m.form in ("bi-sided", "quadratic")
    }
    if gates:
        yield from _family(gates, None, sizes, options, device, bandwidth)


def _family(
    contenders: dict[str, Contender],
    baseline: str | None,
    sizes: Sizes,
    options: argparse.Namespace,
    device: torch.device,
    bandwidth: float,
) -> Iterator[dict[str, Any]]:
    runs: dict[str, timing.Run] = {}
    for name, contender in contenders.items():
        try:
            grad = torch.randn_like(contender.forward())
            run = timing.forward_backward(contender.forward, grad, contender.leaves)
            run(timing.no_lap)
        except torch.OutOfMemoryError:
            print(f"left out, {name}: does not fit into the GPU's memory")
            torch.cuda.empty_cache()
            continue
        runs[name] = run
    if not runs:
        return
    baseline = baseline if baseline in runs else None
    timings = timing.time_alternately(runs, device, options.rounds, flush=True)
    for name in runs:
        contender, record = contenders[name], timings.record(name)
        rate = {phase: contender.bytes[phase] / record["ms"][phase] / 1e6 for phase in contender.bytes}
        phases = (*contender.bytes, timing.TOTAL)
        yield {
            "arm": name,
            **contender.facts,
            "tokens": sizes.tokens,
            "ffn": sizes.ffn,
            "hidden": sizes.hidden,
            "dtype": options.dtype,
            **record,
            "bytes": contender.bytes,
            "gb_per_s": rate,
            "of_copy": {phase: rate[phase] / bandwidth for phase in rate},
            "copy_gb_per_s": bandwidth,
            "baseline": baseline,
            "ratio": {phase: timings.ratio(name, baseline, phase) for phase in phases} if baseline else None,
        }


def print_growth(grown: str, records: list[dict[str, Any]]) -> None:
    """A line a contender, a column a size: total over the baseline's, of the same round."""
    label = "K" if grown == "activations" else grown
    sizes = list(dict.fromkeys(record[label] for record in records))
    own = [record for record in records if record["role"] == "mixture" and record["ratio"]]
    arms = list(dict.fromkeys(record["arm"] for record in own))
    cells = {(record["arm"], record[label]): record["ratio"][timing.TOTAL] for record in own}
    rows = [[arm, *(f"{cells[arm, size]:.3f}" if (arm, size) in cells else None for size in sizes)] for arm in arms]
    print(f"\nforward and backward together over the baseline's, by {label}\n")
    print(markdown_table(["", *map(str, sizes)], rows), flush=True)


def check(options: argparse.Namespace, backends: list[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Checks the accuracy of all forms, sources, gates and backends, and yields a record each.

    The cases have odd and empty sizes, bias, scale and groups.
    """
    for dtype, mixture in itertools.product(options.dtypes, mixtures(options, backends)):
        own = conditions.DTYPES[dtype]
        results: list[Any] = []
        # torch.compile makes code anew for another width, bias or scale: few combinations, each thing in one of them.
        for tokens, width, further in ((0, 129, False), (1, 129, True), (37, 129, False), (128, 1024, True)):
            results += kernel_errors.check_mixture(
                mixture, own, device, tokens=tokens, width=width, bias=further, scale=further
            )
        if mixture.kind == "la":
            results += kernel_errors.check_mixture(mixture, own, device, tokens=128, width=1024, groups=5)
        else:
            for gate, further in itertools.product(GATES, (False, True)):
                amplitude = "learned" if further else "fixed"
                gated = replace(mixture, gate=gate, gate_bias=further, amplitude=amplitude)
                for tokens, hidden, groups in ((0, 64, 0), (37, 129, 0), (128, 512, 0), (128, 512, 5)):
                    results += kernel_errors.check_gate(
                        gated, own, device, tokens=tokens, hidden=hidden, groups=groups, scale=further
                    )
        worst = max(results, key=lambda result: (not result.ok, result.error / result.limit))
        yield {
            "arm": f"{mixture.kind} {mixture.form} {mixture.backend}",
            **_facts(mixture, "accuracy"),
            "dtype": dtype,
            "results": len(results),
            "failed": [result.name for result in results if not result.ok],
            "worst": worst.name,
            "error": worst.error,
            "same_dtype_error": worst.same_dtype_error,
        }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Our flags."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--tokens", **size, help="default: 8192 on a GPU, 2048 on a CPU")
    parser.add_argument("--ffn", **size, help="f (default: 8192 on a GPU, 1408 on a CPU)")
    parser.add_argument("--hidden", **size, help="h of the gate (default: f / 4)")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="default: all")
    parser.add_argument("--mixing", nargs="+", choices=("la", "moa"), default=["la", "moa"], help="default: both")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all there are")
    parser.add_argument("--grow", choices=tuple(GROWN), help="how the cost grows with K, f or tokens")
    parser.add_argument("--values", nargs="+", **size, help=f"of what --grow names (default: {GROWN})")
    parser.add_argument("--check", action="store_true", help="accuracy only; all dtypes unless --dtype names one")
    conditions.add_arguments(parser, rounds=20)
    options = parser.parse_args(argv)
    if options.values and not options.grow:
        raise UserError("--values: of what? add --grow activations, ffn or tokens")
    if options.grow == "activations" and max(options.values or [0]) > len(ORDER):
        raise UserError(f"--values {max(options.values)}: there are {len(ORDER)} activations to grow over")
    for name in ("tokens", "ffn", "hidden", "grow"):
        value = getattr(options, name)
        if value is not None and (options.check or name == options.grow):
            why = "--check, which has sizes of its own" if options.check else f"--grow {name}; give sizes with --values"
            raise UserError(f"--{name} {value}: has no effect with {why}; drop it")
    options.dtypes = [options.dtype] if options.dtype else list(conditions.DTYPES)
    return options


def series(options: argparse.Namespace, device: torch.device) -> Iterator[Sizes]:
    """The sizes to measure: one, or several with --grow."""
    on_gpu = device.type == "cuda"
    base = {"tokens": options.tokens or (8192 if on_gpu else 2048), "ffn": options.ffn or (8192 if on_gpu else 1408)}
    for grown in [{options.grow: value} for value in options.values or GROWN[options.grow]] if options.grow else [{}]:
        own = base | grown
        yield Sizes(**own, hidden=options.hidden or max(own["ffn"] // 4, 1))


def main(argv: list[str] | None = None) -> None:
    """Checks, times, reports."""
    with one_line_errors(PROGRAM):
        options = parse(argv)
        device, dtype = conditions.set_up(options)
        warnings.filterwarnings("ignore", module="megatron")  # what is not installed, at every import
        surroundings = conditions.environment(device)
        print(conditions.describe(surroundings), flush=True)
        backends = there(device, options.backend)
        if options.check:
            try:
                records = list(check(options, backends, device))
            except kernel_errors.AccuracyError as error:  # a gradient that is missing, or of another shape or dtype
                print(f"{PROGRAM}: {error}")
                raise SystemExit(1) from None
            print(tables.accuracy_table(records), flush=True)
            conditions.append_records(options.json, "accuracy", surroundings, records)
            raise SystemExit(1 if any(record["failed"] for record in records) else 0)
        bandwidth = timing.copy_bandwidth(device)
        print(f"copy on this device: {bandwidth:.0f} GB/s", flush=True)
        records = []
        for sizes in series(options, device):
            wanted = mixtures(options, backends, sizes.activations)
            conditions.require_correct(PROGRAM, wanted, dtype, device, width=sizes.ffn, hidden=sizes.hidden)
            label = "" if sizes.activations is None else f", K {sizes.activations}"
            print(f"\n{sizes.tokens} tokens, f {sizes.ffn}, h {sizes.hidden}{label}, {options.dtype}\n")
            found = [
                {**record, "K": sizes.activations} for record in measure(sizes, wanted, options, device, bandwidth)
            ]
            print(tables.kernels_table(found), flush=True)
            records += found
        if options.grow:
            print_growth(options.grow, records)
        conditions.append_records(options.json, "kernels", surroundings, records)


if __name__ == "__main__":
    main()
