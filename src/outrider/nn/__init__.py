"""Rows and tensors: attention, caches, rotary positions, linear layers. Knows no drafting, no verification and no model family."""
