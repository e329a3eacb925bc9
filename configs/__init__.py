"""Hydra groups. A regular package, because `pkg://qarl.configs` needs one."""
