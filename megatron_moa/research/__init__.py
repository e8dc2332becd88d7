"""Answers whether the mixture pays: studies, analyses of gates, benchmarks, comparisons of runs.

The fault drill is here, too. No training imports this package.
"""
