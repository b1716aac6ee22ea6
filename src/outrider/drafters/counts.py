"""Counted tables of images as a drafter: by place and class, by the token to the left, by the one above. No network, honest q.

Logits of a place are `weights` times the logs of three conditional tables, plus a weight times the log of the token's overall share
(two-dimensional naive Bayes, if the weights are 1, 1, 1 and -2). The tables know nothing else of the picture, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from outrider.config_keys import whole
from outrider.drafters.checkpoint import read_folder, write_folder
from outrider.drafters.spec import DraftSpec
from outrider.drafters.tree.forest import Forest
from outrider.drafters.tree.growth import Growth
from outrider.errors import CapabilityError, ConfigError
from outrider.protocols import Drafter, Target
from outrider.types import Draft, Evidence

NOTHING = -1e4
"""Logit of a token that is no colour: never drawn, and finite."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Logs of shares. C colours, T places, G kinds of prompts (classes in ascending order of their token).

    place: [G, T, C]. left, above: [C + 1, C], the last row for no neighbour. share: [C]. weights: of place, left, above, share.
    """

    place: Float[Tensor, "G T C"]
    left: Float[Tensor, "C1 C"]
    above: Float[Tensor, "C1 C"]
    share: Float[Tensor, "C"]
    weights: Float[Tensor, "W"]
    classes: tuple[int, ...]
    columns: int

    def logits(
        self, kind: Int[Tensor, "n"], place: Int[Tensor, "n"], left: Int[Tensor, "n"], above: Int[Tensor, "n"]
    ) -> Float[Tensor, "n C"]:
        """Logits of some places. kind: number of the class. left, above: tokens, C for none."""
        w = self.weights
        parts = w[0] * self.place[kind, place] + w[1] * self.left[left] + w[2] * self.above[above]
        return parts + w[3] * self.share

    def save(self, folder: Path) -> None:
        """Write the drafter's folder."""
        config = {"model_type": "counts", "columns": self.columns, "classes": list(self.classes)}
        names = ("place", "left", "above", "share", "weights")
        write_folder(folder, config, {name: getattr(self, name).float() for name in names})


def count(
    tokens: Int[Tensor, "n T"],
    prompts: Int[Tensor, "n"],
    colours: int,
    classes: Sequence[int],
    columns: int,
    add: float = 0.3,
) -> Tables:
    """Tables of images `tokens` with prompts of one token, each of `classes` or another one, which counts for all. add: what every
    cell begins with, in units of the token's overall share times `colours`. Weights are those of naive Bayes; `fit` finds
    better ones."""
    share = (torch.bincount(tokens.flatten(), minlength=colours) + 1.0).double()
    share /= share.sum()

    def log_rows(cells: Tensor) -> Tensor:
        filled = cells + add * colours * share
        return (filled / filled.sum(-1, keepdim=True)).log()

    hot = torch.nn.functional.one_hot(tokens, colours).double()
    place = [log_rows(hot[prompts == c].sum(0)) for c in classes] + [log_rows(hot.sum(0))]
    left, above = neighbours_of(tokens, columns, colours)
    beside_left, beside_above = (
        log_rows(torch.zeros(colours + 1, colours, dtype=torch.float64).index_add_(0, n.flatten(), hot.flatten(0, 1)))
        for n in (left, above)
    )
    weights = torch.tensor([1.0, 1.0, 1.0, -2.0], dtype=torch.float64)
    return Tables(torch.stack(place), beside_left, beside_above, share.log(), weights, tuple(classes), columns)


def neighbours_of(tokens: Int[Tensor, "n T"], columns: int, none: int) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"]]:
    """The token to the left of each and the one above it, `none` at the edges."""
    grid = tokens.view(len(tokens), -1, columns)
    left, above = torch.full_like(grid, none), torch.full_like(grid, none)
    left[:, :, 1:], above[:, 1:] = grid[:, :, :-1], grid[:, :-1]
    return left.flatten(1), above.flatten(1)


def nats(tables: Tables, tokens: Int[Tensor, "n T"], prompts: Int[Tensor, "n"]) -> float:
    """Mean nats per token of images under the tables."""
    with torch.no_grad():
        return float(_nats(tables, tokens, prompts))


def fit(tables: Tables, tokens: Int[Tensor, "n T"], prompts: Int[Tensor, "n"]) -> Float[Tensor, "4"]:
    """The weights under which other images are most likely: a convex problem in four numbers."""
    weights = tables.weights.clone().requires_grad_(True)
    search = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = _nats(replace(tables, weights=weights), tokens, prompts)
        loss.backward()
        return loss

    search.step(closure)
    return weights.detach()


