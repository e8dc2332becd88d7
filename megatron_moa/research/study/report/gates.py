"""Writes what the gates of trained models do."""

from __future__ import annotations

from megatron_moa.research.study.report.material import Lines, Material


def trained_gates(study: Material) -> Lines:
    """Writes the analysis of gates, model by model, where there is one."""
    if not study.evidence.gates:
        return
    from megatron_moa.research.gates.analysis import as_written, beside_one_another, markdown
    from megatron_moa.research.gates.pictures import draw_curves

    yield "## Trained gates\n"
    if len(study.evidence.gates) > 1:
        yield from beside_one_another(study.evidence.gates)
        yield ""
    for number, (name, content) in enumerate(study.evidence.gates.items()):
        yield f"### {name}\n"
        yield from markdown(content, explained=number == 0)
        file = f"gates-{name}.png"
        with as_written(f"gates-{name}.json"):
            draw_curves(content, study.pictures / file)
        yield ""
        yield "Each layer's activations at the mean coefficients (black) and at those of random tokens:\n"
        yield f"![activations of {name}]({study.link}/{file})\n"
