"""Training of language-model pairs and learned drafters: corpus, losses, one resumable loop, safetensors checkpoints."""
