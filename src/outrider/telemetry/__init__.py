"""Measurements of a run: counters, sinks and the ledger."""
