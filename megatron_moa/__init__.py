"""Mixtures of activations (MoA, LA) as Megatron MLP specs."""

__version__ = "0.1.0"
