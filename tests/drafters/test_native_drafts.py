"""Compiled forwards of learned drafters against their networks in float64, and against themselves: the same bits in any company."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.dflash.forward import NativeForward as NativeBlock
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.forward import NativeForward, TorchForward, forward_of
from outrider.drafters.eagle.network import EagleConfig, EagleNetwork
from outrider.drafters.medusa.drafter import native, predictor
from outrider.drafters.medusa.format import MedusaConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.mtp.network import MtpConfig, MtpNetwork
from outrider.errors import CapacityError, RequestError
from outrider.nn.drafts import Rows
from outrider.nn.held import library_for
from outrider.nn.row_cache import RowCache
from tests.covering import covering, slow_beyond

LIBRARY: Any = library_for(torch.ones(1))
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="compiled drafters need a C++ compiler")

V, WIDE, ROOM = 101, 40, 48
TOLERANCE = {True: 0.1, False: 2e-4}
"""Of logits of a few nats. bfloat16 keeps 8 bits: a product of rounded numbers errs by some 2^-9 of its size, and the paths here
have about ten, of terms that partly cancel. In float32 they err by 2^-24 each, summed over some hundred terms."""


def filled(model: Any, seed: int = 3) -> Any:
    """Weights that make logits of some nats, and that bfloat16 holds exactly."""
    noise = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1
        middle = 0.0 if p.dim() > 1 else 1.0
        p.data = (middle + scale * torch.randn(p.shape, generator=noise)).bfloat16().float()
    return model.eval().requires_grad_(False)


def eagle(kind: str) -> EagleNetwork:
    if kind == "eagle1":
        return filled(Eagle1Network(EagleConfig(WIDE, WIDE, (3,), V, 4, 2, 10, 56)))
    if kind.startswith("mtp"):
        biased = kind == "mtp with biases"
        return filled(MtpNetwork(MtpConfig(WIDE, WIDE, (3,), V, 4, 2, 10, 56, bias=biased, qk_norm=biased)))
    config = EagleConfig(48, WIDE, (1, 2), V, 4, 2, 12, 72, norm_before_residual=kind == "normed residual")
    if kind == "few tokens":
        some = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:37]
        return filled(Eagle3Network(EagleConfig(48, WIDE, (1, 2), V, 4, 4, 12, 72, draft_vocab=37), some))
    return filled(Eagle3Network(config))


KINDS = ("eagle3", "normed residual", "few tokens", "eagle1", "mtp", "mtp with biases")


def double(model: Any) -> Any:
    """A copy in float64: without compiled or packed products."""
    return copy.deepcopy(model).double()


def new_cache(run: Any, model: Any, layers: int = 1) -> RowCache:
    c = model.config
    return RowCache(layers, 3, c.kv_heads, ROOM, c.head_dim, run.dtype, torch.device("cpu"))


def taps_for(model: Any, dtype: torch.dtype) -> list[Tensor]:
    noise = torch.Generator().manual_seed(9)
    size = getattr(model.config, "target_hidden", None) or model.config.hidden
    return [torch.randn(12, size, generator=noise).to(dtype) for _ in model.config.taps]


def some_levels(run: Any, model: Any, taps: list[Tensor]) -> list[Tensor]:
    """Logits of two sequences that catch up, of a tree's two levels in one of them, and of a kept state."""
    cache = new_cache(run, model)
    rows = Rows()
    rows.add(2, 0, [5, 6, 7, 8], range(4))
    rows.add(0, 0, [9, 3], [6, 7])
    rows.scored = [3, 5, 0]
    state, first = run.forward(rows, cache, taps=taps, tap_rows=[0, 2, 3, 4, 7, 8])
    level = Rows(scored=[0, 1, 2])
    level.add(2, 4, [9, 10], [4, 4], [-1, -1])
    level.add(0, 2, [4], [8], [-1])
    above, second = run.forward(level, cache, feature=model.feed(torch.stack([state[3], state[3], state[5]])))
    level = Rows(scored=[0, 1, 2])
    level.add(2, 4, [11, 12, 13], [5] * 3, [-1, -1, 0, 1, 1])
    _, third = run.forward(level, cache, feature=model.feed(torch.stack([above[0], above[1], above[1]])))
    return [first, second, third, run.logits(state[3][None])]


CASES = list(product(KINDS, (True, False), (torch.float32, torch.bfloat16)))


