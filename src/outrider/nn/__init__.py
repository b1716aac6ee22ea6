"""Rows and tensors: attention, masks, caches, rotary tables, fused layers. No drafting, no judging, no model family."""
