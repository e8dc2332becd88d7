"""A trained model in use: loaded from a checkpoint, made to write text, compared, and turned into another mixture.

Start with text_model.py; megatron_moa/load.py opens a folder of either kind. inspection/ looks into a checkpoint.
"""
