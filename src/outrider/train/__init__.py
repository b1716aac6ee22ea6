"""Training of language-model pairs: corpus, losses, one resumable loop, safetensors checkpoints."""

from typing import Any, TypeAlias

CausalLM: TypeAlias = Any
"""A transformers causal language model: its parts are attributes that static types do not know."""
