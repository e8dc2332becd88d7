"""Estimates what a training needs before it runs, and splits it over GPUs (docs/planning.md).

A training needs parameters, memory, communication and time.

Letters: h hidden size, f a feed-forward layer's width, V vocabulary, n mixing coefficients, s sequence length, b
micro-batch size, m micro-batches a step, p tensor-parallel ranks, t tokens of a micro-batch on a rank where the
sequence is whole (s b over context parallelism), u where it is cut (t/p: sequence parallelism is on), e bytes of an
element.
"""
