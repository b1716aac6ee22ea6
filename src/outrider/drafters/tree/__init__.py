"""Trees of drafts: their shapes, how they grow, and how tokens are drawn."""
