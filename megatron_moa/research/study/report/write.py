"""Writes a study's report as markdown, chapter by chapter."""

from __future__ import annotations

from pathlib import Path

from megatron_moa.research.study.evidence import Evidence
from megatron_moa.research.study.pictures import setting_title
from megatron_moa.research.study.report.claims import papers_claims
from megatron_moa.research.study.report.effects import effects_of_choices, settings_beside_one_another
from megatron_moa.research.study.report.gates import trained_gates
from megatron_moa.research.study.report.growth import against_parameters, against_steps, against_tokens_and_time
from megatron_moa.research.study.report.learning_rates import larger_rates
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.scope import not_shown, what_was_run
from megatron_moa.research.study.report.settings import one_setting
from megatron_moa.research.study.report.summary import beside_the_paper, in_short


def report(evidence: Evidence, command: str, pictures: Path, link: str) -> str:
    """Returns the whole text; its pictures are drawn on the way.

    Args:
        command: that writes this report.
        pictures: an empty folder to draw into.
        link: that folder, as seen from the text.

    Returns:
        Markdown, the same for the same evidence.
    """
    return "\n".join(_chapters(Material(evidence, pictures, link), command)) + "\n"


def _chapters(study: Material, command: str) -> Lines:
    yield "# Does it pay? Mixtures of activations against tuned baselines\n"
    yield f"Written by `{command}` from the lines of finished runs; edit nothing here.\n"
    yield from in_short(study)
    yield from papers_claims(study)
    yield from beside_the_paper(study)
    yield from what_was_run(study)
    yield from not_shown(study)
    yield from effects_of_choices(study)
    yield from settings_beside_one_another(study)
    yield from one_setting(study, study.main, "The main setting, arm by arm")
    yield from larger_rates(study)
    yield from against_tokens_and_time(study)
    yield from against_steps(study)
    yield from against_parameters(study)
    yield from trained_gates(study)
    others = [setting for setting in study.results.settings if setting != study.main]
    for setting in others:
        yield from one_setting(study, setting, setting_title(setting), steps=True)
