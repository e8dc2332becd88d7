"""Counts what the Triton kernels take of a GPU, from their machine code, without a GPU.

    python tools/kernel_resources.py                                        all kernels, bf16, f 8192, for H100 and H200
    python tools/kernel_resources.py --form one-sided --activations identity    SwiGLU as one of our mixtures

Instructions are those of the loop over a row's columns, per element of the output; in a column of its own, what a row
takes besides, spread over its elements. Beside them stands the least time that an element takes on a whole GPU,
whatever else goes well: for moving its bytes, for issuing its instructions (128 lanes a clock and multiprocessor), for
those that run at half rate (64: selects, comparisons, integers, conversions), and for special functions (16: exp2,
reciprocals, tanh). Times are bounds computed from counts; nothing is measured. They know
nothing of latency, occupancy or caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from megatron_moa.command_line.numbers import positive, positive_number
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, one_line, one_line_errors
from megatron_moa.mixture.activations import ACTIVATIONS
from megatron_moa.mixture.autograd import GateInputs, MixtureInputs
from megatron_moa.mixture.config import FORMS, MIXINGS, MixtureConfig
from megatron_moa.research.benchmarks import conditions

PROGRAM = "kernel_resources.py"

# H100 SXM and H200: multiprocessors, clock, and lanes a clock and multiprocessor, of all instructions and of two kinds.
MULTIPROCESSORS, HERTZ, LANES, HALF_RATE_LANES, SPECIAL_LANES = 132, 1.755e9, 128, 64, 16
HOPPER = 90
ARCHITECTURES = (80, 86, 89, HOPPER, 100, 120)
COPY_BANDWIDTHS = (3.0, 4.3)  # TB/s that a torch copy moved on an H100 and on an H200

KINDS = {
    "FMA": ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "half": tuple(
        "FSEL SEL FSETP FSET FMNMX FMNMX3 ISETP IADD3 VIADD IMNMX VIMNMX LOP3 PLOP3 LEA SHF SHL SHR PRMT P2R R2P "
        "F2FP".split()
    ),
    "MUFU": ("MUFU",),
    "load": ("LDG", "LDS", "LDL"),
    "store": ("STG", "STS", "STL"),
}

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_ACCESS = re.compile(r"^(?:LDG|STG)\.E(?:\.[A-Z][A-Z0-9]*)*?(?:\.(U8|S8|U16|S16|64|128|256))?(?:\.|$)")
_ACCESS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, None: 4, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Launch:
    """What a launcher would have started.

    Attributes:
        kernel: a Triton function.
        arguments: by name; tensors are without memory.
        warps: of a program.
    """

    kernel: Any
    arguments: dict[str, Any]
    warps: int

    @property
    def name(self) -> str:
        """``forward``, ``backward``, or ``backward coefficients`` for a launch without the gradient of z."""
        phase = self.kernel.__name__.split("_")[2]
        return phase if self.arguments.get("NEED_Z", True) else f"{phase} coefficients"


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        registers: a thread's.
        spilled: bytes of local memory a thread has; 0 if all values stay in registers.
        shared: bytes of shared memory a program has.
        instructions: those of the loop, by name, per output element; empty for gates.
        row: those outside the loop, per output element.
    """

    registers: int
    spilled: int
    shared: int
    instructions: dict[str, float]
    row: float = 0.0

    @property
    def issued(self) -> float:
        """Instructions per output element, loop and row together."""
        return sum(self.instructions.values()) + self.row

    def of_kind(self, kind: str) -> float:
        """Instructions of one of KINDS per output element."""
        return sum(self.instructions.get(name, 0.0) for name in KINDS[kind])


# What is launched.


def recorded(module: ModuleType, launcher: Callable[..., Any], *arguments: Any) -> list[Launch]:
    """Returns the launches that a launcher of ``module`` makes; none of them happens.

    So the choices in them are the launcher's own.
    """
    launches: list[Launch] = []

    def record(
        kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: dict[str, Any], warps: int
    ) -> None:
        del grid
        by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        launches.append(Launch(kernel, by_name, warps))

    with mock.patch.object(module, "launch", record):
        launcher(*arguments)
    return launches


