"""Block drafters: packed blocks against brute force, nothing from the future, the cache against recomputation, folders, specs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch

from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.network import DFlashNetwork, visible
from outrider.drafters.tree.growth import BestFirst, Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.protocols import Controller
from outrider.train.features import hidden_of
from outrider.types import Evidence
from outrider.verify import load_rule
from tests.drafters.drafting import Pausing, Seen, evidence, view

V, H, BLOCK = 19, 16, 4
TARGET = TinyLM(V, H, 3, seed=1, sharp=3.0)
TAPS = (1, 3)


@cache
def block_model(kv_heads: int = 1, layers: int = 2) -> DFlashNetwork:
    torch.manual_seed(3)
    config = DFlashConfig(H, TAPS, V, 2, kv_heads, 6, 20, BLOCK, mask=V - 1, layers=layers)
    model = DFlashNetwork(config).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model


@cache
def states(text: tuple[int, ...]) -> torch.Tensor:
    return hidden_of(TARGET, torch.tensor([text]), TAPS).double()  # float32 on the way


# ------------------------------------------------------------------------------------------------------ packed blocks
def test_visibility_against_brute_force() -> None:
    """Overlapping anchors, two documents in a row: a context row is seen if it is earlier *by position* and of the same text."""
    g = torch.Generator().manual_seed(0)
    length = 12
    position = torch.randint(1, length, (3, 7), generator=g)  # with repetitions and overlaps
    position[0] = torch.tensor([1, 4, 5, 5, 6, 11, 2])
    document = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [4] * 2 + [7] * 3 + [4] * 7])
    for texts in (None, document):
        found = visible(position, length, texts)
        for r in range(3):
            for n in range(7):
                a = int(position[r, n])
                want = [t < a and (texts is None or int(document[r, t]) == int(document[r, a])) for t in range(length)]
                assert found[r, n].tolist() == want


def alone(model: DFlashNetwork, taps: torch.Tensor, token: int, size: int, first: int) -> torch.Tensor:
    """One block, computed the plain way: softmax over the keys of its context and of its own slots, row by row."""
    c = model.config
    x = model.embed_tokens(torch.tensor([token] + [c.mask] * (size - 1)))
    context = model.hidden_norm(model.fc(taps.flatten(1)))
    places = torch.arange(first, first + len(context) + size)

    def turned(y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        cos, sin = model.rotation(at)
        half = c.head_dim // 2
        return y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin

    for layer in model.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(x)  # type: ignore[operator, union-attr]
        rows = torch.cat([context, normed])
        q = turned(attn.q_norm(attn.q_proj(normed).view(size, c.heads, -1)), places[-size:])  # type: ignore[operator, union-attr]
        k = turned(attn.k_norm(attn.k_proj(rows).view(len(rows), c.kv_heads, -1)), places)  # type: ignore[operator, union-attr]
        v = attn.v_proj(rows).view(len(rows), c.kv_heads, -1)  # type: ignore[operator, union-attr]
        out = torch.zeros(size, c.heads, c.head_dim, dtype=x.dtype)
        for h in range(c.heads):
            share = h * c.kv_heads // c.heads
            out[:, h] = torch.softmax(q[:, h] @ k[:, share].T / c.head_dim**0.5, -1) @ v[:, share]
        x = x + attn.o_proj(out.flatten(1))  # type: ignore[operator, union-attr]
        x = x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[operator]
    return model.lm_head(model.norm(x[1:]))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("size", [BLOCK, 2])
def test_packed_blocks_are_the_blocks_alone(kv_heads: int, size: int) -> None:
    """Blocks that overlap, in one forward, with two texts in the second row, against each block by itself."""
    model, g = block_model(kv_heads), torch.Generator().manual_seed(1)
    taps = torch.randn(2, 14, 2, H, generator=g, dtype=torch.float64)
    tokens = torch.randint(V, (2, 14), generator=g)
    position = torch.tensor([[1, 4, 5, 6, 10], [2, 5, 8, 9, 10]])
    document = torch.tensor([[0] * 14, [0] * 6 + [1] * 8])
    packed = model.blocks(model.inject(taps), tokens.gather(1, position), position, slots=size, document=document)
    assert packed.shape == (2, 5, size - 1, V)
    for r in range(2):
        for n in range(5):
            a = int(position[r, n])
            first = 6 if r == 1 and a >= 6 else 0  # positions go on, contexts do not
            want = alone(model, taps[r, first:a], int(tokens[r, a]), size, first)
            torch.testing.assert_close(packed[r, n], want, rtol=0, atol=1e-10)


def test_nothing_leaks_from_the_future() -> None:
    """A block changes with the text before its anchor and with the anchor, and with no token behind it."""
    model, length = block_model(), 12
    g = torch.Generator().manual_seed(2)
    text = torch.randint(V, (1, length), generator=g)
    position = torch.arange(1, length - BLOCK + 1)[None]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        keys = model.inject(states(tuple(tokens[0].tolist())))
        return model.blocks(keys, tokens.gather(1, position), position)[0]

    base = logits(text)
    for t in range(length):
        other = text.clone()
        other[0, t] = (other[0, t] + 1) % V
        changed = (logits(other) != base).flatten(1).any(1).tolist()
        assert changed == [int(a) >= t for a in position[0]], t


# ------------------------------------------------------------------------------------------------------------ serving
GROWTHS = {
    "chain": lambda: Levels(levels((1,) * 3), V),
    "short chain": lambda: Levels(levels((1,) * 2), V),
    "most likely": lambda: Levels(levels((1,) * 3), V, sample="greedy"),
    "best first": lambda: BestFirst(6, 3, V, width=2),
}


@pytest.mark.parametrize(
    ("how", "kv_heads", "control"),
    [*product(GROWTHS, (1, 2), (Fixed,)), ("chain", 2, lambda most: Pausing())],
)
def test_cached_logits_are_those_of_training(how: str, kv_heads: int, control: Callable[[int], Controller]) -> None:
    """After any history of partial acceptances, joins, leaves and pauses, what is served is what a full recomputation gives.

    The cache holds what the target's holds after every round: a row more or less would move every logit.
    """
    model = block_model(kv_heads)
    seen = Seen(GROWTHS[how]())
    drafter = DFlashDrafter(model, seen)  # type: ignore[arg-type]
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), control(3), slots=3, max_length=60, chunk=5)
    params = [SamplingParams(temperature=1.0, max_tokens=m, seed=i) for i, m in enumerate((14, 9, 21, 6))]
    one.generate([[3, 1, 4], [1] * 11, [5, 9, 2, 6, 5, 3, 5], [8]], params)
    assert one.counts.rejected > 3
    assert len(seen.logits) > 20
    size = seen.depth + 1
    recomputed: dict[tuple[int, ...], torch.Tensor] = {}
    for (history, path), row in seen.logits.items():
        if history not in recomputed:
            anchor = torch.tensor([[len(history) - 1]])
            keys = model.inject(states(history[:-1]))  # the anchor has no hidden state yet
            recomputed[history] = model.blocks(keys, torch.tensor([[history[-1]]]), anchor, slots=size)[0, 0]
        found = recomputed[history][len(path)]
        torch.testing.assert_close(row, found, rtol=0, atol=2e-4)  # hidden states went through float32 above


def test_the_cache_holds_what_the_target_holds_after_every_round() -> None:
    """As many rows as the target's cache, and its values are those of one injection of the whole text: nothing rejected stays."""
    model = block_model(2)
    drafter, rounds = DFlashDrafter(model, GROWTHS["chain"]()), 0
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=2, max_length=60, chunk=5)
    honest = drafter.draft

    def watched(seen: Evidence, budget):
        nonlocal rounds
        out = honest(seen, budget)
        for v in seen.sequences:
            known = drafter.cache.length[v.slot]
            assert known + drafter.backlog.count(v.slot) == drafter.context.next[v.slot] == v.cached
            for n, (k, value) in enumerate(model.inject(states(tuple(v.tokens[:known]))) if known else ()):
                held = drafter.cache.read(n, v.slot, known)
                torch.testing.assert_close(held[0], k[0].transpose(0, 1), rtol=0, atol=2e-4)
                torch.testing.assert_close(held[1], value[0].transpose(0, 1), rtol=0, atol=2e-4)
            rounds += 1
        return out

    drafter.draft = watched  # type: ignore[method-assign]
    params = [SamplingParams(temperature=1.0, max_tokens=m, seed=i) for i, m in enumerate((14, 9, 11))]
    one.generate([[3, 1, 4], [1] * 11, [5, 9, 2, 6, 5, 3, 5]], params)
    assert rounds > 20
    assert one.counts.accepted and one.counts.rejected > 5


