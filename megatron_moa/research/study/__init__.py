"""Trains many small models that compare mixtures at their best learning rates (tools/study.py, docs/evidence.md).

Start with arms.py (what is compared), then grid.py and runner.py; report/ writes docs/evidence.md.
"""
