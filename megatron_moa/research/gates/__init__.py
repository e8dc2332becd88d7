"""Analyses what the gates of a trained model do on a text (tools/analyze_gates.py, docs/gates.md).

Start with probe.py, which records coefficients and takes losses with others in their place.
"""
