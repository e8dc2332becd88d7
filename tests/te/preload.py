"""Imports, before tests.support.launch's server forks, Megatron with Transformer Engine."""

from tests.te import emulation

emulation.install()

from tests.support import preload  # noqa: E402, F401
