"""Reads and checks the command line of a training, before torch and Megatron are imported where that is possible."""
