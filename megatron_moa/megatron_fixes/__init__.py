"""What this project changes in Megatron in place, for training on any machine."""
