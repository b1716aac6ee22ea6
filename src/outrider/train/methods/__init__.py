"""Learned methods: one module each, and their table, `registry`."""
