"""Loads a checkpoint's model, writes text with it, compares it, and turns it into another mixture.

Start with text_model.py; megatron_moa/load.py opens a folder of either kind. inspection/ looks into a checkpoint.
"""
