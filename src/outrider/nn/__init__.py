"""Rows and tensors: attention, caches, rotary positions, linear layers. Independent of drafting, rules and model families."""
