"""Stands for megatron_moa.megatron_fixes.expected_warnings.

Scripts written for 0.1 import that module by this name.
"""

import sys

from megatron_moa.megatron_fixes import expected_warnings

sys.modules[__name__] = expected_warnings
