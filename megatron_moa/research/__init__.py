"""Does it pay? Studies, analyses of gates, benchmarks and comparisons of runs; training imports nothing of this."""
