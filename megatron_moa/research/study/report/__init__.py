"""Writes a study's report: what is shown, what is not, and the effect of each choice.

Start with write.py, which puts the chapters in order; every other module but material.py and words.py writes one of
them, or two.
"""
