"""Imports what launch.py's server needs before it forks.

Nothing here may start a thread or touch Megatron's state.
"""

import argparse
import functools
import gc
import warnings

with warnings.catch_warnings(action="ignore"):  # of Transformer Engine and Apex, which are not there
    import megatron.core.tokenizers.text  # of which transformers takes three quarters of a small run
    import megatron.training.checkpointing
    import megatron.training.training  # noqa: F401
    import torch._dynamo.trace_rules  # noqa: F401
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    from tests.support.instructions import load_once

# The docstrings that Megatron's flags take from source files are the same for every parser: read once.
_docstrings = functools.cache(functools.partial(ArgumentGroupFactory._get_field_docstrings, ArgumentGroupFactory))
ArgumentGroupFactory._get_field_docstrings = staticmethod(_docstrings)
add_megatron_arguments(argparse.ArgumentParser())
load_once()
gc.freeze()  # or each fork's collections would walk, and so copy, all that is imported
