"""Stands for megatron_moa.training.arguments, which scripts written for 0.1 import by this name."""

import sys

from megatron_moa.training import arguments

sys.modules[__name__] = arguments
