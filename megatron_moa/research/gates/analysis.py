"""Turns what was recorded of a model's gates into JSON, and that into tables and sentences.

:func:`site_entry` and :func:`ablation_entry` make the JSON of what probe.py has recorded; :func:`markdown` and
:func:`gate_table` tell it, from the JSON alone. docs/gates.md says how to read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moa.command_line.tables import markdown_table
from megatron_moa.errors import UserError, one_line
from megatron_moa.training.gate_statistics import FEWEST_DOCUMENTS, GateStatistics, paired_interval

if TYPE_CHECKING:
    from megatron_moa.mixture.config import MixtureConfig
    from megatron_moa.research.gates.probe import Ablation, Site

_SHOWN = 5  # tokens that ask most for an activation
_COLUMNS = (
    "Medians over a branch's gates (of the means, their range). Shares are of a gate's variance over tokens: "
    "between token types (corrected for types with few occurrences), the rest within a type, which is the "
    "context's; by position in the window. Rank: effective rank and participation ratio of the centred "
    "tokens-by-coefficients matrix. Output: relative change of the layer's output when its coefficients are "
    "replaced by their mean."
)
_NOT_SHOWN = (
    "Not shown: this is one trained model on one text; its intervals are of the text, not of other seeds, sizes or "
    "data. An ablation says what the trained model uses, not what a model trained without it would lose: there the "
    "other weights would have adapted."
)


# The JSON.


def finite(value: Any) -> Any:
    """JSON's way: NaN and infinities become None, everywhere in a structure; numbers keep six digits."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def site_entry(
    site: Site, mixture: MixtureConfig, statistics: GateStatistics, tokens: Sequence[str], fewest: int
) -> dict[str, Any]:
    """What is said of one layer.

    Args:
        site: which.
        mixture: the model's.
        statistics: of its coefficients.
        tokens: how each type is shown.
        fewest: occurrences a type needs to be named among those that ask most for an activation.
    """
    mean, std = statistics.mean, statistics.variance.sqrt()
    shares = {
        "type_share": statistics.share_between(statistics.by_type),
        "type_share_naive": statistics.share_between(statistics.by_type, corrected=False),
        "position_share": statistics.share_between(statistics.by_position),
    }
    shares["context_share"] = 1 - shares["type_share"]
    if len(site.modules) > 1:
        shares["expert_share"] = statistics.share_between(statistics.by_expert)
    means, counts = statistics.by_type.means(), statistics.by_type.counts
    often = (counts >= fewest).nonzero()[:, 0]
    gates = []
    for k, name in enumerate(mixture.coefficient_names):
        order = often[means[often, k].argsort(descending=True)].tolist()
        named = [{"token": tokens[i], "count": int(counts[i]), "mean": means[i, k].item()} for i in order]
        gates.append(
            {
                "name": name,
                "mean": mean[k].item(),
                "std": std[k].item(),
                "std_over_mean": (std[k] / mean[k].abs()).item(),
                **{share: values[k].item() for share, values in shares.items()},
                "most": named[:_SHOWN] if std[k] > 0 else [],
                "least": named[::-1][:_SHOWN] if std[k] > 0 else [],
            }
        )
    return {
        "layer": site.layer,
        "kind": site.kind,
        "title": site.title,
        "experts": len(site.modules),
        "tokens": int(statistics.count),
        "coefficients": len(gates),
        "effective_rank": statistics.effective_rank(),
        "participation_ratio": statistics.participation_ratio(),
        "gates": gates,
    }


def ablation_entry(ablation: Ablation, losses: Tensor, unchanged: Tensor, clusters: Sequence[int]) -> dict[str, Any]:
    """An ablation's difference to the model as it is, on the same windows, with its interval."""
    interval = paired_interval((losses - unchanged).tolist(), clusters)
    return {
        "name": ablation.name,
        "kind": ablation.kind,
        **ablation.about,
        "loss": losses.mean().item(),
        "difference": interval.mean,
        "interval": [interval.low, interval.high],
    }


def clusters_of(documents: Sequence[int]) -> tuple[str, list[int]]:
    """What an interval is taken over, and each window's part of it: documents where there are enough."""
    if len(set(documents)) >= FEWEST_DOCUMENTS:
        return "documents", list(documents)
    return "windows", list(range(len(documents)))


def shown_token(text: str, end: bool = False) -> str:
    """A token so that whitespace can be read: in quotes, with escapes."""
    return "end of document" if end else json.dumps(text, ensure_ascii=False)


# In words.


