"""A checkpoint on disk: its files, its settings, its tensors, and the guard around Megatron's saving and loading.

Start with files.py. Nothing here builds a model; tensors.py reads and writer.py writes one tensor at a time.
"""
