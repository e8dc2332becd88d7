"""Imports, before tests.launch's server forks, Megatron with Transformer Engine."""

from tests.te import emulation

emulation.install()

from tests import preload  # noqa: E402, F401
