"""Measurements, one claim a file: `python -m benchmarks.NAME` prints a table and writes a JSON."""
