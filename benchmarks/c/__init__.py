"""Figures of libnsn itself, without Python: `python -m benchmarks.c`."""
