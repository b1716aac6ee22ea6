"""Paired benchmarks and their pages."""
