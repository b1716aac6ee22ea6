"""A/B experiments, on prompts and on live traffic."""
