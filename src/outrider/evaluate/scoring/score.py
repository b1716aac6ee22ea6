"""Score texts of the target under target and draft, once, so that `theory.replay` can say what drafting would have done.

No speculative decoding is run: texts are sampled from the target alone (or given), then each model reads each text in one
teacher-forced pass. Per position the distributions are compared after temperature, top-p and so on, as the engine's rule would
see them, and only a few numbers are kept; a seeded sample of full distributions is kept for questions about several drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from outrider.build import Engine, companion
from outrider.conversations import Conversation
from outrider.errors import ConfigError
from outrider.evaluate.workloads import Row, Written, ready
from outrider.noise import derive_seed
from outrider.params import SamplingParams
from outrider.protocols import Target
from outrider.sampling.pipeline import LogitsPipeline
from outrider.theory.replay import Text, Verification
from outrider.types import Draft, Rows, SequenceView

CHUNK = 256
"""Rows of one teacher-forced forward."""
IMPOSSIBLE = 0.02
"""Share of tokens without probability under the target distribution that rounding can explain; above it a text is not its own."""
VERIFICATION: dict[str, Verification] = {"speculative_sampling": "token", "block": "block"}
"""Rules whose acceptance the logs of both models predict, and whether they verify token by token or a block as a whole."""

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt, with the completion to score if it is given, and the domain it is reported under."""

    prompt: Written | list[int]
    completion: str | None = None
    domain: str = ""


def as_items(items: str | Sequence[str | Item]) -> list[Item]:
    """Items of which some may be given as their prompts alone; a string is one prompt."""
    return [i if isinstance(i, Item) else Item(i) for i in ([items] if isinstance(items, str) else items)]


def items_of(rows: Sequence[Row], shipped: bool = False) -> list[Item]:
    """The prompts of a set as items: with their `completion`, and `domain` or `category`. shipped: they are the shipped code."""
    return [Item(row.prompt, row.answer, _domain(row, shipped)) for row in rows]


def ready_items(
    engine: Engine, path: Path | None, rows: Sequence[Row], template: bool = True
) -> tuple[list[Item], dict[str, Any]]:
    """Items with prompts as the engine's target takes them, and what a report says of them: see `workloads.ready`.

    Without a template a prompt whose completion is given stays a text, so that both are read as one (`given_text`)."""
    found = ready(engine, path, rows, template)
    spoken = found.data["chat_template"]
    items = items_of(found.rows, shipped=path is None and not spoken)
    joined = [not spoken and item.completion is not None for item in items]
    return [
        replace(item, prompt=as_given(item.prompt) if together else ids)
        for item, ids, together in zip(items, found.ids, joined, strict=True)
    ], found.data


def _domain(row: Row, shipped: bool) -> str:
    if shipped:  # the folder of the standard library the prompt is from
        source = str(row.fields.get("source", ""))
        return source.split("/")[0] if "/" in source else "top level"
    return str(row.fields.get("domain") or row.fields.get("category") or "")


class Clock:
    """Adds up the seconds spent inside models."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, device: torch.device, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Run a forward; its result and its seconds, waiting for the device on both sides."""
        wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        wait()
        start = perf_counter()
        out = run()
        wait()
        took = perf_counter() - start
        self.seconds += took
        return out, took


class Emitted(NamedTuple):
    """Token ids of one text: prompt, then output."""

    prompt: list[int]
    output: list[int]
    stopped: bool
    limit: int | None
    item: int


