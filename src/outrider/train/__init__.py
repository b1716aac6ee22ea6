"""Training of language-model pairs and of learned drafters: corpus, losses, one resumable loop, safetensors checkpoints."""
