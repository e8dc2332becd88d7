"""Holds the code around Megatron's training loop: flags, model, optimizer, progress, exit codes.

Start with arguments.py, which parses and checks a command line, and model.py, which builds the model.
"""
