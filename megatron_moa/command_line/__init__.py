"""How every command behaves: flags, their checks, one-line errors, output files and progress.

Start with flags.py (this project's flags) and megatron_flags.py (what each flag of Megatron decides).
"""
