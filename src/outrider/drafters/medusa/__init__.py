"""Medusa heads: network, drafter, checkpoint format."""
