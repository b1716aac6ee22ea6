"""Logits to distributions: p = softmax of the processed logits; at temperature 0 the point mass at their maximum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from outrider import transfer
from outrider.errors import CapabilityError, ConfigError
from outrider.params import SamplingParams
from outrider.sampling import cpu, processors
from outrider.sampling.automaton import Automaton
from outrider.sampling.bans import rule_out
from outrider.sampling.grammar import Grammars
from outrider.sampling.history import History
from outrider.threads import serially
from outrider.types import SequenceView


class LogitsPipeline:
    """A request's logits processors as one function of (logits, history): implements `types.LogitsProcessing`.

    A pure function; it only keeps token counts per slot to avoid recounting a growing sequence. Row i of the result depends
    only on row i of the logits, on `sequences[i]` and on `paths[i]`, bit for bit.
    """

    def __init__(self, vocab_size: int, eos_ids: Sequence[int] = (), grammars: Grammars | None = None) -> None:
        """vocab_size: columns of the logits. eos_ids: tokens that end a sequence, forbidden below `min_tokens`. grammars: the
        tokenizer's, needed by requests with a grammar."""
        if vocab_size < 1:
            raise ConfigError(f"sampling needs at least one token, got vocab_size = {vocab_size}")
        if any(not 0 <= t < vocab_size for t in eos_ids):
            raise ConfigError(
                f"end-of-sequence tokens {tuple(eos_ids)} are not all tokens of a vocabulary of {vocab_size}"
            )
        self.vocab_size = vocab_size
        self.eos_ids = tuple(eos_ids)
        self.grammars = grammars
        self._histories: dict[int, History] = {}
        self._automata: dict[int, Automaton] = {}

    def __reduce__(self) -> tuple[type[LogitsPipeline], tuple[int, tuple[int, ...]]]:
        """Another process gets one that has counted nothing yet, and has no grammars: they need the tokenizer."""
        return type(self), (self.vocab_size, self.eos_ids)

    def __call__(
        self, logits: Float[Tensor, "M V"], sequences: Sequence[SequenceView], paths: Sequence[Sequence[int]]
    ) -> Float[Tensor, "M V"]:
        """Distributions float32 (float64 if the logits are); rows sum to one. The logits are not changed.

        sequences: per row its sequence. paths: per row the drafted tokens between the sequence's anchor and this row.
        A row without a finite maximum (a NaN, +inf, or only -inf) gets NaN (or an arbitrary token); other rows are not
        affected.
        """
        if logits.shape != (len(sequences), self.vocab_size) or len(paths) != len(sequences):
            raise CapabilityError(
                f"sampling over {self.vocab_size} tokens for {len(sequences)} rows and {len(paths)} paths needs such logits, not "
                f"{tuple(logits.shape)}; map the draft's vocabulary to the target's first"
            )
        with serially(logits.numel()):
            return self._distributions(logits, sequences, paths)

    def _distributions(
        self, logits: Tensor, sequences: Sequence[SequenceView], paths: Sequence[Sequence[int]]
    ) -> Float[Tensor, "M V"]:
        params = [s.params for s in sequences]
        x = logits if logits.dtype == torch.float64 else logits.float()
        requests = {id(p): p for p in params}.values()  # a request has a row for each node of its draft
        if any(p.edits for p in requests):
            x = self._edit(x.clone(), params, sequences, paths)
        on_cpu = transfer.on_host(x)
        if on_cpu and not any(p.filters for p in requests):
            return cpu.without_filters(x, [p.temperature for p in params]) if params else x
        distribution_of = cpu.distribution_of if on_cpu else processors.distribution_of
        warm = [i for i, p in enumerate(params) if not p.greedy]
        if len(warm) == len(params):
            return distribution_of(x, params) if params else x
        most_likely = cpu.argmax(x) if on_cpu else x.argmax(-1, keepdim=True)
        out = torch.zeros_like(x).scatter_(1, most_likely, 1.0)
        if warm:
            out[warm] = distribution_of(x[warm], [params[i] for i in warm])
        return out

    def _edit(
        self,
        x: Tensor,
        params: Sequence[SamplingParams],
        sequences: Sequence[SequenceView],
        paths: Sequence[Sequence[int]],
    ) -> Tensor:
        """Apply bias, bans and penalties to the caller's own `x`."""
        processors.add_bias(x, params)
        for i, p in enumerate(params):
            if p.allowed_token_ids or p.bad_words:
                rule_out(x[i], p, sequences[i].tokens, sequences[i].prompt, paths[i])
            if p.grammar is not None:
                self._rule_out(x[i], self._automaton(sequences[i], p.grammar), paths[i])
        short = [i for i, p in enumerate(params) if output_length(sequences[i]) + len(paths[i]) < p.min_tokens]
        if short:
            processors.forbid(x, params, short, self.eos_ids)
        penalised = [i for i, p in enumerate(params) if p.penalised]
        if penalised:
            processors.penalise(
                x, params, penalised, [self._history(sequences[i]) for i in penalised], [paths[i] for i in penalised]
            )
        return x

    def _rule_out(self, row: Float[Tensor, "V"], automaton: Automaton, path: Sequence[int]) -> None:
        """Forbid in a row the tokens that the request's grammar does not allow after its output and `path`."""
        row.masked_fill_(~automaton.allowed(path).to(row.device), -torch.inf)
        if not torch.isfinite(row.amax()):  # a row must have a distribution: this one is not used
            automaton.lose(path)
            row[list(self.eos_ids)] = 0.0

    def automaton(self, slot: int) -> Automaton | None:
        """The automaton of the sequence in a slot; None if it has no grammar, or was not processed yet."""
        return self._automata.get(slot)

    def exhausted_on_draft(self, slot: int) -> bool:
        """Whether drafts for the sequence in a slot have used up its grammar's budget."""
        return slot in self._automata and self._automata[slot].exhausted_on_draft

    def release(self, slots: Sequence[int]) -> None:
        """Drop the automata of these slots: the next sequences begin with their own budgets."""
        for slot in slots:
            self._automata.pop(slot, None)

    def forced(self, sequence: SequenceView) -> list[int]:
        """Tokens that the request's grammar forces after its output; none without a grammar."""
        grammar = sequence.params.grammar
        return self._automaton(sequence, grammar).forced() if grammar is not None else []

    def _automaton(self, sequence: SequenceView, grammar: str) -> Automaton:
        """The automaton of the slot, advanced over the output of `sequence`."""
        automaton = self._automata.get(sequence.slot)
        if automaton is None or automaton.text != grammar:
            assert self.grammars is not None, "the engine refuses grammars it cannot serve"
            automaton = self._automata[sequence.slot] = self.grammars.start(grammar)
        automaton.keep_up(sequence.tokens, sequence.prompt)
        return automaton

    def _history(self, sequence: SequenceView) -> History:
        history = self._histories.setdefault(sequence.slot, History())
        history.follow(sequence.tokens, sequence.prompt)
        return history


