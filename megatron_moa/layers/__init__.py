"""The mixture as modules of Megatron: coefficients, dense feed-forward layers, experts, and the specs that use them.

Start with mlp.py, then coefficients.py (gates and LA coefficients, their parallelism) and experts.py.
"""
