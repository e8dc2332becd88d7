"""What the mixture's Triton kernels take of a GPU, without one: their machine code for an architecture, counted.

    python tools/kernel_resources.py              every form, bf16, f 8192, for sm_90 (H100, H200)
    python tools/kernel_resources.py --activations silu --form one-sided        what SwiGLU takes in the same kernels

Instructions are those of the innermost loop over a row's columns, divided by the columns a thread does in one pass: per
element of the output. Beside them stands the least time that moving an element's bytes, issuing its instructions and
its special functions (exp2, rsqrt) take on a whole GPU. These are bounds from counts, not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moa.activations import ACTIVATIONS
from megatron_moa.config import FORMS, MixingConfig
from megatron_moa.errors import OneLineParser, UserError, one_line_errors

POINTERS = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Activation-sized tensors that forward and backward must move.
TENSORS = {"type1": (2, 3), "one-sided": (3, 5), "bi-sided": (3, 5), "quadratic": (3, 5)}

# Hopper, SXM: multiprocessors, clock, lanes issued and special functions done per clock and multiprocessor.
MULTIPROCESSORS, HERTZ, LANES, SPECIAL = 132, 1.755e9, 128, 16

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_]+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        registers: a thread's.
        spilled: bytes of local memory a thread has; 0 if all values stay in registers.
        instructions: those of the loop, by name, per output element.
    """

    registers: int
    spilled: int
    instructions: dict[str, float]

    @property
    def issued(self) -> float:
        """Instructions per output element."""
        return sum(self.instructions.values())

    @property
    def special(self) -> float:
        """Special functions per output element."""
        return self.instructions.get("MUFU", 0.0)


def compile_kernel(kernel: Any, constants: dict[str, Any], dtype: str, architecture: int, warps: int) -> bytes:
    """The cubin of a kernel whose arguments that are not in ``constants`` are aligned, as they are in a layer."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = ("tokens", "z_stride", "coefficient_stride", "grad_stride", "grad_z_stride")
    floats = ("coefficients", "scale", "grad_coefficients", "grad_scale")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in numbers else "*fp32" if name in floats else POINTERS[dtype]
        if name not in ("tokens", "coefficient_stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    own = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=own, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}).asm["cubin"]


def read_resources(cubin: bytes, columns: int) -> Resources:
    """Reads a cubin with the disassembler that comes with Triton; ``columns`` a thread does in one pass of the loop."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", file.name).splitlines()
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = Counter(match[1] for line in _innermost_loop(code) if (match := _INSTRUCTION.match(line)))
    del counts["NOP"]
    per_element = {name: count / columns for name, count in counts.items()}
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], per_element)


def _innermost_loop(code: list[str]) -> list[str]:
    """The lines from a label to the branch back to it; of several such loops the one with most special functions."""
    labels, loops = {}, []
    for index, line in enumerate(code):
        if match := _LABEL.match(line):
            labels[match[1]] = index
        elif (match := _TARGET.search(line)) and match[1] in labels:
            loops.append(code[labels[match[1]] : index + 1])
    loops = [loop for loop in loops if any("MUFU" in line for line in loop)]
    if not loops:
        raise RuntimeError("no loop with special functions in the machine code: it was unrolled")
    return min(loops, key=len)


def _run(*command: str | Path) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not there; this Triton has no NVIDIA tools, install the one torch names"
        ) from None


