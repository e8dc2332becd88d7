"""What tests of plain PyTorch layers share."""

from __future__ import annotations

import pytest

from megatron_moa.mixture import functional


@pytest.fixture
def eager_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the eager backend the default one.

    Which backend is the default says nothing about what is replaced; a fused one takes its time.
    """
    resolve = functional.resolve_backend
    monkeypatch.setattr(
        functional,
        "resolve_backend",
        lambda backend, device: resolve("eager" if backend == "auto" else backend, device),
    )
