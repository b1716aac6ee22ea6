"""Intervals and evidence: plain arrays in, numbers out."""