def mixture_launches(mixture: MixtureConfig, dtype: torch.dtype, f: int) -> list[Launch]:
    """Forward and backward of a mixture without bias and router probabilities, all its gradients needed."""
    from megatron_moa.mixture.triton_backend import mixture as mixture_kernels

    tokens = 8192
    z = torch.empty(tokens, 2 * f if mixture.gated else f, dtype=dtype, device="meta")
    grad = torch.empty(tokens, f, dtype=dtype, device="meta")
    leading = (tokens,) if mixture.kind == "moa" else ()
    coefficients = torch.empty(*leading, mixture.num_coefficients, device="meta")
    inputs = MixtureInputs(z, coefficients)
    return [
        *recorded(mixture_kernels, mixture_kernels.forward, inputs, mixture),
        *recorded(mixture_kernels, mixture_kernels.backward, inputs, mixture, grad, (True, True, False)),
    ]


def gate_launches(mixture: MixtureConfig, dtype: torch.dtype, hidden: int) -> list[Launch]:
    """Forward and backward of a mixture's gates."""
    from megatron_moa.mixture.triton_backend import gate

    tokens, n = 8192, mixture.num_coefficients
    x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
    weight = torch.empty(n, hidden, dtype=dtype, device="meta")
    c = torch.empty(tokens, n, device="meta")
    inputs = GateInputs(x, weight)
    return [
        *recorded(gate, gate.forward, inputs, mixture),
        *recorded(gate, gate.backward, inputs, mixture, c, c, (True, True)),
    ]


# What its machine code says.


def require_tools(architecture: int) -> None:
    """Raises UserError where Triton, or a tool of NVIDIA's that comes with it, is not there."""
    try:
        from triton import knobs
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError as error:
        raise UserError(f"Triton is not there ({error}); install the version that torch names") from error
    try:
        for tool in (get_ptxas(architecture), knobs.nvidia.cuobjdump, knobs.nvidia.nvdisasm):
            tool.path  # noqa: B018, looked up here
    except (RuntimeError, OSError) as error:
        raise UserError(f"{error}: this Triton lacks NVIDIA's tools; install triton's wheel for Linux") from error


def compile_launch(launch: Launch, architecture: int | str) -> Any:
    """The compiled kernel, specialised as Triton does at a launch; its tensors are taken to be aligned.

    Args:
        architecture: of NVIDIA's, a compute capability; of AMD's, a name such as gfx942.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import PTXASError

    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = _POINTERS[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    is_amd = isinstance(architecture, str)
    target = GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", architecture, 32)
    try:
        return triton.compile(source, target=target, options={"num_warps": launch.warps})
    except (PTXASError, RuntimeError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"--arch {architecture}: Triton cannot compile {launch.name} for it: {reason}") from error


def resources(launch: Launch, architecture: int, moved: int = 0) -> Resources:
    """Compiles and reads a kernel.

    Args:
        moved: bytes that the loop over columns loads and stores per output element, by which it is found; 0 for kernels
            without such a loop.
    """
    registers, spilled, shared, code = _read(launch, architecture)
    if not moved:
        return Resources(registers, spilled, shared, {})
    threads, f = 32 * launch.warps, launch.arguments["F"]
    columns = launch.arguments["BLOCK"] // threads
    found = column_loop(code, moved * columns) if f >= 4 * launch.arguments["BLOCK"] else None
    if found is None:
        # A short loop is unrolled. In a longer row as much of the last tile lies inside as before.
        longer = {**launch.arguments, "F": f + 64 * launch.arguments["BLOCK"]}
        code = _read(dataclasses.replace(launch, arguments=longer), architecture)[3]
        found = column_loop(code, moved * columns)
    if found is None:
        raise UserError(
            f"{launch.name}: no loop in the machine code moves {moved} bytes an element; is Triton 3.6 there?"
        )
    loop, passes = found
    everything, counts = _by_name(_instructions(code)), _by_name(loop)
    per_element = {name: n / (columns * passes) for name, n in counts.most_common()}
    # A backward of LA runs what is outside its loop over rows once for all of them; it is counted for each.
    row = (everything - counts).total() * threads / f
    return Resources(registers, spilled, shared, per_element, row)


def _by_name(opcodes: Sequence[str]) -> Counter[str]:
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    del counts["NOP"]
    return counts


def _instructions(code: Sequence[str]) -> list[str]:
    return [match[1] for match in map(_INSTRUCTION.match, code) if match]


def _read(launch: Launch, architecture: int) -> tuple[int, int, int, list[str]]:
    """Registers, bytes spilled, bytes of shared memory, and the disassembled code."""
    from triton import knobs

    compiled = compile_launch(launch, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _run(knobs.nvidia.nvdisasm.path, file.name).splitlines()
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], compiled.metadata.shared, code


def column_loop(code: Sequence[str], moved: int) -> tuple[list[str], int] | None:
    """Finds the loop over columns: its instructions, and how many passes the assembler made one of.

    Returns None if there is no such loop.

    Args:
        code: disassembled.
        moved: bytes a thread loads and stores in one pass: the shortest loop that does this, or a multiple, is it.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in code:
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(match[1])
            target = _TARGET.search(line)
            if target and target[1] in labels:
                loops.append(range(labels[target[1]], len(instructions)))
    innermost: list[range] = []
    for loop in sorted(loops, key=len):
        in_loop = sum(_bytes_moved(instructions[index]) for index in loop)
        # A loop around the one over columns, over rows, is not meant.
        if not in_loop or any(other.start >= loop.start and other.stop <= loop.stop for other in innermost):
            continue
        innermost.append(loop)
        if in_loop % moved == 0:
            return instructions[loop.start : loop.stop], in_loop // moved
    return None


