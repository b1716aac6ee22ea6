"""Training of language-model pairs and of learned drafters: corpus, losses, one resumable loop, safetensors checkpoints."""

from outrider.moved import names_of

__getattr__ = names_of(__name__)