def output_length(sequence: SequenceView) -> int:
    """Tokens of the output so far, including the anchor."""
    return len(sequence.tokens) - sequence.prompt


class Logprobs(NamedTuple):
    """Log-probabilities on the host: of the n chosen tokens, and per row the most likely (token, log-probability) pairs."""

    chosen: list[float]
    top: list[list[tuple[int, float]]]


def logprobs_of(logits: Float[Tensor, "n V"], tokens: Sequence[int], top: int) -> Logprobs:
    """Natural log-probabilities of `tokens` and of the `top` most likely tokens, likeliest first, lowest number on ties.

    From the raw logits, before any processor, as vLLM's default (`logprobs_mode="raw_logprobs"`). Of equally likely tokens at
    the border any may be reported.
    """
    if not tokens:
        return Logprobs([], [])
    scores = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    chosen = scores.gather(1, transfer.upload(tokens, torch.int64, logits.device).unsqueeze(1)).squeeze(1)
    best = scores.topk(min(top, logits.shape[1]), dim=-1)
    values, ids, likely = transfer.read(chosen, best.indices, best.values)
    pairs = [zip(i, v, strict=True) for i, v in zip(ids, likely, strict=True)]
    return Logprobs(values, [sorted(own, key=lambda pair: (-pair[1], pair[0])) for own in pairs])
