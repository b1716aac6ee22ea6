"""Targets: the models whose law is kept. `load.load_target` makes one from a folder or a Hub name; `lean` and `hf`
are twins."""
