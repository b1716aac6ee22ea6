"""The engine: the step, sequences, the scheduler, and what they are made of."""