def test_a_gap_in_what_was_seen_makes_a_draft_worse_never_wrong() -> None:
    drafter = DFlashDrafter(block_model(), GROWTHS["chain"]())
    with pytest.raises(ConfigError, match="bind"):
        drafter.draft(evidence([view([1, 2, 3])], V), [3])
    drafter.bind(1, 40)
    found = drafter.draft(evidence([view([1, 2, 3])], V), [3])  # no row of this sequence was in the forward
    assert found.counts == (0,)


def test_distributions_are_declared_for_every_slot_or_for_none() -> None:
    """Sampled drafts carry the slots' distributions, one for each node; most likely tokens and trees are point masses."""
    drafts = []
    for how in ("chain", "most likely", "best first"):
        drafter = DFlashDrafter(block_model(), GROWTHS[how]())
        one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(3), slots=1, max_length=60)
        made, draft = [], drafter.draft
        drafter.draft = lambda e, b, d=draft, m=made: m.append(d(e, b)) or m[-1]  # type: ignore[method-assign]
        one.generate([[1, 2, 3]], SamplingParams(temperature=0.8, max_tokens=12, seed=0))
        drafts.append([d for d in made if sum(d.counts)])
    for d in drafts[0]:
        assert d.q is not None
        assert d.q.row == tuple(range(len(d.token)))
        torch.testing.assert_close(d.q.probs.sum(-1), torch.ones(len(d.token), dtype=d.q.probs.dtype))
    assert drafts[0]
    assert drafts[1]
    assert all(d.q is None for kind in drafts[1:] for d in kind)
    assert any(not d.is_chain for d in drafts[2])


def test_a_draft_longer_than_its_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained with 4"):
        DFlashDrafter(block_model(), Levels(levels((1,) * 4), V))


@pytest.mark.parametrize(
    "wrong", [{"block": 1}, {"mask": V}, {"mask": -1}, {"taps": ()}, {"layers": 0}, {"head_dim": 5}]
)
def test_shapes_that_make_no_sense_are_refused(wrong: dict) -> None:
    fine = {
        "hidden": H, "taps": TAPS, "vocab_size": V, "heads": 2, "kv_heads": 1, "head_dim": 6, "inner": 20, "block": 4, "mask": 0,
    }  # fmt: skip
    DFlashConfig(**fine)
    with pytest.raises(ConfigError):
        DFlashConfig(**(fine | wrong))


# ------------------------------------------------------------------------------------------------------------ folders
