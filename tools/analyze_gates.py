"""Measures what the gates of a trained mixture do on a text, and what the model loses without them.

    python tools/analyze_gates.py runs/dense-0.12b-moa/checkpoints held-out/*.txt --out gates
    python tools/analyze_gates.py runs/moa/checkpoints data/corpus --out gates          # the dataset's validation part
    python tools/analyze_gates.py runs/moa/checkpoints data/corpus --part training --no-ablate --write-la runs/la-start

CHECKPOINT is a Megatron checkpoint of any split, dense or of experts. A TEXT is a file (of .jsonl every "text" is a
document), or the prefix of a dataset (.bin and .idx), of which --part is taken. Per layer and gate: mean, spread over
tokens, the shares of it between token types, within a type and by position, the effective rank of all of them, and the
tokens that ask most for an activation. Then the loss with coefficients replaced: by their mean, by their token type's
mean, permuted, each activation left out of the branches that are mixed, each layer alone. docs/gates.md says how to
read the results. Tables go to standard output; --out gets them as report.md, with analysis.json and pictures. Further
Megatron flags may follow.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moa.command_line.held_log import held_log
from megatron_moa.command_line.numbers import positive, seed
from megatron_moa.command_line.output_folder import written_folder
from megatron_moa.command_line.progress_bar import counting_bar
from megatron_moa.command_line.tool_flags import add_iteration_flag
from megatron_moa.command_line.trained_model import check_megatron_flags
from megatron_moa.data.corpus import read_documents
from megatron_moa.data.dataset import TRAIN, VALIDATION, check_token_ids, dataset_documents
from megatron_moa.errors import OneLineParser, UserError, has_types, one_line_errors

if TYPE_CHECKING:
    from megatron_moa.research.gates.probe import GateProbe, Recording
    from megatron_moa.trained.from_megatron import LoadedModel, PreparedCheckpoint

PROGRAM = "analyze_gates.py"
# What is kept of a training that went on.
CONTINUED = {"way": str, "seed": int, "loss": float, "iterations": int, "tokens": int, "lr": float}
_SAMPLED = 10  # random tokens whose curves are drawn


def parse_flags(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and what is left for Megatron."""
    parser = OneLineParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="what training's --save named")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="text files, JSON lines, or a dataset's prefix")
    add_iteration_flag(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for analysis.json, report.md and pictures")
    parser.add_argument("--part", choices=(TRAIN, VALIDATION), help=f"of a dataset; default: {VALIDATION}")
    parser.add_argument("--tokens", type=positive, default=65_536, metavar="N", help="at most; default: 65536")
    parser.add_argument(
        "--seed", type=seed, default=1, metavar="N", help="of documents' order, tokens drawn, permutations"
    )
    parser.add_argument(
        "--fewest", type=positive, default=20, metavar="N", help="occurrences a named token has; default: 20"
    )
    parser.add_argument(
        "--ablate", action=argparse.BooleanOptionalAction, default=True, help="whether losses are taken; default: yes"
    )
    parser.add_argument("--write-la", type=Path, metavar="FOLDER", help="for the LA whose coefficients are the means")
    parser.add_argument(
        "--continued", type=Path, metavar="FILE", help="JSON lines of examples/studies/continue_frozen.sh, to report"
    )
    return parser.parse_known_args(argv)


def prepared_checkpoint(flags: argparse.Namespace, megatron_flags: Sequence[str]) -> PreparedCheckpoint:
    """The checkpoint, of a mixture, its experts one by one.

    Raises:
        UserError: an export, a model without mixture, or what loading raises.
    """
    if (Path(flags.checkpoint) / "config.json").is_file():
        raise UserError(f"{flags.checkpoint}: is a Hugging Face folder; give the checkpoint that it was made of")
    from megatron_moa.megatron_fixes import expected_warnings  # noqa: F401  before Megatron

    # isort: split
    from megatron_moa.trained.from_megatron import prepare_checkpoint

    prepared = prepare_checkpoint(flags.checkpoint, megatron_flags, flags.iteration)
    if prepared.config.mixture is None:
        raise UserError(
            f"{flags.checkpoint}: was trained with --moa-mixing none and has no coefficients; give one of MoA or LA"
        )
    if flags.write_la and prepared.config.mixture.kind == "la":
        raise UserError(f"--write-la {flags.write_la}: {flags.checkpoint} is an LA already; drop the flag")
    if "--moa-backend" not in (word.split("=")[0] for word in megatron_flags):  # compiling takes longer than a text
        prepared.config.mixture = dataclasses.replace(prepared.config.mixture, backend="eager")
    # Hooks find experts one by one, what they return as it is used, and no rows that only fill an expert's capacity.
    prepared.config.transformer.moe_grouped_gemm = False
    prepared.config.transformer.moe_shared_expert_overlap = False
    prepared.config.transformer.moe_pad_expert_input_to_capacity = False
    return prepared


def read_texts(texts: Sequence[str], part: str | None, prepared: PreparedCheckpoint) -> tuple[str, list[list[int]]]:
    """Where the documents are from, in words, and their tokens, without the end of one.

    Raises:
        UserError: one cannot be read, or was made with another tokenizer; a part of something that has none.
    """
    datasets = [text for text in texts if Path(f"{text}.idx").is_file()]
    if part is not None and not datasets:
        raise UserError(f"--part {part}: {texts[0]} is no dataset's prefix, and a text has no parts; drop the flag")
    part = part or VALIDATION
    documents, sources = [], []
    for text in texts:
        if text in datasets:
            split = prepared.saved.split or "969,30,1"  # Megatron's default
            check_token_ids(text, prepared.vocab_size, "TEXT")
            documents += dataset_documents(text, split, part, "TEXT")
            sources.append(f"{part} part of {text}")
        else:
            documents += [prepared.tokenizer.tokenize(document) for document in read_documents(Path(text), "TEXT")]
            sources.append(text)
    return ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else ""), [
        document[:-1] if document and document[-1] == prepared.tokenizer.eod else document for document in documents
    ]