def _nats(tables: Tables, tokens: Int[Tensor, "n T"], prompts: Int[Tensor, "n"]) -> Tensor:
    kinds = {token: n for n, token in enumerate(tables.classes)}
    kind = torch.tensor([kinds.get(c, len(kinds)) for c in prompts.tolist()]).unsqueeze(1).expand_as(tokens)
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    left, above = neighbours_of(tokens, tables.columns, len(tables.share))
    logits = tables.logits(*(x.flatten() for x in (kind, place, left, above)))
    return torch.nn.functional.cross_entropy(logits, tokens.flatten())


class Counts:
    """Drafts with `Tables`. growth: how drafts grow. Prompts are one token, or end with the class."""

    name = "counts"
    layers: tuple[int, ...] = ()

    def __init__(self, tables: Tables, growth: Growth, vocab_size: int) -> None:
        self.tables, self.growth, self.vocab_size = tables, growth, vocab_size
        self.max_depth, self.max_nodes, self.trees = growth.depth, growth.nodes, growth.trees
        self._kind = {token: n for n, token in enumerate(tables.classes)}

    def bind(self, slots: int, length: int) -> None:
        """Nothing to allocate."""

    def release(self, slots: Sequence[int]) -> None:
        """Nothing is kept but what growing has learnt."""
        self.growth.forget(slots)

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """Up to `budget[i]` levels for sequence i, none beyond the picture."""
        last = self.tables.place.shape[1]
        depths = [
            max(0, min(depth, self.max_depth, last - (len(v.tokens) - v.prompt)))
            for v, depth in zip(evidence.sequences, budget, strict=True)
        ]
        forest, device = Forest(len(budget)), evidence.scores.logits.device

        def follow(frontier: list[tuple[int, int]]) -> Float[Tensor, "n V"]:
            where = [self._where(evidence, i, forest.path(i, k)) for i, k in frontier]
            logits = self.tables.logits(*torch.tensor(where).T)
            out = logits.new_full((len(where), self.vocab_size), NOTHING)
            out[:, : logits.shape[1]] = logits
            return out.to(device)

        live = [i for i, depth in enumerate(depths) if depth]
        if live:
            self.growth.grow(evidence, depths, forest, follow([(i, -1) for i in live]), follow)
        return forest.draft(device, self.growth.siblings)

    def _where(self, evidence: Evidence, i: int, path: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Class, place, left and upper token of the place behind `path`."""
        view, none, wide = evidence.sequences[i], len(self.tables.share), self.tables.columns
        done = len(view.tokens) - view.prompt
        place = done + len(path)
        at = lambda n: path[n - done] if n >= done else view.tokens[view.prompt + n]  # noqa: E731
        seen = [at(place - 1) if place % wide else none, at(place - wide) if place >= wide else none]
        left, above = (t if t < none else none for t in seen)
        return self._kind.get(view.tokens[view.prompt - 1], len(self._kind)), place, left, above


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`."""
    config, tensors = read_folder(folder, "counts")
    classes = config.get("classes")
    if not isinstance(classes, list) or any(isinstance(c, bool) or not isinstance(c, int) for c in classes):
        raise ConfigError(f"{folder}: classes must be a list of tokens: make the tables again")
    wanted = {"place": 3, "left": 2, "above": 2, "share": 1, "weights": 1}
    if {name: t.dim() for name, t in tensors.items()} != wanted:
        raise ConfigError(f"{folder}: the tensors are not the tables of this drafter: make them again")
    made = {name: t.float() for name, t in tensors.items()}
    size, place = len(made["share"]), made["place"]
    shapes = [place.shape[0] == len(classes) + 1, place.shape[2] == size, len(made["weights"]) == 4]
    if not all(shapes) or any(made[name].shape != (size + 1, size) for name in ("left", "above")):
        raise ConfigError(f"{folder}: the tables do not fit each other: make them again")
    tables = Tables(**made, classes=tuple(classes), columns=whole(config, "columns", folder))
    if not all(bool(torch.isfinite(t).all()) for t in made.values()):
        raise ConfigError(f"{folder}: a table has numbers that are not finite: make them again")
    if size > target.vocab_size:
        raise CapabilityError(f"{folder} counts {size} colours, and the target has {target.vocab_size} tokens")
    return Counts(tables, spec.growth(target.vocab_size), target.vocab_size)
