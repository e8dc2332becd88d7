"""Texts, tokenizers and Megatron's datasets: read, checked before a training, and written.

Start with checks.py, which a training calls; corpus.py reads texts for the tools.
"""
