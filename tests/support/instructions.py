"""Spares processes that compile a check which torch.compile makes at each start.

The check is that of the CPU's instructions.

Inductor compiles a few lines for each set of instructions and loads the result in a new Python that has imported torch,
four times 2 seconds. Here what was loaded once, on this machine from this very file, is not loaded again.
"""

from torch._inductor.cpu_vec_isa import VecISA

_LOAD = """
import os
from ctypes import cdll
if not os.path.exists("__lib_path__.loaded"):
    import torch
    cdll.LoadLibrary("__lib_path__")
    open("__lib_path__.loaded", "w").close()
"""


def load_once() -> None:
    """Has that done in this process and in those forked from it."""
    VecISA._avx_py_load = _LOAD
