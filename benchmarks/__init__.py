"""Measured claims: modules that are commands, `python -m benchmarks.NAME`, print a table and write `results/NAME*.json`.

`record`, `rows`, `timing` and `layers` are what they share.
"""
