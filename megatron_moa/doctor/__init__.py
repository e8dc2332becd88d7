"""Says what is on this machine, what a training here will use, and how to repair what is missing.

Start in ``__main__.py``, the command ``python -m megatron_moa.doctor``.  ``probes.py`` imports every package in a
process of its own and collects facts, ``machine.py`` looks at the machine itself, ``judgements.py`` turns facts into
findings (``finding.py``), and ``examine.py`` puts these together.  ``smoke.py`` trains a tiny model, ``network.py``
tests the links between ranks, ``patches.py`` lists what is changed in Megatron.  Modules that a
plain start imports need the standard library alone, of Python 3.8 and later.
"""
