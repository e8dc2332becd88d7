"""Switches off Megatron's compiled fusions, and keeps torch.compile itself working.

torch.compile works beside what is replaced in torch.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moa.cpu.patching import wrapped


def _no_fuser(jit_fuser: Callable) -> Callable:
    """Returns a decorator that changes nothing, in place of Megatron's ``jit_fuser``.

    ``jit_fuser`` is torch.compile, which takes long on a CPU and needs a C++ compiler. torch.compile itself is left
    alone.
    """
    from megatron.core.jit import noop_decorator

    return noop_decorator


def _originals_of_fused() -> Iterator[tuple[Any, str, Any]]:
    """Yields the functions that ``jit_fuser`` has decorated before.

    Each comes as a module or class, a name, and the undecorated original.
    """
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.") or module is None:
            continue
        owners = [module, *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module_name)]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                original = getattr(value, "_torchdynamo_orig_callable", None)
                if original is not None and callable(value):
                    yield owner, name, original


def _of_originals(rule_map: Callable[[], dict]) -> Callable[[], dict]:
    """Keeps torch.compile's list of torch's functions that of the originals.

    torch.compile knows torch's functions by identity, from a list that it makes anew after init_process_group.  That
    would become a list of the replacements, while it is the originals that these call.
    """
    originals = rule_map()
    return functools.cache(lambda: originals)


RULES = wrapped(  # before any function of torch's is replaced
    "torch._dynamo.trace_rules.get_torch_obj_rule_map",
    _of_originals,
    "made anew, it would hold our replacements in place of the functions that torch.compile knows",
)
FUSER = wrapped(
    "megatron.core.jit.jit_fuser",
    _no_fuser,
    "it is torch.compile, which takes long on a CPU; all functions that it has decorated get their originals back",
    also_sets=_originals_of_fused,
)