@contextmanager
def as_written(file: str | Path) -> Iterator[None]:
    """Around what tells or draws an analysis read from a file.

    Raises:
        UserError: it holds something else than tools/analyze_gates.py writes.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: is not what tools/analyze_gates.py writes ({one_line(error, typed=True)}); copy its "
            "analysis.json there"
        ) from None


def beside_one_another(analyses: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: a row a model, what its gates do and what it loses without that.

    Args:
        analyses: as tools/analyze_gates.py writes them, by name.
    """
    kinds = {"mean": "at their means", "type mean": "at their types' means", "permuted": "permuted"}
    table = []
    for name, analysis in analyses.items():
        sites = analysis["sites"]
        ranks = [site["effective_rank"] for site in sites if site["effective_rank"] is not None]
        of = max(site["coefficients"] for site in sites)
        cells = [name, _median([gate for site in sites for gate in site["gates"]], "type_share", "%")]
        cells.append(f"{min(ranks):.1f} to {max(ranks):.1f} of {of}" if ranks else "-")
        ablation = analysis.get("ablation") or {"rows": []}
        cells.append(f"{ablation['loss']:.4f}" if "loss" in ablation else "")
        rows = {row["kind"]: row for row in ablation["rows"]}
        table.append([*cells, *(change(rows[kind]) if kind in rows else "" for kind in kinds)])
    yield markdown_table(["model", "between types", "rank", "loss", *kinds.values()], table)
    yield ""
    yield (
        "Between types: the median share, over all gates. Rank: the effective one, over layers. Differences to the "
        "loss as it is, with a 95 % interval over the text."
    )


def markdown(analysis: dict[str, Any], explained: bool = True) -> Iterator[str]:
    """Yields an analysis as lines of Markdown.

    First what was analysed, then a table of the layers, the ablations with their intervals, training continued, and
    what all that does not show.

    Args:
        analysis: as tools/analyze_gates.py writes it.
        explained: whether it is said what the columns are, and what is not shown.
    """
    text, model = analysis["text"], analysis["mixing"]
    yield f"Model: {model['description']}; {analysis['name']}, iteration {analysis['iteration']:,}."
    yield (
        f"Text: {text['tokens']:,} tokens of {text['documents']} documents ({text['source']}), {text['types']:,} "
        f"different ones, in {text['windows']} windows of {text['window']}."
    )
    yield f"`{analysis['command']}` on {analysis['machine']}, {analysis['date']}."
    yield ""
    yield from _layer_table(analysis)
    if explained:
        yield ""
        yield _COLUMNS
    if model["mixing"] == "la":
        yield ""
        yield "LA: the coefficients are the same for every token, so nothing varies and there is no gate to analyse."
    if analysis.get("ablation"):
        yield ""
        yield from _ablation_table(analysis["ablation"], model)
    if analysis.get("continued"):
        yield ""
        yield from _continued_table(analysis["continued"])
    if explained:
        yield ""
        yield _NOT_SHOWN
    if not analysis.get("continued"):
        yield ""
        yield "Training on with frozen or collapsed gates was not run for this model."


def _layer_table(analysis: dict[str, Any]) -> Iterator[str]:
    """A row a layer and branch: medians over the branch's gates."""
    shares = {"type_share": "between types", "context_share": "within a type", "position_share": "by position"}
    if any(site["experts"] > 1 for site in analysis["sites"]):
        shares["expert_share"] = "between experts"
    titles = ["layer", "branch", "mean", "std/\\|mean\\|", *shares.values(), "rank", "output"]
    table = []
    for site in analysis["sites"]:
        rank = f"{site['effective_rank']:.1f} / {site['participation_ratio']:.1f} of {site['coefficients']}"
        for number, (branch, gates) in enumerate(_branches(site["gates"], analysis["mixing"]["form"]).items()):
            means = [gate["mean"] for gate in gates]
            cells = [site["title"], branch, f"{min(means):.2f} to {max(means):.2f}", _median(gates, "std_over_mean")]
            cells += [_median(gates, share, "%") for share in shares]
            table.append([*cells, *((rank, _percent(site["output_change"])) if number == 0 else ("", ""))])
    yield markdown_table(titles, table)


