"""What launch.py's server imports before it forks; nothing here may start a thread or touch Megatron's state."""

import warnings

with warnings.catch_warnings(action="ignore"):  # of Transformer Engine and Apex, which are not there
    import megatron.training.checkpointing
    import megatron.training.training  # noqa: F401
    import torch._dynamo.trace_rules  # noqa: F401
