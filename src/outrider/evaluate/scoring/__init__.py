"""Texts read by a model in one teacher-forced pass, and what that says."""
