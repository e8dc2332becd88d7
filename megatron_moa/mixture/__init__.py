"""Computes mixtures of activations.

Here are the settings of a mixture, its equations, and backends that compute the equations fast.

Nothing here needs Megatron. Start with config.py (what a mixture is) and reference.py (the paper's equations).
functional.py picks a backend, and autograd.py says what is kept for backward. activations.py has the terms that
activations are made of, once for compile_backend.py and triton_backend/; lowering.py turns a dictionary into them.
"""
