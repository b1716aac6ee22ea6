"""Measurement: workloads, paired and interleaved arms, intervals, certificates."""
