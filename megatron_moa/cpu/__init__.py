"""Runs Megatron on a machine without a GPU, over gloo: for tests, debugging and small trainings.

Megatron has no CPU path of its own: it asks ``torch.cuda`` for devices, streams, memory and random numbers in some 500
places.  Start in ``switch.py``: its :func:`~megatron_moa.cpu.switch.enable` answers those questions with the CPU, and
does nothing where CUDA is there.  The other files have one subject each, with a table of what is replaced and why:
``fake_cuda.py``, ``factories.py``, ``host_stream.py``, ``collectives.py``, ``flags.py``, ``megatron_parts.py`` and
``compilation.py``.  ``python -m megatron_moa.cpu SCRIPT ARGS`` runs a script that knows nothing of this.
"""
