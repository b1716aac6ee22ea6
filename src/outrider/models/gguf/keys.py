"""The keys of a GGUF file behind the name of its architecture."""

from __future__ import annotations

from outrider.config_keys import flag, real, whole
from outrider.errors import ConfigError
from outrider.models.gguf.weights import Weights


class Keys:
    """The keys of a model's architecture, each bounded when it is read. path: the file, for messages."""

    def __init__(self, weights: Weights) -> None:
        self.path, self.values = weights.path, weights.values
        self._prefix = f"{weights.value('general.architecture')}."

    def name(self, key: str) -> str:
        return self._prefix + key

    def given(self, key: str) -> bool:
        return self.name(key) in self.values

    def check(self, known: frozenset[str]) -> None:
        """Refuse keys that are not known, and values of known ones that mean another network."""
        for key in self.values:
            if key.startswith(self._prefix) and key.removeprefix(self._prefix) not in known:
                raise ConfigError(
                    f"{self.path} has the key {key[:120]}, which is not known to be without effect: use another model"
                )
        if flag(self.values, self.name("use_parallel_residual"), self.path):
            raise ConfigError(f"{self.path} has parallel residuals, which are not read: use another model")
        if not flag(self.values, self.name("attention.causal"), self.path, True):
            raise ConfigError(f"{self.path} is an encoder, in which a token sees what follows it: use a causal model")

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 26) -> int:
        return whole(self.values, self.name(key), self.path, default=default, least=least, most=most)

    def real(self, key: str, default: float | None = None, *, least: float | None = None, most: float = 1e12) -> float:
        return real(self.values, self.name(key), self.path, default, least=least, most=most)

    def same(self, key: str, default: int | None = None) -> int:
        """A number that a file may give for every layer, if it is the same for all."""
        value = self.values.get(self.name(key))
        if isinstance(value, tuple) and value:
            if len(set(value)) > 1:
                raise ConfigError(
                    f"{self.path}: {self.name(key)} differs between layers, which is not read: use another model"
                )
            return whole({key: value[0]}, key, self.path, most=1 << 26)
        return self.whole(key, default)
