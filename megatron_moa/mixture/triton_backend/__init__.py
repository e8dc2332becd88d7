"""The mixture and its gates in Triton.

language.py makes Triton functions of activations.py; mixture.py has the four forms, gate.py the gates; launch.py
starts them, and tile_sizes.py says with which tile sizes they run on which GPU.
Importing this package needs Triton; megatron_moa.mixture.functional finds out whether it is there.
"""
