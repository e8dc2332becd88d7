"""Looks into checkpoints without Megatron, a model or a GPU (tools/inspect_checkpoint.py, docs/checkpoints.md).

Start with contents.py, which describes one checkpoint, and differences.py, which compares two.
"""
