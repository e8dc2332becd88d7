"""Stands for megatron_moa.training.model, which scripts written for 0.1 import by this name."""

import sys

from megatron_moa.training import model

sys.modules[__name__] = model
