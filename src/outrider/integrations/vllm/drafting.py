"""One of our drafters, called outside of our engine: from sequences to chains of tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from outrider.contained import Contained
from outrider.drafters.registry import load_drafter
from outrider.errors import ConfigError, OutriderError, RequestError
from outrider.integrations.vllm.lengths import own_limit
from outrider.models.folder import resolve_folder
from outrider.models.load import find_tokenizer, inspect_checkpoint, load_target, stop_ids
from outrider.noise import Noise
from outrider.options import WITHOUT_MODEL
from outrider.params import SamplingParams
from outrider.protocols import Drafter
from outrider.sampling.grammar import grammars_of
from outrider.sampling.pipeline import LogitsPipeline
from outrider.types import Draft, Evidence, Rows, Scores, SequenceView, Verdict

logger = logging.getLogger("vllm.outrider")
UNSERVED = ("medusa", "eagle", "mtp", "dflash", "early", "recycle", "ahead")
"""Drafters that read hidden states or scores of the target, or prepare drafts beside its step."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a request. name: "" if nothing is. prompt: its tokens; None: not known."""

    name: str = ""
    prompt: int | None = None
    params: SamplingParams = field(default_factory=SamplingParams)


class Knowledge:
    """The requests behind the rows of a batch. runner: vLLM's model runner; None: nothing is known. tokenizer: for predictions that
    are given as text."""

    def __init__(self, runner: Any = None, tokenizer: Any = None) -> None:
        self.runner, self.tokenizer = runner, tokenizer
        self.told: set[str] = set()

    def name(self, row: int) -> str:
        """The request in this row; "" if it is not known."""
        return "" if self.runner is None else self.runner.input_batch.req_ids[row]

    def of(self, row: int) -> Known:
        """What is known of the request in this row. A prediction or grammar that we cannot read counts as none, and is said
        once."""
        if self.runner is None:
            return Known()
        name = self.name(row)
        state = self.runner.requests[name]
        prompt = len(state.prompt_token_ids or ())
        try:
            return Known(name, prompt, self._params(state.sampling_params))
        except (OutriderError, TypeError, ValueError) as error:  # a tokenizer refuses half of a surrogate pair
            if str(error) not in self.told and len(self.told) < 100:
                self.told.add(str(error))
                logger.warning("a request is drafted for without its prediction or grammar: %s", error)
            return Known(name, prompt)

    def _params(self, theirs: Any) -> SamplingParams:
        extra = getattr(theirs, "extra_args", None) or {}
        values: dict[str, Any] = {"grammar": grammar_of(getattr(theirs, "structured_outputs", None))}
        values["draft_length"] = own_limit(extra)
        prediction = extra.get("outrider_prediction")
        if isinstance(prediction, str):
            if self.tokenizer is None:
                raise RequestError(
                    "outrider_prediction is a text, and the target has no tokenizer here: give token ids"
                )
            prediction = self.tokenizer.encode(prediction)
        if prediction is not None:
            if not isinstance(prediction, list | tuple):
                raise RequestError("outrider_prediction is a text or a list of token ids")
            values["prediction"] = tuple(int(t) if isinstance(t, float) and t.is_integer() else t for t in prediction)
        return SamplingParams(**values)


def grammar_of(structured: Any) -> str | None:
    """Our name of a request's `structured_outputs`, if it is a JSON schema or a regular expression; else None."""
    if structured is None:
        return None
    schema, regex = getattr(structured, "json", None), getattr(structured, "regex", None)
    if schema is not None:
        import json

        return "json:" + (schema if isinstance(schema, str) else json.dumps(schema))
    return None if regex is None else f"regex:{regex}"


class Drafting:
    """A drafter and what it is called with. vocab_size: of the target. tokenizer: of the target, or None."""

    def __init__(self, contained: Contained, vocab_size: int, tokenizer: Any = None, target: str = "") -> None:
        self.contained, self.vocab_size, self.tokenizer, self.target = contained, vocab_size, tokenizer, target
        self.seconds = 0.0
        """Of the latest call."""
        self.pipeline = LogitsPipeline(vocab_size)
        self._steps = 0

    @property
    def drafter(self) -> Drafter:
        """The drafter itself."""
        return self.contained.drafter

    @classmethod
    def load(cls, spec: str, longest: int, config: Any) -> Drafting:
        """The drafter that the settings name, for vLLM's target. Raises ConfigError for one that needs the target's hidden
        states."""
        path = str(config.model_config.model)
        facts = inspect_checkpoint(path)
        tokenizer = find_tokenizer(path)
        drafter = load_drafter(
            _greedy(spec),
            target=_Shape(facts.vocab_size),  # type: ignore[arg-type]
            length=longest,
            tokenizer=tokenizer,
            load_model=lambda name: (load_target(name, role="draft"), find_tokenizer(name)),
            find_folder=resolve_folder,
        )
        if drafter.layers or drafter.trees:
            raise ConfigError(
                f"{spec!r} cannot draft here: a proposer of vLLM gets no hidden states and gives chains only"
            )
        logger.info("outrider drafts with %s", drafter.name)
        return cls(Contained(drafter), facts.vocab_size, tokenizer, path)

    def served(self) -> None:
        """From now on requests are known, and with them their grammars."""
        ends = stop_ids(self.target, self.tokenizer)
        self.pipeline = LogitsPipeline(self.vocab_size, ends, grammars_of(self.tokenizer, self.vocab_size, ends))

    def chains(self, views: Sequence[SequenceView], budget: Sequence[int]) -> list[list[int]]:
        """The draft tokens of each sequence."""
        began = perf_counter()
        with torch.inference_mode():
            draft = self.contained.draft(self._evidence(views), budget)
        out = [_first_chain(draft, b) for b in range(len(views))]
        self.seconds = perf_counter() - began
        return out

    def _evidence(self, views: Sequence[SequenceView]) -> Evidence:
        """What a drafter without hidden states reads: the sequences, and the size of the vocabulary."""
        self._steps += 1
        none = (-1,) * len(views)
        empty = torch.empty(0, dtype=torch.int64)
        return Evidence(
            Rows(empty, empty, (), empty),
            Scores(torch.empty(0, self.vocab_size)),
            Draft.empty(0),
            Verdict((), (), (), (), (), ()),
            tuple(views),
            none,
            none,
            Noise(tuple(v.seed for v in views), tuple(len(v.tokens) - 1 for v in views)),
            self.pipeline,
        )


class _Shape:
    """As much of a target as drafters ask for that get nothing else of it."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def _greedy(spec: str) -> str:
    """The spec with the draft model's most likely tokens: a point mass is accepted with p(x), which is largest there."""
    head, plus, model = spec.rpartition("+")
    kind = model.partition(":")[0]
    for name in (part.partition(":")[0] for part in spec.split("+")):
        if name in UNSERVED and not Path(name).exists():
            raise ConfigError(
                f"the drafter {name!r} needs hidden states or scores of the target, which vLLM gives its own drafters only: serve "
                'an EAGLE-3 or block drafter by vLLM\'s own method, as {"method": "eagle3", "model": FOLDER}'
            )
    plain = kind in (*WITHOUT_MODEL, "none", "auto", "greedy")
    return spec if plain else f"{head}{plus}greedy:{model}"


def _first_chain(draft: Draft, b: int) -> list[int]:
    """The tokens of the first chain of a tree: of every node its first child."""
    out, node = list[int](), -1
    while children := draft.children(b, node):
        node = children[0]
        out.append(draft.tokens[node])
    return out
