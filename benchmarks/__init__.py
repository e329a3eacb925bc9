"""Measured claims: modules that are commands, `python -m benchmarks.NAME`, print a table and write `results/NAME*.json`.

Several share `record` (result files), `rows` and `timing`; `random_models`, `jobs` and `stock_engine` (engines on models of true
widths); `refill_rig` and `refill_engine` (weight syncs). `layers` and `floors` are parts of `kernels`; any other part begins with
its command's name.
"""
