"""EAGLE-1 to 3: network, drafter, checkpoint formats."""
