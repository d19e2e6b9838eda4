"""Whole markets on one machine, for demo, tests and benchmarks."""
