"""Studies: many small trainings that compare arms at their best learning rates (tools/study.py, docs/evidence.md)."""
