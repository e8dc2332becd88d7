"""Keeps the data loader's random numbers apart from the model's on a CPU, as they are on a GPU."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_moa.cpu.patching import wrapped


class _HostStream:
    """A stream of random numbers for what runs on the host beside a GPU: the data loader.

    On a GPU the model's random numbers come from the GPU and the data loader's from the CPU.  Here one generator
    serves both, and only the first rank of a tensor-parallel group has a data loader: without a stream of its own
    that rank's hidden dropout would differ from its peers', and their copies of the model would drift apart.
    """

    state: torch.Tensor | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        model_state = torch.default_generator.get_state()
        if self.state is None:
            self.state = torch.Generator().manual_seed(torch.initial_seed()).get_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.default_generator.get_state()
            torch.default_generator.set_state(model_state)


_host_stream = _HostStream()


def _in_host_stream(original: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _host_stream():
            return original(*args, **kwargs)

    return call


PATCHES = (
    wrapped(
        "torch.utils.data.dataloader._BaseDataLoaderIter.__init__",
        _in_host_stream,
        "it draws a seed, from the model's random numbers",
    ),
    wrapped("torch.utils.data.dataloader._BaseDataLoaderIter.__next__", _in_host_stream, "data sets may draw numbers"),
)
