"""Targets: the models whose distribution is preserved. `load.load_target` makes one from a folder or a Hub name; `lean` and `hf`
are twins."""