def sample(
    engine: Engine,
    items: str | Sequence[str | Item],
    params: SamplingParams,
    clock: Clock,
    progress: Progress,
    *,
    batch: int = 8,
    seed: int = 0,
) -> list[Emitted]:
    """Continuations of the items by the target alone, `params.n` of each; given completions are taken as they are.

    batch: sequences decoded together. Raises RequestError for a prompt that does not fit the target's context.
    """
    out: list[Emitted] = []
    items = as_items(items)
    wanted = [i for i, item in enumerate(items) if item.completion is None]
    prompts = {i: engine.encode(as_given(items[i].prompt)) for i in wanted}
    longest = max((len(p) for p in prompts.values()), default=0) + params.max_tokens
    slots = max(batch, params.n)
    plain = companion(engine, "none", slots=slots, max_length=min(longest, engine.max_length))
    group = slots // params.n
    for low in range(0, len(wanted), group):
        some = wanted[low : low + group]
        seeds = [replace(params, seed=derive_seed(seed, i + 1) >> 1) for i in some]
        results = plain.generate([prompts[i] for i in some], seeds)
        for i, result in zip(some, results, strict=True):
            for output in result.outputs:
                if output.error:
                    raise ConfigError(f"prompt {i + 1} failed: {output.error}")
                stopped = output.finish_reason == "stop"
                limit = params.max_tokens if stopped else None
                out.append(Emitted(list(result.prompt), list(output.token_ids), stopped, limit, i))
        progress((low + len(some)) / len(wanted))
    clock.seconds += plain.seconds["target"]
    given = [given_text(engine, x, i, params.max_tokens) for i, x in enumerate(items) if x.completion is not None]
    return sorted([*out, *given], key=lambda e: e.item)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first differing token of two texts, None if one is a prefix of the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def as_given(prompt: Written | list[int]) -> str | list[int]:
    """A prompt as `Engine.encode` takes it."""
    return prompt.text if isinstance(prompt, Conversation) else prompt


def given_text(engine: Engine, item: Item, index: int, max_tokens: int) -> Emitted:
    """A given completion as tokens; where the tokenizer joins prompt and completion, the joined token is completion."""
    text, said = as_given(item.prompt), item.completion or ""
    if not isinstance(text, str):  # by a chat template: the answer begins where the template ends
        answer = list(engine.tokenizer.encode(said, add_special_tokens=False))
        return Emitted(list(text), answer[:max_tokens], False, None, index)
    prompt, full = engine.encode(text), engine.encode(text + said)
    differs = first_difference(prompt, full)
    shared = min(len(prompt), len(full)) if differs is None else differs
    if not 0 < shared < len(full):
        raise ConfigError(f"prompt {index + 1}: the completion adds no token to the prompt")
    return Emitted(full[:shared], full[shared : shared + max_tokens], False, None, index)


def draft_model(engine: Engine) -> Target:
    """The draft model an engine was built with. ConfigError if it drafts without one."""
    models = list(engine.loaded.models.values()) if engine.loaded is not None else []
    if len(models) != 1:
        raise ConfigError(
            f"predict compares the target with one draft model, and drafter {engine.parts.drafter.name!r} has "
            f"{len(models) or 'none'}: name a draft model with --draft (a folder or a Hub name)"
        )
    return models[0][0]


@torch.inference_mode()
def logits_along(model: Target, tokens: Sequence[int], first: int, clock: Clock) -> Iterator[Float[Tensor, "n V"]]:
    """Logits after tokens[first], .., tokens[-2], in chunks: one teacher-forced pass."""
    kv = model.new_kv(1, len(tokens))
    for start in range(0, first, CHUNK):
        rows = Rows.assemble(
            [0], [list(tokens[start : min(start + CHUNK, first)])], [start], Draft.empty(0, model.device), [False]
        )
        clock.time(model.device, lambda rows=rows: model.forward(rows, kv).logits)
        kv.commit(rows, [[]])
    for start in range(first, len(tokens) - 1, CHUNK):
        piece = list(tokens[start : min(start + CHUNK, len(tokens) - 1)])
        rows = chain_rows(model, piece, start)
        found = clock.time(model.device, lambda rows=rows: model.forward(rows, kv).logits)[0]
        if bool(found.isnan().any()):
            raise ConfigError("a model returned logits that are no numbers (NaN): check its checkpoint and the dtype")
        yield found
        kv.commit(rows, [list(range(len(piece) - 1))])


def chain_rows(model: Target, piece: list[int], start: int) -> Rows:
    """The forward of an anchor and a chain behind it, at places start .. of slot 0."""
    nodes = torch.tensor(piece[1:], dtype=torch.int64, device=model.device)
    draft = Draft(nodes, tuple(range(-1, len(piece) - 2)), (len(piece) - 1,))
    return Rows.assemble([0], [piece[:1]], [start], draft)


@dataclass(slots=True)
class Scored:
    """Texts with their logs, and `target_rows`, `draft_rows` [K, V] float64: full distributions at K positions chosen by chance.

    moved: tokens that the target distribution of the teacher-forced pass gives no probability, by rounding at the edge of top-p or
    of an argmax.
    """

    texts: list[Text]
    target_rows: np.ndarray
    draft_rows: np.ndarray
    moved: int = 0


