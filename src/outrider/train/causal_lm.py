"""The type that training uses for a language model."""

from typing import Any, TypeAlias

CausalLM: TypeAlias = Any
"""A transformers causal language model: its parts are attributes that static types do not know."""
