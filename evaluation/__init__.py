"""Benchmarks. Run them with `python dev.py bench`."""
