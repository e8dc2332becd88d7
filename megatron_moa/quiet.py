"""Stands for megatron_moa.megatron_fixes.expected_warnings, which scripts written for 0.1 import by this name."""

import sys

from megatron_moa.megatron_fixes import expected_warnings

sys.modules[__name__] = expected_warnings
