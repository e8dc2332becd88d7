"""Measures time, memory and errors of kernels, layers and steps for the benchmarks in tools/."""
