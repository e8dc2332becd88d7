"""What stands around Megatron's training loop: flags, the model's builder, optimizer groups, progress, exit codes.

Start with arguments.py, which parses and checks a command line, and model.py, which builds the model.
"""
