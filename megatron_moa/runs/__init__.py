"""Reads what runs start with and leave: recipes, a tiny model's flags, the log and its curves."""
