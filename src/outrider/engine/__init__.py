"""The engine: the step, sequences, the scheduler, and what builds them from paths and names."""
