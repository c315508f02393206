"""Parallel: what this machine is, and what `auto` means on it."""
