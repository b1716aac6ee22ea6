"""Benchmarks: presets, charts, reports, and whether a run holds its baseline."""