def gate_table(analysis: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: a row a gate, and the tokens that ask most and least for its activation."""
    table = []
    for site in analysis["sites"]:
        for gate in site["gates"]:
            between = f"{_percent(gate['type_share'])} ({_percent(gate['type_share_naive'])})"
            cells = [site["title"], gate["name"], f"{gate['mean']:.3f}", f"{gate['std']:.3f}", between]
            cells += [_percent(gate["context_share"]), _percent(gate["position_share"])]
            table.append([*cells, _tokens(gate["most"]), _tokens(gate["least"])])
    titles = "layer, gate, mean, std, between types (naive), within, position, asks most, asks least"
    yield markdown_table(titles.split(", "), table)
    yield ""
    fewest = analysis["text"]["fewest"]
    yield (
        f"Tokens with at least {fewest} occurrences by their mean coefficient, in brackets how often they occur. A "
        "quoted token shows its spaces and line ends."
    )


def _ablation_table(ablation: dict[str, Any], model: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Loss as it is: {ablation['loss']:.4f} nats a token, on the {ablation['windows']} windows of the text's "
        "second half; means are of its first half. Differences to that, on the same tokens, with a 95 % interval "
        f"(Student's t over {ablation['clusters']} {ablation['over']}):"
    )
    yield ""
    table = [(row["name"], f"{row['difference']:+.4f}", _interval(row["interval"])) for row in ablation["rows"]]
    yield markdown_table(["coefficients", "difference", "95 % interval"], table)
    if model["mixing"] != "moa":
        return
    by_kind = {row["kind"]: row for row in ablation["rows"]}
    yield ""
    yield _verdict("Taking its variation from token to token from the trained model", by_kind["mean"])
    yield _verdict("Leaving it what depends on the token's type alone", by_kind["type mean"])


def _verdict(what: str, row: dict[str, Any]) -> str:
    low, high = row["interval"]
    if low is None:
        return f"{what} changes the loss by {row['difference']:+.4f}; one cluster, so there is no interval."
    if low > 0:
        return f"{what} costs {row['difference']:.4f} nats ({low:.4f} to {high:.4f})."
    if high < 0:
        return f"{what} gains {-row['difference']:.4f} nats ({-high:.4f} to {-low:.4f})."
    return f"{what} makes no difference that these tokens show ({low:+.4f} to {high:+.4f} nats)."


# Ways of training on, as examples/studies/continue_frozen.sh names them.
WAYS = {"gates": "its gates train on", "frozen": "its gates frozen", "la": "collapsed to LA, which trains on"}


def continued_summary(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the mean loss of each way of training on, and its difference to training on as it is.

    The difference is by paired seeds, with its interval.

    Args:
        lines: ``way``, ``seed`` and ``loss``, one a training.
    """
    losses = {(line["way"], line["seed"]): line["loss"] for line in lines}
    summary = []
    for way in WAYS:
        seeds = sorted(seed for other, seed in losses if other == way)
        entry = {"way": way, "seeds": seeds}
        if seeds:
            entry["loss"] = sum(losses[way, seed] for seed in seeds) / len(seeds)
        paired = [seed for seed in seeds if ("gates", seed) in losses]
        if way != "gates" and paired:
            interval = paired_interval([losses[way, seed] - losses["gates", seed] for seed in paired], paired)
            entry |= {"difference": interval.mean, "interval": [interval.low, interval.high]}
        summary.append(finite(entry))
    return summary


def _continued_table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    plans = sorted({(line["iterations"], line["tokens"], line["lr"]) for line in lines})
    lengths = ", or ".join(f"{steps} iterations ({tokens:,} tokens) from rate {lr:g}" for steps, tokens, lr in plans)
    yield (
        f"Trained on by `examples/studies/continue_frozen.sh` for {lengths}, every way with a new optimizer, the same "
        "schedule and the same data in the same order; validation loss, and the difference to training on as it is by "
        "paired seeds with a 95 % interval (Student's t):"
    )
    yield ""
    table = []
    for entry in continued_summary(lines):
        if not entry["seeds"]:
            continue
        difference = f"{entry['difference']:+.4f}" if "difference" in entry else ""
        interval = _interval(entry["interval"]) if "interval" in entry else ""
        table.append([WAYS[entry["way"]], len(entry["seeds"]), f"{entry['loss']:.4f}", difference, interval])
    yield markdown_table(["way", "seeds", "loss", "difference", "95 % interval"], table)


def _branches(gates: Sequence[dict[str, Any]], form: str) -> dict[str, list[dict[str, Any]]]:
    if form != "bi-sided":
        return {{"type1": "activated", "one-sided": "linear", "quadratic": "both"}[form]: list(gates)}
    half = len(gates) // 2
    return {"activated": list(gates[:half]), "linear": list(gates[half:])}


def _median(gates: Sequence[dict[str, Any]], key: str, unit: str = "") -> str:
    values = [gate[key] for gate in gates if gate.get(key) is not None]
    if not values:
        return "-"
    median = torch.tensor(values, dtype=torch.float64).quantile(0.5).item()
    return _percent(median) if unit else f"{median:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def change(row: dict[str, Any]) -> str:
    """A difference and its interval; the limits are None where they are not known."""
    low, high = row["interval"]
    return f"{row['difference']:+.4f}" + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")


def _interval(limits: Sequence[float | None]) -> str:
    return "-" if limits[0] is None else f"{limits[0]:+.4f} to {limits[1]:+.4f}"


def _tokens(entries: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{_code(entry['token'])} ({entry['count']})" for entry in entries[:3])


def _code(text: str) -> str:
    """As code in a table's cell."""
    fence = "`" * (1 + max((len(run) for run in _backticks(text)), default=0))
    padding = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{padding}{text.replace('|', chr(92) + '|')}{padding}{fence}"


def _backticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split(" ") if run]
