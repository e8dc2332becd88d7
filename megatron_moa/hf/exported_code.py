"""Writes the Python files that a saved GPTMoAForCausalLM needs where megatron_moa is not installed."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_moa.hf.configuration_gpt_moa import GPTMoAConfig

_CODE = Path(__file__).parent
_CODE_FOLDERS = (_CODE, _CODE.parent / "mixture", _CODE.parent)  # no file name is in two of them
_AUTO = {
    "AutoConfig": "configuration_gpt_moa.GPTMoAConfig",
    "AutoModel": "modeling_gpt_moa.GPTMoAModel",
    "AutoModelForCausalLM": "modeling_gpt_moa.GPTMoAForCausalLM",
}


def write_code(config: GPTMoAConfig, folder: str | PathLike) -> None:
    """Writes the files into a folder, which may not be there yet, and names their classes in ``auto_map``."""
    config.auto_map = dict(_AUTO)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in code_files().items():
        (Path(folder) / name).write_text(text)


def code_files() -> dict[str, str]:
    """Returns the Python files of an export, their text by name.

    These are the model's files and those of this package that it uses, all in one folder.
    """
    files: dict[str, str] = {}
    pending = ["modeling_gpt_moa"]
    while pending:
        name = pending.pop()
        if f"{name}.py" in files:
            continue
        own = (_CODE / f"{name}.py").is_file()
        folder = next(folder for folder in _CODE_FOLDERS if (folder / f"{name}.py").is_file())
        text = (folder / f"{name}.py").read_text()
        # The model's own files prefer an installed megatron_moa where they try to import it.
        imports = r"^(from )megatron_moa\.(?:\w+\.)*" if own else r"^(\s*from )megatron_moa\.(?:\w+\.)*"
        text = re.sub(imports, r"\1.", text, flags=re.MULTILINE)
        files[f"{name}.py"] = text
        pending += re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)
    return files