@dataclass(slots=True)
class _Stats:
    """Per-position numbers of one text, and the full distributions of some of its positions."""

    columns: list[Tensor] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, p: Tensor, q: Tensor, best: Tensor, token: Tensor, keep: list[int]) -> None:
        at = lambda probs, index: probs.gather(1, index[:, None])[:, 0].double()  # noqa: E731
        tv = (1.0 - torch.minimum(p, q).sum(-1, dtype=torch.float64)).clamp(0, 1)
        self.columns.append(torch.stack([at(p, token), at(q, token), tv, 1.0 - at(p, best), (best == token).double()]))
        if keep:
            self.kept.append((p[keep].double().cpu(), q[keep].double().cpu()))

    def text(self, e: Emitted, item: Item, name: str) -> tuple[Text, int]:
        """The log of the text, and how many of its tokens rounding moved out of the target distribution."""
        p, q, tv, risk, hit = torch.cat(self.columns, 1).cpu().numpy()
        lost = p <= 0
        # such a token was certain to be kept if the draft could propose it, and sure to be refused otherwise
        p = np.where(lost, np.finfo(np.float64).tiny, np.minimum(p, 1.0))
        with np.errstate(divide="ignore"):
            log_q = np.log(np.minimum(q, 1.0))
        where = {"name": name, "prompt": str(e.item), "domain": item.domain}
        text = Text(np.log(p), log_q, hit > 0, tv, risk.clip(0, 1), e.stopped, e.limit, **where)
        return text, int(lost.sum())


@torch.inference_mode()
def score(
    engine: Engine,
    draft: Target,
    emitted: Sequence[Emitted],
    items: str | Sequence[str | Item],
    params: SamplingParams,
    clock: Clock,
    progress: Progress,
    *,
    rows: int = 256,
    seed: int = 0,
) -> Scored:
    """One pass of both models over every text. rows: positions whose full distributions are kept.

    Raises ConfigError when a text does not fit the draft's context, or cannot be the target's under these parameters.
    """
    target, pipeline = engine.parts.target, LogitsPipeline(engine.parts.target.vocab_size, tuple(engine.eos))
    total = sum(len(e.output) for e in emitted)
    kept = set(np.random.default_rng(seed).choice(total, min(rows, total), replace=False).tolist())
    items, texts = as_items(items), list[Text]()
    pairs: list[tuple[Tensor, Tensor]] = []
    done = moved = 0
    for k, e in enumerate(emitted):
        tokens, first = [*e.prompt, *e.output], len(e.prompt) - 1
        for name, model in (("target", target), ("draft", draft)):
            if len(tokens) > model.max_length:
                raise ConfigError(
                    f"a text of {len(tokens)} tokens is longer than the {name}'s context of {model.max_length}: "
                    "lower --max-tokens or shorten the prompts"
                )
        stats, at = _Stats(), 0
        passes = zip(logits_along(target, tokens, first, clock), logits_along(draft, tokens, first, clock), strict=True)
        for ours, theirs in passes:
            n = len(ours)
            view = SequenceView(0, 0, e.prompt, len(e.prompt), 0, params)
            paths = [tuple(e.output[: at + i]) if params.edits else () for i in range(n)]
            theirs = to_vocabulary(theirs, target.vocab_size).to(ours.device)
            p, q = pipeline(ours, [view] * n, paths), pipeline(theirs, [view] * n, paths)
            best = (q if params.edits else theirs).argmax(-1)
            token = torch.tensor(e.output[at : at + n], device=ours.device)
            stats.add(p, q, best, token, [i for i in range(n) if done + at + i in kept])
            at += n
        done += at
        text, lost = stats.text(e, items[e.item], str(k))
        texts.append(text)
        pairs += stats.kept
        moved += lost
        progress((k + 1) / len(emitted))
    if moved > max(1.0, IMPOSSIBLE * total):
        raise ConfigError(
            f"{moved} of {total} tokens have no probability under the target with these sampling options: "
            "the texts are not this target's own"
        )
    p, q = (torch.cat([pair[i] for pair in pairs]).numpy() for i in (0, 1))
    return Scored(texts, p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True), moved)


def to_vocabulary(logits: Float[Tensor, "n W"], vocab_size: int) -> Float[Tensor, "n V"]:
    """Draft logits over the target's vocabulary, as a model drafter makes them: padding cut off, missing tokens without mass."""
    missing = vocab_size - logits.shape[-1]
    return logits[:, :vocab_size] if missing <= 0 else pad(logits, (0, missing), value=-torch.inf)
