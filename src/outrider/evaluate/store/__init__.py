"""Runs and experiments on disk."""
