"""What a run is started with and what it leaves: recipes, a tiny model's flags, the log and the curves in it."""
