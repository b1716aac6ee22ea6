"""Block drafters: network, drafter, checkpoint format."""
