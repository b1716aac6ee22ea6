"""Counted tables: what they count, what a drafter reads of them along a path, and folders that are damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from outrider.drafters.counts import NOTHING, Counts, Tables, count, fit, nats, neighbours_of
from outrider.drafters.registry import load_drafter
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import CapabilityError, ConfigError
from outrider.models.toy import TinyLM
from tests.drafters.drafting import Seen, evidence, view

COLOURS, CLASSES, COLUMNS, PLACES, V = 4, (6, 7), 3, 6, 9
MODEL = TinyLM(V, 8, 1, seed=1)


def pictures(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in which a token mostly repeats its left neighbour, and class 7 begins with colour 3."""
    noise = torch.Generator().manual_seed(seed)
    tokens = torch.randint(COLOURS, (n, PLACES), generator=noise)
    for place in range(1, PLACES):
        same = torch.rand(n, generator=noise) < 0.7
        tokens[:, place] = torch.where(same, tokens[:, place - 1], tokens[:, place])
    prompts = torch.tensor(CLASSES)[torch.randint(2, (n,), generator=noise)]
    tokens[prompts == 7, 0] = 3
    return tokens, prompts


def tables(n: int = 400) -> Tables:
    return count(*pictures(n), COLOURS, CLASSES, COLUMNS)


def test_tables_are_shares_of_what_was_seen() -> None:
    tokens, prompts = pictures(400)
    made = tables()
    for table in (made.place, made.left, made.above, made.share):
        assert torch.allclose(table.exp().sum(-1), torch.ones(table.shape[:-1], dtype=torch.float64))
    first = tokens[prompts == 7][:, 0]
    assert (first == 3).all()
    assert float(made.place[1, 0, 3].exp()) > 0.95
    pairs = [(int(row[p - 1]), int(row[p])) for row in tokens for p in range(PLACES) if p % COLUMNS]
    seen = sum(a == b == 2 for a, b in pairs) / sum(a == 2 for a, _ in pairs)
    assert float(made.left[2, 2].exp()) == pytest.approx(seen, abs=0.02)
    left, above = neighbours_of(tokens[:1], COLUMNS, COLOURS)
    row = tokens[0].tolist()
    assert left[0].tolist() == [COLOURS, *row[0:2], COLOURS, *row[3:5]]
    assert above[0].tolist() == [COLOURS] * 3 + row[:3]


def test_fitted_weights_predict_better() -> None:
    made, other = tables(), pictures(300, seed=1)
    better = replace(made, weights=fit(made, *other))
    alone = replace(made, weights=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert nats(better, *other) < min(nats(made, *other), nats(alone, *other))


def test_a_path_reads_its_own_neighbours() -> None:
    """Every distribution along a draft is that of its class, place, left and upper token; nothing is drafted beyond the picture."""
    made = tables()
    growth = Seen(Levels(levels((1,) * 4), V))
    drafter = Counts(made, growth, V)
    texts = [
        view([1, 7, 0, 2], 0, prompt=2, seed=1),
        view([6], 1, prompt=1, seed=2),
        view([8, 1, 1, 1, 1, 1], 2, prompt=1, seed=3),
    ]
    draft = drafter.draft(evidence(texts, V), [4, 3, 4])
    assert draft.counts == (4, 3, 1)
    kinds = (1, 0, 2)  # the last prompt is of no class: counted over all
    checked = 0
    for (history, path), logits in growth.logits.items():
        i = next(n for n, v in enumerate(texts) if tuple(v.tokens) == history)
        done = [*texts[i].tokens[texts[i].prompt :], *path]
        place = len(done)
        left = done[place - 1] if place % COLUMNS else COLOURS
        above = done[place - COLUMNS] if place >= COLUMNS else COLOURS
        want = made.logits(*(torch.tensor([n]) for n in (kinds[i], place, left, above)))[0]
        assert torch.allclose(logits[:COLOURS], want)
        assert (logits[COLOURS:] == NOTHING).all()
        checked += 1
    assert checked == 8


def test_a_folder_is_read_as_it_was_written(tmp_path) -> None:
    made = tables()
    made.save(tmp_path / "counts")
    drafter = load_drafter(f"counts:{tmp_path / 'counts'}", target=MODEL, length=3)
    assert isinstance(drafter, Counts)
    assert torch.allclose(drafter.tables.place, made.place.float())
    assert (drafter.tables.classes, drafter.tables.columns, drafter.max_depth) == (CLASSES, COLUMNS, 3)
    assert load_drafter(f"tree:2x1:counts:{tmp_path / 'counts'}", target=MODEL, length=2).trees


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c, t: c.update(classes=[1.5]), "classes must be a list"),
        (lambda c, t: c.update(columns=0), "columns"),
        (lambda c, t: t.pop("left"), "not the tables"),
        (lambda c, t: t.update(above=t["above"][1:]), "do not fit each other"),
        (lambda c, t: t["share"].fill_(float("nan")), "not finite"),
        (lambda c, t: c.update(model_type="medusa"), "holds a model of type 'medusa'"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, spoil, words: str) -> None:
    made = tables()
    made.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = {n: getattr(made, n).float().clone() for n in ("place", "left", "above", "share", "weights")}
    spoil(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=words):
        load_drafter(f"counts:{tmp_path}", target=MODEL, length=3)


def test_more_colours_than_the_target_has_tokens_are_refused(tmp_path) -> None:
    tables().save(tmp_path)
    with pytest.raises(CapabilityError, match="counts 4 colours"):
        load_drafter(f"counts:{tmp_path}", target=TinyLM(3, 8, 1, seed=1), length=3)
