"""Measured claims: each module is a command, `python -m benchmarks.NAME`, that prints a table and writes `results/NAME*.json`."""
