"""Ratios, intervals and sequential tests of measurements."""
