"""Draft trees: their shapes, how they grow, and how tokens are drawn."""
