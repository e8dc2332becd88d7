"""Does it pay? Studies, analyses of gates, benchmarks, comparisons of runs, the fault drill. No training imports it."""
