"""Training of language-model pairs: corpus, losses, one resumable loop, safetensors checkpoints."""
