"""Reads, writes and checks a checkpoint on disk: its files, its settings and its tensors.

The package also guards Megatron's saving and loading. Start with files.py. Nothing here builds a model; tensors.py
reads and writer.py writes one tensor at a time.
"""
