"""Checks that the short way to launch a kernel starts what Triton's own way would.

The arguments are the same; nothing runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.support.training import ROOT

# In a process of its own: here the interpreter is on, which launches nothing. Each case runs twice the short way, so
# that the second launch is by look-up, then Triton's way.
CODE = """
import json, sys
import torch
from megatron_moa.mixture import functional
from megatron_moa.mixture.config import MixtureConfig
from megatron_moa.mixture.triton_backend import launch
from megatron_moa.research.benchmarks.mocked_launches import mocked_launches

launched = []

def launcher(*arguments):
    grid, (_, function, metadata), values = arguments[:3], arguments[3:6], arguments[9:]
    shown = [(v.dtype, v.shape, v.stride()) if isinstance(v, torch.Tensor) else repr(v) for v in values]
    launched.append(repr((grid, function, metadata, shown)))

def aligned(*shape, dtype, by):
    storage = torch.zeros(torch.Size(shape).numel() + 16, dtype=dtype)
    offset = 0 if by else 1
    return storage[offset : offset + torch.Size(shape).numel()].view(shape)

def run(case):
    form, kind, gate, dtype, tokens, width, hidden, by, bias = case
    mixture = MixtureConfig(kind, form, gate=gate, gate_bias=bias and kind == "moa")
    z = aligned(tokens, 2 * width if mixture.gated else width, dtype=dtype, by=by).requires_grad_()
    n = mixture.num_coefficients
    if kind == "moa":
        x = aligned(tokens, hidden, dtype=dtype, by=by).requires_grad_()
        weight = aligned(n, hidden, dtype=dtype, by=by).requires_grad_()
        own = torch.zeros(n, dtype=dtype, requires_grad=True) if bias else None
        c = functional.gate_coefficients(x, weight, mixture, own)
    else:
        c = torch.zeros(n, requires_grad=True)
    functional.mixed_activation(z, c, mixture).sum().backward()

def cases():
    yield "quadratic", "moa", "sigmoid", torch.bfloat16, 8, 64, 32, True, False
    yield "bi-sided", "la", "sigmoid", torch.bfloat16, 9, 64, 32, True, False
    for tokens in (1, 2, 17):
        yield "type1", "moa", "sigmoid", torch.float32, tokens, 64, 32, True, True
    yield "type1", "moa", "softmax", torch.float32, 8, 33, 17, True, False
    yield "type1", "moa", "softmax", torch.float32, 8, 32, 16, False, False

found = []
with mocked_launches(launcher):
    for case in cases():
        results = []
        for known in (True, True, False):
            launch._KNOWN = known
            launched.clear()
            run(case)
            results.append(list(launched))
        found.append({"case": repr(case), "results": results})
found.append({"kinds": len(launch._compiled)})
json.dump(found, sys.stdout)
"""


def test_launches_are_tritons_own() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    *cases, last = json.loads(run.stdout)
    assert len(cases) == 7
    for case in cases:
        first, second, tritons = case["results"]
        assert len(tritons) >= 2, case["case"]
        assert first == second == tritons, case["case"]
    # Numbers of tokens that Triton compiles the same kernel for share one: 2 and 17 do, 1 has its own.
    assert last["kinds"] < sum(len(case["results"][0]) for case in cases)
