"""A language model as a drafter."""
