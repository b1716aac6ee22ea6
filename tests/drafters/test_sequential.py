"""Sequential heads: they serve what they were trained as, the compiled forward is the network's, folders say what they hold."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.drafters.eagle import forward as eagle
from outrider.drafters.eagle.drafter import EagleDrafter, SlotState
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.medusa.format import SequentialConfig
from outrider.drafters.medusa.network import MedusaNetwork
from outrider.drafters.medusa.sequential import SequentialNetwork
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter
from outrider.drafters.medusa.sequential_forward import NativeForward, TorchForward, forward_of
from outrider.drafters.registry import load_drafter
from outrider.errors import CapabilityError, ConfigError, RequestError
from outrider.evaluate.planning.vllm_draft import method_of
from outrider.models.load import load_target
from outrider.models.toy import TinyLM
from tests.checkpoints import make_checkpoint
from tests.drafters.drafting import Seen
from tests.drafters.networks import TAPS, TARGET, H, V, feature_model
from tests.drafters.networks import heads as medusa_heads
from tests.drafters.test_drafters_learned import GROWTHS, decode, states
from tests.drafters.test_native_drafts import LIBRARY, TOLERANCE, WIDE, double, filled
from tests.drafters.test_native_drafts import V as MANY
from tests.plain_text import assert_plain_text

compiled = pytest.mark.skipif(LIBRARY is None, reason="compiled drafters need a C++ compiler")


@cache
def heads(layers: int = 2) -> SequentialNetwork:
    torch.manual_seed(5)
    model = SequentialNetwork(SequentialConfig(H, V, TAPS, 12, 20, layers)).double().eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.5)
    return model


@pytest.mark.parametrize("how", GROWTHS)
def test_sequential_heads_serve_what_they_were_trained_as(how: str) -> None:
    """After any history every logit served is that of the training-time unroll of the same tokens."""
    model, seen = heads(), Seen(GROWTHS[how]())
    drafter: Any = SequentialDrafter(model, cast(Any, seen))
    decode(drafter, 3)
    assert len(seen.logits) > 60
    for history, path, rows in seen.along():
        tokens = torch.tensor([[*history, *path]])[:, -len(path) - 2 :]
        found = model.unroll(tokens, states(history[:-1])[None, -1:], len(rows))
        for row, level in zip(rows, found, strict=True):
            torch.testing.assert_close(row, level[0, 0], rtol=0, atol=2e-4)


def test_sequential_heads_read_what_stands_above_and_nothing_else() -> None:
    """Level s at column i changes with tokens i + 1 .. i + s + 1 and hidden states at i alone; every one of them is read."""
    model, g = heads(), torch.Generator().manual_seed(0)
    tokens, taps = torch.randint(V, (1, 12), generator=g), torch.randn(1, 8, 2, H, generator=g, dtype=torch.float64)
    base = model.unroll(tokens, taps, 3)
    for t in range(12):
        other = tokens.clone()
        other[0, t] = (other[0, t] + 1) % V
        for s, (a, b) in enumerate(zip(base, model.unroll(other, taps, 3), strict=True)):
            assert (a != b).any(-1)[0].tolist() == [i + 1 <= t <= i + s + 1 for i in range(8)]
    for t in range(8):
        other = taps.clone()
        other[0, t] += 1.0
        for a, b in zip(base, model.unroll(tokens, other, 3), strict=True):
            assert (a != b).any(-1)[0].tolist() == [i == t for i in range(8)]


def wide(layers: int = 2) -> SequentialNetwork:
    return filled(SequentialNetwork(SequentialConfig(WIDE, MANY, (1, 3), 56, 100, layers)))


def two_levels(run: Any, taps: Tensor) -> list[Tensor]:
    """States and logits of two levels of three and four rows."""
    state, logits = run.forward([5, 0, MANY - 1], taps=taps[:, 2:5])
    below, further = run.forward([9, 9, 1, 2], state=state[[0, 1, 1, 2]])
    return [state, logits, below, further]


@compiled
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequential_heads_are_the_networks(layers: int, narrow: bool, dtype: torch.dtype, threads: None) -> None:
    model = wide(layers)
    taps = torch.randn(2, 8, WIDE, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = two_levels(NativeForward(LIBRARY, model, narrow=narrow), taps)
    wanted = two_levels(TorchForward(double(model)), taps)
    for own, twin in zip(found, wanted, strict=True):
        assert (own - twin).abs().max() < TOLERANCE[narrow] < twin.std()


@compiled
@pytest.mark.parametrize("narrow", [True, False])
def test_a_row_of_sequential_heads_has_its_bits_in_any_company(narrow: bool, threads: None) -> None:
    run = NativeForward(LIBRARY, wide(), narrow=narrow)
    taps = torch.randn(2, 8, WIDE, generator=torch.Generator().manual_seed(9))
    state, logits, below, further = two_levels(run, taps)
    for n, (token, above) in enumerate(((9, 0), (9, 1), (1, 1), (2, 2))):
        alone, row = run.forward([(5, 0, MANY - 1)[above]], taps=taps[:, 2 + above : 3 + above])
        assert torch.equal(alone[0], state[above]) and torch.equal(row[0], logits[above])
        alone, row = run.forward([token], state=alone)
        assert torch.equal(alone[0], below[n]) and torch.equal(row[0], further[n])


@compiled
def test_sequential_heads_refuse_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(1)
    run: Any = forward_of(model)
    assert isinstance(run, NativeForward) and isinstance(forward_of(double(model)), TorchForward)
    for token in (MANY, -1):
        with pytest.raises(RequestError, match="vocabulary"):
            run.forward([token], state=torch.ones(1, 56))
    for wrong in ({}, {"state": torch.ones(2, 56)}, {"state": torch.ones(1, 55)}, {"taps": torch.ones(1, 1, WIDE)}):
        with pytest.raises(ValueError, match="sequential heads need"):
            run.forward([1], **wrong)
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    twin = forward_of(model)
    assert isinstance(twin, TorchForward)
    state = torch.randn(3, 56)
    torch.testing.assert_close(
        twin.forward([1, 2, 3], state=state)[1], run.forward([1, 2, 3], state=state)[1], rtol=0, atol=TOLERANCE[True]
    )


# ---------------------------------------------------------------------------------------------------------- folders
def test_a_folder_holds_all_but_the_targets_table(tmp_path: Path) -> None:
    """What is written is read again, rounded to bfloat16 and not otherwise; one more trip changes nothing."""
    for layers in (1, 2):
        model, folder, again = heads(layers), tmp_path / f"{layers}", tmp_path / f"{layers}-again"
        model.save(folder)
        blocks = ("norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        names = {f"layers.{n}.{part}" for n in range(layers) for part in blocks} | {"fc", "token", "norm", "lm_head"}
        written = load_file(folder / "model.safetensors")
        assert set(written) == {f"{name}.weight" for name in names}
        read = SequentialNetwork.load(folder, TARGET)
        assert read.config == model.config
        assert all(torch.equal(read.state_dict()[n], model.state_dict()[n].bfloat16().float()) for n in written)
        torch.testing.assert_close(read.embed_tokens.weight, TARGET.embed(torch.arange(V)).float())
        read.save(again)
        assert (folder / "config.json").read_text() == (again / "config.json").read_text()
        assert all(torch.equal(t, written[n]) for n, t in load_file(again / "model.safetensors").items())


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    heads().save(tmp_path / "heads")

    def load(spec: str, length: int = 9) -> Any:
        return load_drafter(spec, target=TARGET, length=length)

    for spec in (f"medusa:{tmp_path / 'heads'}", str(tmp_path / "heads")):
        found = load(spec)
        assert (type(found), found.name, found.layers, found.max_depth) == (SequentialDrafter, "medusa", TAPS, 9)
    assert load(f"greedy:medusa:{tmp_path / 'heads'}").growth.sample == "greedy"
    assert load(f"tree:3x2:{tmp_path / 'heads'}").max_nodes == 9
    assert load(f"dynamic:12:{tmp_path / 'heads'}").max_nodes == 12
    assert load(f"stop:0.3:{tmp_path / 'heads'}").growth.least == 0.3
    with pytest.raises(ConfigError, match="not supported for this drafter"):  # the other reader
        MedusaNetwork.load(tmp_path / "heads", TARGET)
    with pytest.raises(CapabilityError, match="of width 16 and 19 tokens"):
        SequentialNetwork.load(tmp_path / "heads", TinyLM(V, 32, 3))
    with pytest.raises(CapabilityError, match="reads layers"):
        SequentialNetwork.load(tmp_path / "heads", TinyLM(V, H, 2))
    assert method_of("medusa", str(tmp_path / "heads")) is None  # vLLM has no such heads
    path = tmp_path / "heads" / "config.json"
    path.write_text(path.read_text().replace('"sequential": true', '"sequential": false'))
    with pytest.raises(ConfigError, match="do not follow one another"):
        SequentialNetwork.load(tmp_path / "heads", TARGET)


def test_a_table_of_its_own_is_refused(tmp_path: Path) -> None:
    """Heads read their target's embeddings: a folder's own would be replaced, and the heads were not trained for those."""
    heads().save(tmp_path / "heads")
    path = tmp_path / "heads" / "model.safetensors"
    save_file(load_file(path) | {"embed_tokens.weight": torch.zeros(V, H)}, path)
    with pytest.raises(ConfigError, match=r"holds embed_tokens\.weight"):
        SequentialNetwork.load(tmp_path / "heads", TARGET)


@pytest.mark.parametrize("kind", ["hydra", "eagle"])
def test_the_twin_keeps_rows_of_tokens_and_not_what_they_are_made_of(kind: str) -> None:
    model = copy.deepcopy(heads() if kind == "hydra" else feature_model())
    table = weakref.ref(model.embed_tokens.weight)
    twin = TorchForward(model) if isinstance(model, SequentialNetwork) else eagle.TorchForward(model, 20)
    del model
    gc.collect()
    assert twin is not None and table() is None


def tensors_in(x: object) -> list[Tensor]:
    """Those in collections, and the states of context rows that drafters keep of a slot."""
    if isinstance(x, Tensor):
        return [x]
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    inside = (x.state,) if isinstance(x, SlotState) else inside
    return [tensor for each in inside for tensor in tensors_in(each)]


@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle"])
def test_a_slot_keeps_one_row_alive(kind: str) -> None:
    """What is kept of a step is a copy of one row, not a view of all of them."""
    growth = GROWTHS["chain"]()
    drafter: Any = (
        MedusaDrafter(medusa_heads(), growth)
        if kind == "medusa"
        else SequentialDrafter(heads(), growth)
        if kind == "hydra"
        else EagleDrafter(feature_model(), growth)
    )
    make, sizes = drafter.draft, []

    def draft(*given: Any) -> Any:
        made = make(*given)
        sizes.extend((x.untyped_storage().nbytes(), x.nbytes) for x in tensors_in(list(vars(drafter).values())))
        return made

    drafter.draft = draft
    decode(drafter, 3)
    assert len(sizes) > 20
    assert all(held == own for held, own in sizes)


def test_greedy_text_is_the_targets(tmp_path: Path) -> None:
    """Chains and trees of a real target's hidden states, several sequences; the heads are random, the text is not."""
    place = make_checkpoint(tmp_path / "target", "qwen3", tokenizer=True)
    torch.manual_seed(0)
    vocab = load_target(place, dtype="float32").vocab_size
    SequentialNetwork(SequentialConfig(48, vocab, (1, 3), 32, 64)).save(tmp_path / "medusa")
    assert_plain_text(place, ("medusa", "tree:2x2:medusa", "dynamic:6:medusa"), length=3, proposed=20)
