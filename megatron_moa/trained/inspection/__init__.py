"""Looks into checkpoints without Megatron, a model or a GPU (docs/checkpoints.md).

The command is tools/inspect_checkpoint.py. Start with contents.py, which describes one checkpoint, and differences.py,
which compares two.
"""
