"""Leaves this folder to `make test-te`, which fetches Transformer Engine's Python."""

from __future__ import annotations

import multiprocessing
import os

from megatron_moa.megatron_fixes import te_guard

if os.environ.get(te_guard.ALLOW) == "1":
    from tests.support import launch  # noqa: F401  # names modules to import before a fork, and is overruled here
    from tests.te import emulation

    emulation.install()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.te.preload"])
else:
    collect_ignore_glob = ["test_*.py"]
