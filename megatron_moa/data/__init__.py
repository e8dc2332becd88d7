"""Texts, tokenizers and Megatron's datasets: read, checked before a training, and written.

Start with checks.py, which a training calls; preprocessing.py writes a dataset of what corpus.py reads.
"""
