"""Growing trees of draft tokens and drawing their tokens."""
