"""Writes the results of one setting, arm by arm."""

from __future__ import annotations

from megatron_moa.research.study.pictures import anchor, arm_title, draw_differences, draw_rates
from megatron_moa.research.study.report.effects import steps_of
from megatron_moa.research.study.report.material import Lines, Material
from megatron_moa.research.study.report.words import difference_text, loss_text, table, verdict_text
from megatron_moa.research.study.statistics import BASELINE, Setting


def one_setting(study: Material, setting: Setting, title: str, steps: bool = False) -> Lines:
    """Writes a setting's table and pictures, and its steps on request."""
    yield f"## {title}\n"
    if study.results.tuned(setting, BASELINE) is None:
        yield "SwiGLU has no finished run here: nothing to take differences to.\n"
    rows = [["arm", "best rate", "rates tried: loss", "seeds", "loss", "minus SwiGLU's", "is"]]
    for arm in study.results.arms(setting):
        tuned = study.results.tuned(setting, arm)
        if tuned is None:
            rows.append([arm_title(arm), "none", f"no finite loss of seed {study.results.tuning_seed}", *[""] * 4])
            continue
        known = None if arm == BASELINE else study.results.difference(setting, arm, BASELINE)
        rates = ", ".join(f"{rate:g}: {loss_text(loss)}" for rate, loss in tuned.rates.items())
        seeds = " ".join(map(str, tuned.losses))
        seeds += "".join(f" ({seed} diverged)" for seed in tuned.diverged)
        end = "" if tuned.inside else ", **the only one**" if len(tuned.rates) == 1 else ", **at the end**"
        verdict = "" if known is None else verdict_text(known.verdict)
        difference = "" if known is None else difference_text(known)
        rows.append(
            [arm_title(arm), f"{tuned.rate:g}{end}", rates, seeds, f"{tuned.loss.mean:.4f}", difference, verdict]
        )
    yield from table(rows)
    if setting == study.main and len(study.tuned(setting)) > 1 and study.results.tuned(setting, BASELINE):
        yield from study.picture("differences.png", "difference to SwiGLU", draw_differences, setting)
    if any(len(tuned.rates) > 1 for tuned in study.tuned(setting)):
        yield from study.picture(f"rates-{anchor(setting)}.png", "loss against learning rate", draw_rates, setting)
    if steps:
        yield from steps_of(study, setting)
