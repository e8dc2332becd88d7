"""Holds what arXiv 2605.26647 reports, to stand beside results.

Losses are minus the baseline's, in nats a token.
"""

from __future__ import annotations

# Dense 0.12B, 20 tokens a parameter; Type I against ReLU2, Type II against SwiGLU, every arm at its best rate.
# Table 1 has softmax gates.
TABLE_1 = {
    "la-type1": 0.003,
    "moa-type1-softmax": -0.015,
    "la-one-sided": -0.015,
    "la-bi-sided": -0.016,
    "la-quadratic": -0.004,
    "moa-one-sided-softmax": -0.011,
    "moa-bi-sided-softmax": -0.016,
    "moa-quadratic-softmax": -0.008,
}
TABLE_2 = {
    "moa-type1-softmax": -0.015,
    "moa-type1-tanh": 0.127,
    "moa-type1": -0.016,
    "moa-bi-sided-softmax": -0.016,
    "moa-bi-sided-tanh": -0.002,
    "moa-bi-sided": -0.029,
}
# Terminal validation loss, read off curves (about 0.0003 off), by model and tokens a parameter. Gates are taken to be
# sigmoid: the dense bi-sided figure is table 2's of sigmoid gates, and of MoE models the paper does not say.
ONE_SIDED, BI_SIDED, QUADRATIC = "moa-one-sided", "moa-bi-sided", "moa-quadratic"
CURVES: dict[tuple[str, int], dict[str, float]] = {
    ("dense-0.12b", 20): {ONE_SIDED: -0.013, BI_SIDED: -0.029, QUADRATIC: -0.018, "relu2": 3.2529 - 3.2637},
    ("dense-0.25b", 20): {ONE_SIDED: -0.014, BI_SIDED: -0.029, QUADRATIC: -0.023},
    ("dense-0.12b", 100): {ONE_SIDED: -0.014, QUADRATIC: -0.011},
    ("moe-0.25b", 100): {ONE_SIDED: -0.011, BI_SIDED: -0.001, QUADRATIC: -0.010},
    ("moe-0.5b", 100): {ONE_SIDED: -0.009, QUADRATIC: -0.013},
    ("moe-0.8b", 100): {ONE_SIDED: -0.011, QUADRATIC: -0.011},
    ("moe-1b", 100): {ONE_SIDED: -0.006, QUADRATIC: -0.008},
    ("moe-2b", 100): {ONE_SIDED: -0.010, QUADRATIC: -0.007},
}
# Peak learning rates that mixtures bear, as multiples of the baseline's best.
RATES_BORNE = (1.25, 2.0)
# The rows of tables 1 and 2, the baselines before what is compared with them.
ROWS = (
    "relu2",
    "la-type1",
    "moa-type1-softmax",
    "moa-type1-tanh",
    "moa-type1",
    "swiglu",
    "la-one-sided",
    "la-bi-sided",
    "la-quadratic",
    "moa-one-sided-softmax",
    "moa-bi-sided-softmax",
    "moa-quadratic-softmax",
    "moa-bi-sided-tanh",
    "moa-one-sided",
    "moa-bi-sided",
    "moa-quadratic",
)


def reported(arm: str, size: str, tokens: int) -> tuple[float, str] | None:
    """Returns the difference that the paper reports of an arm, and of which model.

    The model is this one where the paper has it, else its smallest of the kind. None where that has no such arm.

    Args:
        arm: of megatron_moa.research.study.arms; ``relu2`` is compared with SwiGLU here.
        size: of a study; the paper's models have the names of examples/models, with ``_`` or ``.``.
        tokens: of the training.
    """
    model = size.replace("_", ".")
    if model.startswith("moe"):
        known = CURVES.get((model, 100), CURVES["moe-0.25b", 100])
        where = model if (model, 100) in CURVES else "moe-0.25b"
        return (known[arm], f"{where}, curve") if arm in known else None
    per_parameter = 100 if model == "dense-0.12b" and tokens > 6e9 else 20
    if (model, per_parameter) in CURVES and (model, per_parameter) != ("dense-0.12b", 20):
        known = CURVES[model, per_parameter]
        return (known[arm], f"{model}, {per_parameter} tokens a parameter, curve") if arm in known else None
    for table, where in ((TABLE_1, "table 1"), (TABLE_2, "table 2"), (CURVES["dense-0.12b", 20], "curve")):
        if arm in table:
            return table[arm], f"dense-0.12b, {where}"
    return None
