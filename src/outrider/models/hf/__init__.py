"""Unmodified models of transformers as targets."""