@pytest.mark.parametrize(("kind", "narrow", "dtype"), slow_beyond(CASES, covering(CASES)))
def test_a_level_is_the_networks(kind: str, narrow: bool, dtype: torch.dtype, threads: None) -> None:
    model = eagle(kind)
    taps = taps_for(model, dtype)
    exact = double(model)
    found = some_levels(NativeForward(LIBRARY, model, narrow=narrow), model, taps)
    wanted = some_levels(TorchForward(exact, ROOM), exact, taps)
    for own, twin in zip(found, wanted, strict=True):
        known = torch.isfinite(twin)
        assert torch.equal(torch.isfinite(own), known) and known.any()
        assert (own - twin)[known].abs().max() < TOLERANCE[narrow] < twin[known].std()
        best = twin.topk(2).values
        clear = best[:, 0] - best[:, 1] > 2 * TOLERANCE[narrow]
        assert torch.equal(own.argmax(-1)[clear], twin.argmax(-1)[clear])  # greedy drafts are the twin's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [True, False])
def test_a_row_has_its_bits_in_any_company(kind: str, narrow: bool, threads: None) -> None:
    """Alone, one by one, from another slot, and beside other sequences; a kept state's logits are those of its row."""
    model = eagle(kind)
    run, taps = NativeForward(LIBRARY, model, narrow=narrow), taps_for(model, torch.bfloat16)
    first, second, third, kept = some_levels(run, model, taps)
    assert torch.equal(kept[0], first[0])
    cache = new_cache(run, model)
    for at, (token, tap) in enumerate(zip([5, 6, 7, 8], [0, 2, 3, 4], strict=True)):
        rows = Rows(scored=[0])
        rows.add(1, at, [token], [at])
        state, logits = run.forward(rows, cache, taps=taps, tap_rows=[tap])
    assert torch.equal(logits[0], first[0])
    for token, child, level, leaf in ((9, 11, second[0], third[0]), (10, 13, second[1], third[2])):
        chain = Rows(scored=[0])
        chain.add(1, 4, [token], [4], [-1])
        above, logits = run.forward(chain, cache, feature=model.feed(state))
        assert torch.equal(logits[0], level)
        chain = Rows(scored=[0])
        chain.add(1, 4, [child], [5], [-1, 0])
        assert torch.equal(run.forward(chain, cache, feature=model.feed(above))[1][0], leaf)


def block_model(layers: int = 2) -> DFlashNetwork:
    return filled(DFlashNetwork(DFlashConfig(WIDE, (1, 3), V, 4, 2, 10, 56, block=5, mask=V - 1, layers=layers)))


def blocks(run: NativeBlock, model: DFlashNetwork, taps: list[Tensor], slots: list[int]) -> Tensor:
    """Logits of a block behind the context of each of `slots`: 4 injected rows, in two parts; [slots, 4, V]."""
    cache = new_cache(run, model, model.config.layers)
    for begin, count in ((0, 3), (3, 1)):
        rows = Rows()
        for slot in slots:
            rows.add(slot, begin, [0] * count, range(begin, begin + count))
        run.inject(rows, cache, taps, [4 * s + begin + i for s in slots for i in range(count)])
    rows = Rows(mutual=True)
    for slot in slots:
        rows.add(slot, 4, [7 + slot, *(V - 1,) * 4], range(4, 9))
    rows.scored = [5 * n + level for n in range(len(slots)) for level in range(1, 5)]
    return run.block(rows, cache).view(len(slots), 4, V)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_the_networks(narrow: bool, dtype: torch.dtype, threads: None) -> None:
    model = block_model()
    taps = taps_for(model, dtype)
    found = blocks(NativeBlock(LIBRARY, model, narrow=narrow), model, taps, [0, 2])
    exact = double(model)
    for n, slot in enumerate((0, 2)):
        hidden = torch.stack([t[4 * slot : 4 * slot + 4].double() for t in taps], 1)[None]
        wanted = exact.blocks(exact.inject(hidden), torch.tensor([[7 + slot]]), torch.tensor([[4]]))[0, 0]
        assert (found[n] - wanted).abs().max() < TOLERANCE[narrow] < wanted.std()


