"""Tests examples/nanogpt.py: its mixture by hand is the layer's, and its SwiGLU is SwiGLU.

A few steps of its training learn.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from megatron_moa import MixedFeedForward
from tests.support.scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "examples/nanogpt.py"


nanogpt = load_script("examples/nanogpt.py")


def test_the_mixture_by_hand_is_the_layer() -> None:
    layer, x = MixedFeedForward(12, 20, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(nanogpt.mixture_by_hand(layer, x), layer(x))


def test_its_swiglu_is_swiglu() -> None:
    layer = MixedFeedForward(12, 20, nanogpt.mixture("swiglu", None), dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64)
    y, z = layer.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), layer.fc2(F.silu(y) * z))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["fc1.weight", "fc2.weight"]


def test_a_few_steps_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for size, value in {"LAYERS": 2, "CONTEXT": 16, "WIDTH": 32}.items():
        monkeypatch.setattr(nanogpt, size, value)
    windows = nanogpt.windows_of_text
    monkeypatch.setattr(nanogpt, "windows_of_text", lambda held_out, device: windows(held_out, device)[:60_000])
    with torch._dynamo.config.patch(disable=True):  # compiling would take most of the time
        nanogpt.main(["--steps", "20"])
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", shown)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert "\ndef " in shown
    rows = re.findall(r"^((?:linear\.)?\w+) +([\d.]+) +([\d.]+) ", shown, flags=re.MULTILINE)
    assert len(rows) == 14
    assert all(0 < float(mean) < 1 and float(spread) > 0 for _, mean, spread in rows)


def test_mistakes_are_one_line_and_megatron_stays_out() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['nanogpt.py', '--feed-forward', 'swiglu', '--form', 'type1']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: assert not {'megatron', 'transformers'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "nanogpt.py: error: --form type1: SwiGLU is no mixture; drop the flag, or take --feed-forward moa or la"
    ]
