"""Runs tasks of lm-evaluation-harness on an export, or on another Hugging Face folder.

    python tools/evaluate.py --load exports/moa --tasks hellaswag arc_easy --data benchmarks

examples/evaluate.sh starts this program. This project's model is loaded with this package's classes, others with
transformers' own: no code that lies in the folder is run. The model computes in float32, with --bf16 in bfloat16. Each
task's result is a JSON file in --out, written when the task is finished; a task that has one is not evaluated again,
and the table says so. A result of other settings, or of files that have changed since, is refused.

--data FOLDER has a folder for each task, named like it, with its splits as the hub has them: files in it, however deep,
named like the split up to a - or a dot (validation-00000-of-00001.parquet, test.jsonl). Of several datasets' folders in
it, the one named as the harness names the task's is read. Nothing is asked of the hub then. Tasks of this project
(examples/evaluation) take their data from there alone.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moa.command_line.numbers import positive, within
from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import OneLineParser, UserError, has_types, needs_extra, one_line, one_line_errors

PROGRAM = "evaluate.py"
OWN_TASKS = Path(__file__).resolve().parents[1] / "examples" / "evaluation"
TASKS = ("hellaswag", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "piqa")
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_FILES = {  # settings that are fingerprints, as a message names them
    "model_files": "other files in --load",
    "task_files": "other files in --data, --tasks-folder or examples/evaluation",
}
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, metavar="FOLDER", help="what tools/convert_to_hf.py wrote")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--data", metavar="FOLDER", help="the tasks' data; default: from the Hugging Face hub")
    parser.add_argument("--tasks-folder", metavar="FOLDER", help="further tasks of your own, as the harness has them")
    parser.add_argument(
        "--out", metavar="FOLDER", help="for results (default: evaluation in the folder that is loaded)"
    )
    parser.add_argument(
        "--num-fewshot", type=within(int, 0), default=0, metavar="N", help="examples before a question (default 0)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="(default 8)")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N documents of a task, to try it out"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (default float32)")
    parser.add_argument("--again", action="store_true", help="evaluate what has been evaluated already")
    return parser.parse_args(argv)


def fingerprint(files: Iterable[Path]) -> str:
    """Of files' paths, sizes and times of change."""
    listed = sorted((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def files_below(folder: Path | None) -> list[Path]:
    """All files of a folder, however deep; none of None."""
    return [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]


def is_result(result: Any, task: str) -> bool:
    """Whether what a file holds has what :func:`table` and :func:`finished` read, of this task."""
    types = {"task": str, "documents": int, "settings": dict, "metrics": dict}
    if not has_types(result, types) or result["task"] != task:
        return False
    return all(isinstance(value, float) for value in result["metrics"].values())


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an evaluation that was run before, None if there is none.

    Args:
        path: named like its task.

    Raises:
        UserError: it was run with other settings or files, or the file is none of ours.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        result = None
    if not is_result(result, path.stem):
        raise UserError(f"--out {path}: is no result of {path.stem}, or damaged; move it away")
    there = result["settings"]
    if there != settings:
        differing = [name for name in settings if there.get(name) != settings[name]]
        what = ", ".join(_FILES.get(name) or f"{name} {there.get(name)}" for name in differing) or "further settings"
        raise UserError(f"--out {path}: was evaluated with {what}; add --again to replace it, or name another --out")
    return result


def check_folders(flags: argparse.Namespace, folder: Path, out: Path) -> None:
    """Raises UserError for a folder that is not there, or is another than it should be.

    To be called before the harness is imported, which takes seconds.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"--load {folder}: has no config.json; give a folder that tools/convert_to_hf.py wrote")
    if out.resolve() == folder.resolve():
        raise UserError(f"--out {out}: is the model's own folder; name another, such as {out / 'evaluation'}")
    for flag, given in (("--data", flags.data), ("--tasks-folder", flags.tasks_folder)):
        if given is not None and not Path(given).is_dir():
            raise UserError(f"{flag} {given}: no such folder; check the path")
    for task in flags.tasks if flags.data is not None else ():
        if not (Path(flags.data) / task).is_dir():
            raise UserError(
                f"--data {flags.data}: has no folder {task}; put the task's files there, or check the task's name"
            )


def settings_by_task(flags: argparse.Namespace, folder: Path, data: Path | None) -> dict[str, dict[str, Any]]:
    """What a task's result depends on: flags, and fingerprints of the model's and the task's files."""
    settings = {
        "load": str(folder.resolve()),
        "dtype": dtype(flags),
        "num_fewshot": flags.num_fewshot,
        "limit": flags.limit,
        "data": str(data),
        "tasks_folder": flags.tasks_folder,
        "model_files": fingerprint(path for path in folder.iterdir() if path.is_file()),
    }
    further = [*files_below(OWN_TASKS), *files_below(Path(flags.tasks_folder) if flags.tasks_folder else None)]
    return {
        name: {**settings, "task_files": fingerprint([*further, *files_below(data and data / name)])}
        for name in flags.tasks
    }


def local_files(folder: Path, task: str, config: dict[str, Any]) -> dict[str, Any]:
    """What replaces a task's settings so that its data are read from files.

    Args:
        folder: of the task.
        config: the task's settings.

    Raises:
        UserError: no file of the split that is evaluated, or a split in several folders.
    """
    there = sorted(path for path in folder.rglob("*") if path.suffix in _FORMATS)
    dataset = [path for path in there if config.get("dataset_name") in path.relative_to(folder).parts]
    files: dict[str, list[str]] = {}
    kinds = set()
    changed: dict[str, Any] = {}
    for setting in _SPLITS:
        split = config.get(setting)
        if split is None:
            continue
        found = [path for path in dataset or there if path.name.startswith((f"{split}-", f"{split}."))]
        folders = sorted({str(path.parent) for path in found})
        if len(folders) > 1:
            raise UserError(f"--data {folder}: {split} is in {folders[0]} and in {folders[1]}; leave those of {task}")
        if found:
            files[split] = [str(path.resolve()) for path in found]
            kinds |= {_FORMATS[path.suffix] for path in found}
        else:
            changed[setting] = None
    evaluated = config.get("test_split") or config.get("validation_split")
    if evaluated not in files:
        raise UserError(
            f"--data {folder}: has no {evaluated}-*.parquet or {evaluated}.jsonl, which {task} is evaluated on"
        )
    if len(kinds) > 1:
        raise UserError(f"--data {folder}: has parquet and JSON files; leave those of one kind")
    return {**changed, "dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def build_task(manager: Any, name: str, data: Path | None) -> Any:
    """A task of the harness, its data loaded.

    Args:
        manager: lm_eval's TaskManager.
        data: the folder with a folder for each task; None for the hub.

    Raises:
        UserError: no such task, or its data are not there.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise UserError(f"--tasks {name}: is a group of tasks; name its tasks one by one")
        near = difflib.get_close_matches(name, manager.all_subtasks, 3)
        raise UserError(
            f"--tasks {name}: unknown{', did you mean ' + ' or '.join(near) if near else ''}? lm-eval ls tasks"
        )
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    if "class" in config and data is not None:
        raise UserError(f"--tasks {name}: is written in Python and reads its data by itself; drop --data for it")
    if data is not None:
        config = {**config, **local_files(data / name, name, config)}
    elif config.get("dataset_path") in _FORMATS.values() and not (config.get("dataset_kwargs") or {}).get("data_files"):
        raise UserError(f"--tasks {name}: reads local files; name the folder that has them in {name} with --data")
    try:
        return manager.load([config])["tasks"][name]
    except Exception as error:  # of the hub, the network, and files that do not fit
        reason = one_line(error)[:200]
        where = f"--data {data / name}" if data else f"--tasks {name}"
        remedy = "check its files" if data else "without the hub, give --data FOLDER"
        raise UserError(f"{where}: its data cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error


def evaluate(lm: Any, manager: Any, task: Any, flags: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one task, each with its standard error where the harness has one."""
    from lm_eval import simple_evaluate

    task.set_fewshot_seed(seed=1234)
    results = simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=flags.num_fewshot,
        limit=flags.limit,
        log_samples=False,
        task_manager=manager,  # or each call reads the harness's 14,000 task files anew
    )
    metrics = results["results"][task.task_name]
    return {
        "metrics": {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)},
        "documents": results["n-samples"][task.task_name]["effective"],
        "version": results["versions"][task.task_name],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results by task, as a Markdown table."""
    rows = []
    for task, result in results.items():
        metrics = result["metrics"]
        for name, value in metrics.items():
            if "_stderr" in name:
                continue
            metric, comma, filtered = name.partition(",")  # as lm_eval writes both
            error = metrics.get(f"{metric}_stderr{comma}{filtered}")
            rows.append((task, result["documents"], name, f"{value:.4f}", None if error is None else f"{error:.4f}"))
    return markdown_table(["task", "documents", "metric", "value", "standard error"], rows)


def dtype(flags: argparse.Namespace) -> str:
    """What the model computes in."""
    return "bfloat16" if flags.bf16 else "float32"


def load(flags: argparse.Namespace, folder: Path, data: Path | None, names: Iterable[str]) -> tuple[Any, Any, dict]:
    """The model as the harness takes it, the harness's TaskManager, and the tasks of these names.

    Raises:
        UserError: the harness is not installed, a task that cannot be built, or a model without a tokenizer.
    """
    if data is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
    with needs_extra("eval"):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import GenerationConfig
    from megatron_moa.hf.loading import load_folder

    manager = TaskManager(include_path=[OWN_TASKS, *([flags.tasks_folder] if flags.tasks_folder else [])])
    tasks = {name: build_task(manager, name, data) for name in names}
    model = load_folder(folder, dtype(flags))
    if model.tokenizer is None:
        raise UserError(f"--load {folder}: has no tokenizer; put its files there")
    # What else a folder has for generate, such as a penalty of repetitions, would change the results.
    model.model.generation_config = GenerationConfig(eos_token_id=model.model.generation_config.eos_token_id)
    lm = HFLM(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        batch_size=flags.batch_size,
        max_length=model.context,
        prefix_token_id=model.first,
        add_bos_token=bool(model.before_text),
    )
    return lm, manager, tasks


@one_line_errors(PROGRAM, "the results of finished tasks are kept")
def main(argv: list[str] | None = None) -> None:
    """Loads once, evaluates what is not there yet, prints all of it."""
    flags = parse_flags(argv)
    folder = Path(flags.load)
    out = Path(flags.out) if flags.out else folder / "evaluation"
    data = Path(flags.data) if flags.data else None
    check_folders(flags, folder, out)
    settings = settings_by_task(flags, folder, data)
    results = {}
    for name in flags.tasks:
        if (out / f"{name}.json").is_dir():
            raise UserError(f"--out {out}: {name}.json in it is a folder; move it away")
        before = None if flags.again else finished(out / f"{name}.json", settings[name])
        if before is not None:
            results[name] = before
            print(f"> {name}: evaluated already, {out / name}.json; --again repeats it", file=sys.stderr)
    missing = [name for name in flags.tasks if name not in results]
    if missing:
        lm, manager, tasks = load(flags, folder, data, missing)
        make_folder(out)
        for name, task in tasks.items():
            when = datetime.datetime.now().isoformat(timespec="seconds")
            measured = evaluate(lm, manager, task, flags)
            results[name] = {"task": name, "settings": settings[name], "when": when, **measured}
            write(out / f"{name}.json", results[name])
    print(table({name: results[name] for name in flags.tasks}))


def make_folder(out: Path) -> None:
    """Raises UserError where it cannot be made; before hours of evaluation."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror}); name a folder elsewhere") from None


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all. Raises UserError where it cannot be written."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); free space or name another") from None


if __name__ == "__main__":
    main()
