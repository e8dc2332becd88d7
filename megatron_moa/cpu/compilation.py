"""Switches off Megatron's compiled fusions, and keeps torch.compile working beside what is replaced in torch."""

import functools
import sys


def run_fusions_eagerly() -> None:
    """Switches off Megatron's ``jit_fuser``: it is torch.compile, which takes long on a CPU and needs a C++ compiler.

    Functions decorated before now get their originals back, and later ones are not compiled.  torch.compile itself is
    left alone.
    """
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.") or module is None:
            continue
        owners = [module, *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module_name)]
        for owner in owners:
            for name, value in list(vars(owner).items()):
                original = getattr(value, "_torchdynamo_orig_callable", None)
                if original is not None and callable(value):
                    setattr(owner, name, original)


def keep_compiler_rules() -> None:
    """Keeps torch.compile's list of torch's functions that of the originals.

    torch.compile knows torch's functions by identity, from a list that it makes anew after init_process_group.  That
    would become a list of the replacements, while it is the originals that these call.
    """
    from torch._dynamo import trace_rules

    originals = trace_rules.get_torch_obj_rule_map()
    trace_rules.get_torch_obj_rule_map = functools.cache(lambda: originals)
