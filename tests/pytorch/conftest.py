"""What tests of plain PyTorch layers share."""

from __future__ import annotations

import pytest

from megatron_moa.mixture import functional


@pytest.fixture
def eager_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend is the eager one: which it is says nothing about what is replaced, and takes its time."""
    resolve = functional.resolve_backend
    monkeypatch.setattr(
        functional,
        "resolve_backend",
        lambda backend, device: resolve("eager" if backend == "auto" else backend, device),
    )
