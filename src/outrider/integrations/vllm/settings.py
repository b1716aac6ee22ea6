"""What a user sets for Outrider inside vLLM: `--additional-config '{"outrider": {...}}'`.

vLLM hands this dictionary to every process of a server, so drafter, scheduler, worker and endpoint read the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, no_type_check

from outrider.errors import ConfigError, unknown_name
from outrider.verify.registry import load_rule

KEY = "outrider"
"""Our part of vLLM's `additional_config`."""
LENGTHS = ("adaptive", "fixed")
MOST = 128
"""vLLM verifies at most this many draft tokens of a request in one step."""


@no_type_check  # its own checks give the messages for users; a type checker in tests must not raise first
@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one server. Every field is checked on construction; a bad one raises ConfigError.

    draft:     what `Proposer` drafts with: a spec of `load_drafter` ("ngram", "prediction+ngram", "greedy:FOLDER", ...).
    lengths:   "adaptive": the controller sets the draft length from load, acceptance and step times; "fixed": always vLLM's own
               number; or a list of lengths that are used one after another, for tests.
    first:     the adaptive length before anything is measured; None: vLLM's `num_speculative_tokens`.
    margin:    gain below which the adaptive length stays as it is, 0 to 1.
    rule:      "vllm": its own rejection sampler, which our ledger watches; or one of our rules in its place, as `load_rule` names
               it: "tv_budget:per_token=0.05,per_sequence=1" and the other lossy ones count the total variation that they spend.
    allow_lossy: whether the rule may change the distribution of the output.
    price:     dollars per hour of the machine, for the page; None: unknown.
    """

    draft: str = "ngram"
    lengths: str | Sequence[int] = "adaptive"
    first: int | None = None
    margin: float = 0.03
    rule: str = "vllm"
    allow_lossy: bool = False
    price: float | None = None

    def __post_init__(self) -> None:
        for name in ("draft", "rule"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{KEY}.{name} must be a text, got {getattr(self, name)!r}")
        if not isinstance(self.allow_lossy, bool):
            raise ConfigError(f"{KEY}.allow_lossy must be true or false, got {self.allow_lossy!r}")
        if self.rule != "vllm" and not load_rule(self.rule).lossless and not self.allow_lossy:
            raise ConfigError(
                f'rule {self.rule!r} changes the distribution of the output: add "allow_lossy": true if that is what you want'
            )
        for name, most in (("margin", 1.0), ("price", 1e9)):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
            if not good and not (name == "price" and value is None):
                raise ConfigError(f"{KEY}.{name} must be a number from 0 to {most:g}, got {value!r}")
        if self.first is not None and not _is_length(self.first):
            raise ConfigError(f"{KEY}.first must be a whole number from 0 to {MOST}, got {self.first!r}")
        self._check_lengths()

    def _check_lengths(self) -> None:
        if isinstance(self.lengths, str):
            if self.lengths not in LENGTHS:
                raise ConfigError(unknown_name(f"{KEY}.lengths", self.lengths, LENGTHS))
        elif not isinstance(self.lengths, list | tuple) or not self.lengths or not all(map(_is_length, self.lengths)):
            raise ConfigError(
                f"{KEY}.lengths must be 'adaptive', 'fixed' or a list of whole numbers from 0 to {MOST}, got {self.lengths!r}"
            )

    @staticmethod
    def of(additional: object) -> Settings:
        """The settings in vLLM's `additional_config`; defaults if it has none. Raises ConfigError naming a wrong key."""
        own = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
        if not isinstance(own, Mapping):
            raise ConfigError(f"{KEY} in --additional-config must be an object, got {own!r}")
        known = [f.name for f in fields(Settings)]
        for name in own:
            if name not in known:
                raise ConfigError(unknown_name(f"setting of {KEY}", str(name), known))
        return Settings(**own)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