def _bytes_moved(opcode: str) -> int:
    match = _ACCESS.match(opcode)
    return _ACCESS_BYTES[match[1]] if match else 0


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# What follows from it.


def tensors_moved(form: str, kernel: str) -> int:
    """Activation-sized tensors that a kernel must load and store."""
    if kernel == "backward coefficients":
        return 3
    gated = form != "type1"
    return (3 if gated else 2) if kernel == "forward" else (5 if gated else 3)


def bounds(found: Resources) -> dict[str, float]:
    """Returns the least time of an output element's instructions, in ps, by what they wait for.

    The time is that on a whole H100 or H200.
    """
    per_lane = 1e12 / (MULTIPROCESSORS * HERTZ)
    return {
        "issue": per_lane * found.issued / LANES,
        "half": per_lane * found.of_kind("half") / HALF_RATE_LANES,
        "MUFU": per_lane * found.of_kind("MUFU") / SPECIAL_LANES,
    }


def roofline(found: Resources, moved: int, bandwidths: Sequence[float]) -> dict[float, tuple[float, str, float]]:
    """By TB/s: memory's time in ps, what binds, and how much longer that takes than memory."""
    lines = {}
    for bandwidth in bandwidths:
        times = {"memory": moved / bandwidth, **bounds(found)}
        slowest = max(times, key=times.__getitem__)
        lines[bandwidth] = times["memory"], slowest, times[slowest] / times["memory"]
    return lines


