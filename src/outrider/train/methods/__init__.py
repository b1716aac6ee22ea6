"""Learned methods: a module each, and `registry`, their table."""
