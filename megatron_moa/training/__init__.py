"""Holds what stands around Megatron's training loop, from flags to exit codes.

The model's builder, optimizer groups and progress are among it. Start with arguments.py, which parses and checks a
command line, and model.py, which builds the model.
"""
