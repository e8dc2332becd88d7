"""Does to small training runs what clusters do to large ones.

tools/fault_drill.py runs it, docs/reliability.md describes it. Start with drill.py, which trains the undisturbed run,
then kills.py and faults.py; run.py puts them in order.
"""