def measure(mixing: MixingConfig, direction: str, dtype: str, f: int, architecture: int) -> Resources:
    """Forward's or backward's (``direction``) kernel of a mixture; quadratic's backward is that of z."""
    from megatron_moa.kernels import mixture, quadratic
    from megatron_moa.kernels.configurations import default_configuration
    from megatron_moa.kernels.language import VECTOR, derivatives, values

    chosen = default_configuration(f)
    is_quadratic = mixing.form == "quadratic"
    backward = quadratic._backward_z if is_quadratic else mixture._backward
    constants = {
        "FORM": mixing.form,
        "VALUES": values(mixing.activations),
        "DERIVATIVES": derivatives(mixing.activations),
        "K": mixing.num_activations,
        "F": f,
        "HAS_BIAS": False,
        "HAS_SCALE": False,
        "NEED_Z": True,
        "NEED_COEFFICIENTS": True,
        "NEED_SCALE": False,
        "ROWS": 1 if mixing.mixing == "moa" else chosen.rows,
        "BLOCK": chosen.block,
        "VECTOR": VECTOR,
        "bias": None,
        "scale": None,
        "grad_scale": None,
    }
    kernel = mixture._forward if direction == "forward" else backward
    cubin = compile_kernel(kernel, constants, dtype, architecture, chosen.warps)
    return read_resources(cubin, chosen.block // (32 * chosen.warps))


def bounds(resources: Resources, tensors: int, dtype: str, bandwidth: float) -> dict[str, float]:
    """The least time for an output element on a whole GPU, in picoseconds, by what it waits for.

    Args:
        tensors: activation-sized ones that must move.
        bandwidth: bytes a second that a copy moves.
    """
    per_second = MULTIPROCESSORS * HERTZ
    return {
        "memory": 1e12 * tensors * BYTES[dtype] / bandwidth,
        "issue": 1e12 * resources.issued / (LANES * per_second),
        "special functions": 1e12 * resources.special / (SPECIAL * per_second),
    }


def main() -> None:
    """Compiles, counts, prints."""
    parser = OneLineParser(prog="kernel_resources.py", description=__doc__.splitlines()[0])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--mixing", choices=("moa", "la"), default="moa")
    parser.add_argument("--activations", nargs="+", choices=tuple(ACTIVATIONS), default=[])
    parser.add_argument("--dtype", choices=tuple(POINTERS), default="bf16")
    parser.add_argument("--ffn", type=int, default=8192, help="f, a multiple of what a program does at a time")
    parser.add_argument("--architecture", type=int, default=90, help="90 for H100 and H200")
    parser.add_argument(
        "--bandwidth", type=float, nargs="+", default=[3.0, 4.3], help="TB/s of a copy: 3.0 on an H100, 4.3 on an H200"
    )
    parser.add_argument("--json", type=argparse.FileType("a"), help="append the figures to a file, a line each")
    with one_line_errors("kernel_resources.py"):
        arguments = parser.parse_args()
        os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: interpreted kernels have no code
        print(
            f"sm_{arguments.architecture}, {arguments.dtype}, f {arguments.ffn}; per output element; times are bounds"
        )
        head = f"{'form':10} {'':8} {'registers':>9} {'spilled':>7} {'issued':>7} {'special':>7}"
        for bandwidth in arguments.bandwidth:
            head += f" | {bandwidth} TB/s: memory, issue, special ps, slowest over memory"
        print(head)
        for form in arguments.form:
            mixing = MixingConfig(mixing=arguments.mixing, form=form, activations=tuple(arguments.activations))
            for direction, tensors in zip(("forward", "backward"), TENSORS[form], strict=True):
                found = measure(mixing, direction, arguments.dtype, arguments.ffn, arguments.architecture)
                line = f"{form:10} {direction:8} {found.registers:9} {found.spilled:7} {found.issued:7.1f}"
                line += f" {found.special:7.1f}"
                for bandwidth in arguments.bandwidth:
                    times = bounds(found, tensors, arguments.dtype, 1e12 * bandwidth)
                    slowest = max(times, key=times.get)
                    line += " | " + " ".join(f"{value:5.2f}" for value in times.values())
                    line += f"  {times[slowest] / times['memory']:.2f} ({slowest})"
                print(line, flush=True)
                if arguments.json:
                    record = {"form": form, "mixing": arguments.mixing, "direction": direction, "f": arguments.ffn}
                    record |= {"dtype": arguments.dtype, "architecture": arguments.architecture}
                    record |= {"registers": found.registers, "spilled": found.spilled}
                    record |= {"activations": mixing.activations, "instructions": found.instructions}
                    arguments.json.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