@pytest.mark.parametrize("narrow", [True, False])
def test_a_block_has_its_bits_in_any_company(narrow: bool, threads: None) -> None:
    model = block_model()
    run, taps = NativeBlock(LIBRARY, model, narrow=narrow), taps_for(model, torch.float32)
    together = blocks(run, model, taps, [2, 0, 1])
    for n, slot in enumerate((2, 0, 1)):
        assert torch.equal(blocks(run, model, taps, [slot])[0], together[n])


@pytest.mark.parametrize(("shared", "layers", "few"), [(True, 1, False), (False, 2, True), (True, 2, True)])
@pytest.mark.parametrize("narrow", [True, False])
def test_heads_are_the_networks(shared: bool, layers: int, few: bool, narrow: bool, threads: None) -> None:
    """All levels and fewer; a row alone has the bits it has among others."""
    config = MedusaConfig(WIDE, V, 4, 3, layers, shared, draft_vocab=37 if few else 0)
    model: MedusaNetwork = filled(MedusaNetwork(config))
    if few:
        model.support = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:37]
    state = torch.randn(5, WIDE, generator=torch.Generator().manual_seed(2))
    found = native(LIBRARY, model, 4, narrow=narrow)(state)
    wanted = double(model)(state.double()).transpose(0, 1)
    known = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(found), known)
    assert (found - wanted)[known].abs().max() < TOLERANCE[narrow] < wanted[known].std()
    for i in range(5):
        assert torch.equal(native(LIBRARY, model, 3, narrow=narrow)(state[i : i + 1])[:, 0], found[:3, i])


def test_refuses_what_would_read_or_write_elsewhere() -> None:
    model = eagle("eagle3")
    run, taps = NativeForward(LIBRARY, model), taps_for(model, torch.float32)
    cache = new_cache(run, model)

    def forward(
        token: int = 1, slot: int = 0, cached: int = 0, parents: list[int] | None = None, scored: int = 0
    ) -> None:
        rows = Rows(scored=[scored])
        rows.add(slot, cached, [token], [cached], parents)
        run.forward(rows, cache, taps=taps, tap_rows=[0])

    forward()
    with pytest.raises(RequestError, match="vocabulary"):
        forward(token=V)
    with pytest.raises(CapacityError, match="max_length"):
        forward(cached=ROOM)
    with pytest.raises(CapacityError, match="max_length"):
        forward(cached=ROOM - 1, parents=[-1, 0])
    for wrong in ({"slot": 3}, {"cached": -1}, {"parents": [-1, 1]}, {"parents": [-2]}, {"scored": 1}):
        with pytest.raises(ValueError, match="do not describe"):
            forward(**wrong)  # type: ignore[arg-type]


def test_hidden_states_that_do_not_fit_are_refused() -> None:
    model = eagle("eagle3")
    run, taps = NativeForward(LIBRARY, model), taps_for(model, torch.float32)
    cache = new_cache(run, model)
    rows = Rows()
    rows.add(0, 0, [1], [0])
    for hidden, at, feature in (
        (taps, [12], None),
        (taps[:1], [0], None),
        (taps, [], None),
        ((), (), torch.ones(2, 48)),
        ((), (), None),
    ):
        with pytest.raises(ValueError, match="hidden states"):
            run.forward(rows, cache, taps=hidden, tap_rows=at, feature=feature)


def test_a_cache_or_a_state_of_other_sizes_is_refused() -> None:
    model = eagle("eagle3")
    run, rows = NativeForward(LIBRARY, model), Rows()
    rows.add(0, 0, [1], [0])
    other = RowCache(
        1, 3, 2, ROOM, 12, torch.float32, torch.device("cpu")
    )  # the cache of bfloat16 products is bfloat16
    with pytest.raises(ValueError, match="cache"):
        run.forward(rows, other, feature=torch.ones(1, 48))
    with pytest.raises(ValueError, match="hidden states of 48"):
        run.logits(torch.ones(1, 47))


def test_is_switched_off_and_needs_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, heads = eagle("eagle3"), filled(MedusaNetwork(MedusaConfig(WIDE, V, 2, 3)))
    assert isinstance(forward_of(model, ROOM), NativeForward)
    assert isinstance(forward_of(double(model), ROOM), TorchForward)
    compiled = predictor(heads, 2)
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    assert isinstance(forward_of(model, ROOM), TorchForward)
    state = torch.randn(3, WIDE)
    torch.testing.assert_close(predictor(heads, 2)(state), compiled(state), rtol=0, atol=TOLERANCE[True])