def token_texts(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Returns the texts that tokens are shown as.

    A token's text is the one in the middle of a text: a tokenizer may drop the space before the first.
    """
    from megatron_moa.research.gates.analysis import shown_token

    return [
        shown_token(loaded.decode([token, token])[len(loaded.decode([token])) :], token == loaded.end)
        for token in tokens
    ]


def analyze(
    flags: argparse.Namespace, megatron_flags: Sequence[str], la_folder: Path | None
) -> tuple[dict[str, Any], str | None]:
    """The analysis; what is said of the LA, written on the way if asked for."""
    continued = None if flags.continued is None else read_continued(flags.continued)
    prepared = prepared_checkpoint(flags, megatron_flags)
    source, documents = read_texts(flags.text, flags.part, prepared)
    # Imported here: it takes seconds, and Megatron's messages have been dealt with.
    import torch

    from megatron_moa.research.gates.analysis import finite, site_entry
    from megatron_moa.research.gates.probe import GateProbe, Windows
    from megatron_moa.research.study.runner import surroundings

    loaded = prepared.load()
    windows = Windows.of(documents, loaded.end, loaded.context, flags.tokens, flags.seed)
    probe = GateProbe(loaded, windows)
    mixture = probe.mixture
    generator = torch.Generator().manual_seed(flags.seed)
    places = torch.randperm(windows.types.numel(), generator=generator)[:_SAMPLED].sort().values.tolist()
    sampled = [divmod(place, windows.context) for place in places]
    recording = probe.record(sampled)
    shown = token_texts(loaded, windows.vocabulary.tolist())
    sites = [
        site_entry(site, mixture, statistics, shown, flags.fewest)
        for site, statistics in zip(probe.sites, recording.whole, strict=True)
    ]
    changes = probe.output_changes([statistics.expert_means() for statistics in recording.first])
    for entry, change, samples in zip(sites, changes, recording.samples, strict=True):
        entry["output_change"] = change
        entry["sampled"] = [sample.tolist() for sample in samples]
    path = Path(flags.checkpoint)
    analysis = {
        "name": path.parent.name if path.name in ("checkpoint", "checkpoints") and path.parent.name else path.name,
        "iteration": loaded.iteration,
        "mixing": {
            "mixing": mixture.kind,
            "form": mixture.form,
            "activations": list(mixture.activations),
            "gate": mixture.gate if mixture.kind == "moa" else None,
            "description": mixture.describe(),
        },
        "text": {
            "source": source,
            "documents": windows.taken,
            "tokens": windows.types.numel(),
            "types": windows.kinds,
            "windows": len(windows.tokens),
            "window": windows.context,
            "fewest": flags.fewest,
        },
        "seed": flags.seed,
        "loss": recording.losses.mean().item(),
        "sites": sites,
        "sampled_tokens": [shown[windows.types[window, position]] for window, position in sampled],
        "command": flags.command,
        **surroundings(),
    }
    if flags.ablate:
        analysis["ablation"] = ablate(probe, recording, flags.seed)
    if continued is not None:
        analysis["continued"] = continued
    said = None
    if la_folder is not None:
        said = write_la(prepared, probe, recording, la_folder, megatron_flags)
    return finite(analysis), said


def ablate(probe: GateProbe, recording: Recording, seed: int) -> dict[str, Any]:
    """The loss of the text's second half with each ablation, against the loss as it is."""
    from megatron_moa.research.gates.analysis import ablation_entry, clusters_of
    from megatron_moa.research.gates.probe import ablations

    windows = probe.windows
    unchanged = recording.losses[windows.half :]
    over, clusters = clusters_of(windows.documents[windows.half :])
    rows = []
    tried = list(ablations(probe, recording.first, seed))
    with counting_bar(len(tried), "ablations", "it") as progress:
        for ablation in tried:
            with probe.changed(ablation.change):
                losses = probe.losses(windows.half, len(windows.tokens))
            rows.append(ablation_entry(ablation, losses, unchanged, clusters))
            progress.update()
    return {
        "loss": unchanged.mean().item(),
        "windows": len(unchanged),
        "tokens": len(unchanged) * windows.context,
        "over": over,
        "clusters": len(set(clusters)),
        "rows": rows,
    }


def write_la(
    prepared: PreparedCheckpoint, probe: GateProbe, recording: Recording, folder: Path, megatron_flags: Sequence[str]
) -> str:
    """Writes the LA of the whole text's means; says how it compares.

    Raises:
        UserError: it does not compute what the model does at these means.
    """
    from megatron_moa.research.gates.collapse import write_collapsed

    means = {
        name: mean
        for site, statistics in zip(probe.sites, recording.whole, strict=True)
        for name, mean in zip(site.names, statistics.expert_means(), strict=True)
    }
    comparison = write_collapsed(prepared, probe, means, folder, ["--moa-backend", "eager", *megatron_flags])
    if not comparison.within(1e-5):
        raise UserError(f"--write-la: the LA does not compute what it should ({comparison}); nothing was written")
    return f"> wrote the LA, compared with the model at its mean coefficients: {comparison}"


def read_continued(path: Path) -> list[dict[str, Any]]:
    """The trainings that examples/studies/continue_frozen.sh has ended with.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"--continued {path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        lines = [None]
    if not all(has_types(line, CONTINUED) for line in lines):
        raise UserError(
            f"--continued {path}: is not what examples/studies/continue_frozen.sh writes; give its continued.jsonl"
        )
    if not lines:
        raise UserError(f"--continued {path}: is empty; give it when examples/studies/continue_frozen.sh has ended")
    return [{key: line[key] for key in CONTINUED} for line in lines]


def check_apart(flags: argparse.Namespace) -> None:
    """Raises UserError where one of the two folders that are written is the other, or lies in it."""
    if flags.out is None or flags.write_la is None:
        return
    out, la = flags.out.resolve(), flags.write_la.resolve()
    if out.is_relative_to(la) or la.is_relative_to(out):
        raise UserError(f"--write-la {flags.write_la}: is --out's folder, or one lies in the other; name another")


@one_line_errors(PROGRAM)
def main(argv: list[str] | None = None) -> None:
    """Analyses, writes, prints."""
    with contextlib.ExitStack() as written:
        flags, megatron_flags = parse_flags(argv)
        check_megatron_flags(flags, megatron_flags)
        check_apart(flags)
        words = sys.argv[1:] if argv is None else argv
        flags.command = shlex.join(["python", f"tools/{PROGRAM}", *words])
        out = written.enter_context(written_folder("--out", flags.out)) if flags.out else None
        la_folder = written.enter_context(written_folder("--write-la", flags.write_la)) if flags.write_la else None
        with held_log():
            analysis, said = analyze(flags, megatron_flags, la_folder)
        from megatron_moa.research.gates.analysis import gate_table, markdown
        from megatron_moa.research.gates.pictures import draw_curves, draw_gates

        report = "\n".join(markdown(analysis))
        if out is not None:
            (out / "analysis.json").write_text(json.dumps(analysis, ensure_ascii=False) + "\n")
            gates = "\n".join(gate_table(analysis))
            (out / "report.md").write_text(f"# Gates of {analysis['name']}\n\n{report}\n\n## Every gate\n\n{gates}\n")
            draw_gates(analysis, out / "gates.png")
            draw_curves(analysis, out / "curves.png")
    print(report)
    if said:
        print(said)
    for path in filter(None, (flags.out, flags.write_la)):
        print(f"> wrote {path}")


if __name__ == "__main__":
    main()
