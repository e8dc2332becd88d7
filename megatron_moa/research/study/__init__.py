"""Trains many small models that compare mixtures at their best learning rates.

tools/study.py runs it. Start with arms.py (what is compared), then grid.py and runner.py; report/ writes
docs/evidence.md.
"""
