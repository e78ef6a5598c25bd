"""Benchmarks: `python -m sla.benchmark NAME`."""
