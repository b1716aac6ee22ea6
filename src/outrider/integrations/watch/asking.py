"""Requests of the watch itself, within a budget of tokens: their acceptance predicts other draft lengths, their texts are
audited."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import monotonic
from typing import Any

from outrider.errors import ConfigError
from outrider.evaluate.audit.alternatives import Candidates
from outrider.evaluate.audit.audit import Auditor
from outrider.evaluate.audit.findings import NOT_THE_TARGET, AuditResult, as_document
from outrider.evaluate.audit.sources import Emission, Endpoint, read_choice, request_body
from outrider.integrations.watch import ANSWERS
from outrider.integrations.watch.acceptance import Acceptance, of_reply, predict
from outrider.integrations.watch.figures import finite
from outrider.integrations.watch.replayed import beside, text_of
from outrider.params import SamplingParams
from outrider.theory.replay import Text

KEPT = 2000
"""Requests whose acceptance is kept."""
PATIENCE = 10
"""Requests in a row that may fail before no more are sent."""
SPEC_FIELDS: dict[str, dict[str, Any]] = {"SGLang": {"return_spec_tokens_details": True}}
"""Fields by which an engine is asked for a request's acceptance; the others send it without being asked, or only where they are so
started (vLLM: --per-request-spec-decode-metrics detailed)."""


@dataclass(slots=True)
class Budget:
    """Tokens that our requests may generate. total: in all. per_minute: at most so many in any minute, on average."""

    total: int
    per_minute: float
    clock: Callable[[], float] = monotonic
    spent: int = 0
    _began: float | None = None

    def wait(self, tokens: int) -> float | None:
        """Seconds until `tokens` more may be asked for: 0 for now, None for never."""
        if self.spent + tokens > self.total:
            return None
        self._began = self.clock() if self._began is None else self._began
        return max(0.0, 60.0 * self.spent / self.per_minute - (self.clock() - self._began))


@dataclass(slots=True)
class Asking:
    """Asks one server, a prompt at a time, and judges what it gets.

    prompts: texts, or token ids where there is an auditor. params: of every request. extra, leave_out: fields for this engine.
    samples: continuations of a prompt. say: told what ends it.
    """

    endpoint: Endpoint
    prompts: Sequence[str] | Sequence[list[int]]
    params: SamplingParams
    budget: Budget
    auditor: Auditor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    samples: int = ANSWERS
    say: Callable[[str], object] = lambda sentence: None
    requests: list[Acceptance] = field(default_factory=list)
    answered: int = 0
    tokens: int = 0
    failed: int = 0
    last_error: str | None = None
    ended: str | None = None
    verdict: AuditResult | None = None
    replayed: list[tuple[Text, Acceptance]] = field(default_factory=list)
    _silent: int = 0
    _seeds: Any = field(default_factory=lambda: itertools.count(1))
    _turn: Any = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ConfigError("requests of the watch need at least one prompt: --prompts")
        self._turn = itertools.cycle(self.prompts)

    @property
    def accused(self) -> bool:
        return self.verdict is not None and self.verdict.outcome == NOT_THE_TARGET

    def step(self) -> float | None:
        """Ask for the continuations of the next prompt, if the budget allows; seconds until the next step, None when it is over.
        Its tokens are charged before they are asked for, and what was not generated is given back."""
        most = self.samples * self.params.max_tokens
        wait = self.budget.wait(most) if self.ended is None else None
        if wait is None:
            self.end(f"the budget of {self.budget.total} tokens is spent")
            return None
        if wait > 0:
            return wait
        prompt, replies = next(self._turn), list[tuple[Emission, Acceptance | None]]()
        for _ in range(self.samples):
            self.budget.spent += self.params.max_tokens
            replies.append(self._one(prompt))
            if self.ended is not None:
                return None
        if self.auditor is not None and not isinstance(prompt, str):
            self._judge(self.auditor, prompt, replies)
        return 0.0

    def _judge(self, auditor: Auditor, prompt: list[int], replies: list[tuple[Emission, Acceptance | None]]) -> None:
        """Audit the texts of one prompt; where a draft model is known, keep what its replay needs."""
        for i, (emission, found) in enumerate(replies):
            logs = list[Text]()
            if auditor.draft is not None:
                auditor.seen = lambda scored, output, logs=logs: logs.append(self._log(scored, output))
            auditor.add(prompt, emission, [e.tokens for e, _ in replies[:i]])
            if logs and found is not None and len(self.replayed) < KEPT:
                self.replayed.append((logs[0], found))
        self.verdict = auditor.verdict()

    def _log(self, scored: Candidates, output: list[int]) -> Text:
        assert self.auditor is not None
        ends = {*self.params.stop_token_ids, *(() if self.params.ignore_eos else self.auditor.eos)}
        return text_of(scored, output, stopped=output[-1] in ends, limit=self.params.max_tokens)

    def _one(self, prompt: str | list[int]) -> tuple[Emission, Acceptance | None]:
        ids = prompt if isinstance(prompt, list) else []
        body = self.extra | request_body(self.endpoint.model, ids, self.params, next(self._seeds)) | {"prompt": prompt}
        body = {k: v for k, v in body.items() if k not in self.leave_out}
        try:
            document = self.endpoint.complete(body)
            emission = self._read(document)
        except ConfigError as error:
            self.failed += 1
            self._silent += 1
            self.last_error = str(error)
            if self._silent >= PATIENCE or not self.answered:
                self.end(f"its requests fail, and no more are sent: {error}")
            return Emission((), error=str(error)), None
        self._silent = 0
        self.answered += 1
        found = of_reply(document)
        if found is not None and len(self.requests) < KEPT:
            self.requests.append(found)
        made = self._made(document, emission)
        self.tokens += made
        self.budget.spent -= max(0, self.params.max_tokens - made)
        return emission, found

    def _read(self, document: dict[str, Any]) -> Emission:
        if self.auditor is None:
            return Emission(())
        return read_choice(document["choices"][0], self.params.max_tokens, self.auditor.target.vocab_size)

    def _made(self, document: dict[str, Any], emission: Emission) -> int:
        """Tokens of a reply: by its usage, or by its ids; all that were asked for where it says neither."""
        usage = document.get("usage")
        said = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if type(said) is int and 0 <= said <= self.params.max_tokens:
            return said
        return len(emission.tokens) or self.params.max_tokens

    def end(self, why: str) -> None:
        """Send no more requests."""
        if self.ended is None:
            self.ended = why
            self.say(why)

    def document(self) -> dict[str, Any]:
        """Budget, prediction and verdict, as plain data."""
        accepted, proposed = (sum(getattr(r, name) for r in self.requests) for name in ("accepted", "proposed"))
        out = {
            "budget": self.budget.total,
            "spent": self.budget.spent,
            "requests": self.answered,
            "failed": self.failed,
            "tokens": self.tokens,
            "error": self.last_error,
            "ended": self.ended,
            "acceptance": {
                "requests": len(self.requests),
                "acceptance_rate": accepted / proposed if proposed else None,
                "by_length": [asdict(x) for x in predict(list(self.requests))],
            },
            "replay": beside(list(self.replayed)),
            "audit": None if self.verdict is None else _brief(self.verdict),
        }
        return finite(out)


def _brief(verdict: AuditResult) -> dict[str, Any]:
    """A verdict without its table of what would have been seen, which is long and in `resolution` in short."""
    return {key: value for key, value in as_document(verdict).items() if key != "detectable"}


def asking(
    watch: Any,
    prompts: Sequence[str] | Sequence[list[int]],
    params: SamplingParams,
    budget: Budget,
    auditor: Auditor | None = None,
    **more: Any,
) -> Asking:
    """Requests to the server that a `Watch` has read at least once. Raises ConfigError where it has not, or has no name for a
    model."""
    if watch.flavour is None:
        raise ConfigError(f"{watch.url} has not answered yet: its requests depend on what it is")
    name = more.pop("model", None) or watch.identity.model
    if name is None:
        raise ConfigError(f"{watch.url} does not say which model it serves: add --model")
    longest = watch.identity.max_length
    if longest is not None and params.max_tokens >= longest:
        params = replace(params, max_tokens=longest // 2)
    extra = dict(watch.flavour.neutral) | SPEC_FIELDS.get(watch.flavour.name, {})
    endpoint = Endpoint(watch.url, name, watch.key, timeout=60.0)
    return Asking(endpoint, prompts, params, budget, auditor, extra, watch.flavour.refuses, **more)


@dataclass(slots=True)
class Later:
    """Requests that begin once the watched server has answered. make: makes them then."""

    watch: Any
    make: Callable[[], Asking]
    found: Asking | None = None

    def step(self) -> float | None:
        """As `Asking.step`."""
        if self.found is None:
            if self.watch.flavour is None:
                return 1.0
            self.found = self.make()
        return self.found.step()

    def accused(self) -> bool:
        return self.found is not None and self.found.accused

    def document(self) -> dict[str, Any] | None:
        return None if self.found is None else self.found.document()