def measured_mixtures(options: argparse.Namespace) -> Iterator[tuple[str, MixtureConfig]]:
    """What was asked for, and beside it, through the same kernels, the activations everybody else has."""
    asked = [MixtureConfig(options.mixing, form, tuple(options.activations)) for form in options.form]
    for mixture in asked:
        yield mixture.form, mixture
    references = {"GELU": ("type1", ("gelu",)), "SwiGLU": ("one-sided", ("identity",))}
    for name, (form, activations) in references.items():
        reference = MixtureConfig(options.mixing, form, activations)
        wanted = any(mixture.gated == reference.gated for mixture in asked)
        if wanted and reference not in asked:
            yield name, reference


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    description = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=PROGRAM, description=__doc__, formatter_class=description)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    parser.add_argument("--mixing", choices=MIXINGS, default="moa", help="default: moa")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=(), help="default: the form's")
    parser.add_argument("--dtype", choices=tuple(conditions.DTYPES), default="bf16", help="default: bf16")
    size = {"type": positive, "metavar": "N"}
    parser.add_argument("--ffn", **size, default=8192, help="f (default: 8192)")
    parser.add_argument("--hidden", **size, help="h, for the gates (default: f / 4)")
    parser.add_argument(
        "--arch",
        type=int,
        choices=ARCHITECTURES,
        default=HOPPER,
        help="compute capability without its dot (default: 90, H100 and H200); times are given for 90 only",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive_number,
        nargs="+",
        metavar="TB/S",
        help="what a copy moves (default: 3.0 as on an H100, 4.3 as on an H200)",
    )
    conditions.add_json_argument(parser)
    options = parser.parse_args(argv)
    if options.bandwidth and options.arch != HOPPER:
        bandwidths = " ".join(f"{bandwidth:g}" for bandwidth in options.bandwidth)
        raise UserError(f"--bandwidth {bandwidths}: has no effect with --arch {options.arch}; drop it")
    if options.hidden and options.mixing == "la":
        raise UserError(f"--hidden {options.hidden}: has no effect with --mixing la, which has no gates; drop it")
    conditions.check_json(options.json)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, counts, prints."""
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels have no machine code
    with one_line_errors(PROGRAM):
        options = parse(argv)
        require_tools(options.arch)
        dtype = conditions.DTYPES[options.dtype]
        bandwidths = (options.bandwidth or COPY_BANDWIDTHS) if options.arch == HOPPER else ()
        common = {"mixing": options.mixing, "dtype": options.dtype, "arch": options.arch}
        records = []
        rows = []
        for name, mixture in measured_mixtures(options):
            for launch in mixture_launches(mixture, dtype, options.ffn):
                moved = tensors_moved(mixture.form, launch.name) * dtype.itemsize
                found = resources(launch, options.arch, moved)
                row = [f"{name} {launch.name}", found.registers, found.spilled, found.shared, f"{found.issued:.1f}"]
                row += [f"{found.row:.1f}", *(f"{found.of_kind(kind):.2f}" for kind in KINDS)]
                lines = roofline(found, moved, bandwidths)
                if lines:
                    row += [f"{time:.2f}" for time in bounds(found).values()]
                for memory, slowest, ratio in lines.values():
                    row += [f"{memory:.2f}", f"{ratio:.2f} {slowest}"]
                rows.append(row)
                records.append(
                    {"name": name, "kernel": launch.name, "form": mixture.form, **common, "f": options.ffn}
                    | {"activations": mixture.activations, "block": launch.arguments["BLOCK"], "warps": launch.warps}
                    | {"registers": found.registers, "spilled": found.spilled, "shared": found.shared}
                    | {"instructions": found.instructions, "row": found.row, "bytes": moved}
                    | {"ps": {**bounds(found), **{f"memory {tb}": lines[tb][0] for tb in lines}} if lines else None}
                )
        gates = []
        for form in options.form if options.mixing == "moa" else ():
            mixture = MixtureConfig(options.mixing, form, tuple(options.activations))
            hidden = options.hidden or max(options.ffn // 4, 1)
            for launch in gate_launches(mixture, dtype, hidden):
                found = resources(launch, options.arch)
                gates.append([f"{form} gates {launch.name}", found.registers, found.spilled, found.shared])
                records.append(
                    {"name": f"{form} gates", "kernel": launch.name, "form": form, **common, "hidden": hidden}
                    | {"activations": mixture.activations, "warps": launch.warps}
                    | {"registers": found.registers, "spilled": found.spilled, "shared": found.shared}
                )
        _print(options, rows, gates, bandwidths)
        conditions.append_records(options.json, "resources", conditions.environment(torch.device("cpu")), records)


def _print(
    options: argparse.Namespace, rows: list[list[Any]], gates: list[list[Any]], bandwidths: Sequence[float]
) -> None:
    print(f"sm_{options.arch}, {options.mixing}, {options.dtype}, f {options.ffn}: counts of machine code, per output")
    print("element; bytes of shared memory are a program's. ps: the least time by these counts, not a measurement.\n")
    head = ["", "regs", "spilled", "shared", "issued", "of row", *KINDS]
    if bandwidths:
        head += ["issue ps", "half ps", "MUFU ps"]
    for bandwidth in bandwidths:
        head += [f"{bandwidth:g} TB/s ps", "bound / that"]
    print(markdown_table(head, rows))
    if gates:
        print()
        print(markdown_table(["", "regs", "spilled", "shared"], gates))


if __name__ == "__main__":
    main()
