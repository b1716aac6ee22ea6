"""From text to a drafter: rows and their errors, data that continues where it stopped, a run killed and resumed bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.assets import shipped
from outrider.build import Engine
from outrider.control.fixed import Fixed
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter
from outrider.drafters.none import NoDraft
from outrider.drafters.target_tables import output_of
from outrider.drafters.tree.growth import Levels
from outrider.drafters.tree.shapes import levels
from outrider.errors import ConfigError
from outrider.models.tokenizer import load_tokenizer, vocab_fingerprint, whole_tokenizer
from outrider.models.toy import TinyLM
from outrider.params import SamplingParams
from outrider.train import losses
from outrider.train.data import Document
from outrider.train.distill import Teacher, loss_of, measure_of
from outrider.train.features import DataSpec, Features, read_features, repeated, write_hidden, write_tokens
from outrider.train.loop import DivergedError, LoopConfig, train
from outrider.train.methods.eagle import new_features
from outrider.train.methods.hydra import new_sequence
from outrider.train.methods.medusa import new_heads
from outrider.train.methods.registry import METHODS
from outrider.verify import load_rule

V, H = 19, 16
TARGET = TinyLM(V, H, 3, seed=1, sharp=3.0, dtype=torch.float32)
QUIET = {"report": lambda _: None}


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % V for c in text]

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(97 + i) for i in ids)


def engine(slots: int = 3) -> Engine:
    return Engine(
        TARGET, NoDraft(), load_rule("speculative_sampling"), Fixed(0), slots=slots, max_length=64, tokenizer=Letters()
    )


DOCUMENTS = [Document(f"{i}", "\n".join(f"line {j * i % 7} of text {i}" for j in range(40))) for i in range(5)]
WANTED = DataSpec(rows=10, prompt=8, length=24, seed=2)


# ------------------------------------------------------------------------------------------------------------- data
class StopsAfter(Exception):
    pass


def test_data_continues_where_it_stopped(tmp_path: Path) -> None:
    """A run interrupted after every report ends with the same rows and the same hidden states as one that was not."""
    whole = write_tokens(engine(), DOCUMENTS, WANTED, tmp_path / "whole", **QUIET)
    states = write_hidden(TARGET, whole, (1, 3), tmp_path / "whole", **QUIET)

    def stop(_: str) -> None:
        raise StopsAfter

    for _ in range(20):
        try:
            tokens = write_tokens(engine(1), DOCUMENTS, WANTED, tmp_path / "parts", report=stop)
            write_hidden(TARGET, tokens, (1, 3), tmp_path / "parts", rows=3, report=stop)
            break
        except StopsAfter:
            continue
    else:
        raise AssertionError("it never ended")
    assert np.array_equal(whole, np.load(tmp_path / "parts" / "tokens.npy"))
    np.testing.assert_allclose(states, np.load(tmp_path / "parts" / "hidden.npy"), rtol=0, atol=2e-2)
    with pytest.raises(ConfigError, match="use a new folder"):
        write_tokens(engine(), DOCUMENTS, replace(WANTED, temperature=0.5), tmp_path / "whole", **QUIET)
    with pytest.raises(ConfigError, match="not of"):
        read_features(tmp_path / "whole", (2,), rows=2, seed=0)


def test_what_goes_in_circles_is_left_out(tmp_path: Path) -> None:
    assert repeated(np.arange(40)) == 0.0
    assert repeated(np.tile(np.arange(5), 8)) > 0.5
    tokens = write_tokens(engine(), DOCUMENTS, WANTED, tmp_path, **QUIET)
    tokens[3] = np.tile(np.arange(4), 6)
    write_hidden(TARGET, tokens, (1, 3), tmp_path, **QUIET)
    said: list[str] = []
    data = read_features(tmp_path, (3,), rows=2, seed=0, report=said.append)
    assert said == ["1 of 10 rows go in circles and are left out"]
    assert len(data.tokens) == 9
    assert np.array_equal(data.take([3])[0][0].numpy(), tokens[4])


def test_a_draft_model_gets_the_whole_tokenizer(tmp_path: Path) -> None:
    """The shipped target's tokenizer is loaded without transformers; what is written beside a draft is all of it."""
    whole_tokenizer(shipped("target")).save_pretrained(tmp_path)
    ours, written = load_tokenizer(shipped("target")), load_tokenizer(tmp_path)
    assert vocab_fingerprint(ours) == vocab_fingerprint(written)
    assert written.eos_token_id == ours.eos_token_id
    assert whole_tokenizer(tmp_path).pad_token_id is not None


def test_too_little_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only 0 pieces of 8 tokens"):
        write_tokens(engine(), [Document("a", "x\ny")], WANTED, tmp_path, **QUIET)


# --------------------------------------------------------------------------------------------------------- training
def setup(kind: str) -> tuple[torch.nn.Module, Teacher, Features]:
    tokens = torch.randint(V, (16, 24), generator=torch.Generator().manual_seed(0))
    from outrider.train.features import hidden_of

    hidden = hidden_of(TARGET, tokens, (1, 2, 3))
    data = Features(tokens.numpy().astype(np.uint16), hidden.half().numpy(), (1, 2, 3), rows=4)
    if kind == "medusa":
        return new_heads(MedusaConfig(H, V, 3, 3), TARGET), Teacher.of(TARGET, (1, 2, 3), (3,)), data
    seen = hidden[:, :, [0, 2]].flatten(0, 1)
    if kind == "hydra":
        model = new_sequence(SequentialConfig(H, V, (1, 3), 16, 32), TARGET, seen)
        return model, Teacher.of(TARGET, (1, 2, 3), (1, 3)), data
    model = new_features(EagleConfig(16, H, (1, 3), V, 2, 1, 8, 32), TARGET, seen)
    return model, Teacher.of(TARGET, (1, 2, 3), (1, 3)), data


def fit(kind: str, folder: Path, stop_at: tuple[int, ...] = (), *, autocast: bool = False) -> dict[str, Tensor]:
    """Train in `folder`; raise StopsAfter right after the checkpoint of a step in `stop_at`."""
    model, judge, data = setup(kind)
    config = LoopConfig(steps=12, lr=1e-2, warmup=2, save_every_s=0.0, log_every=1, autocast=autocast)
    predict = METHODS[kind].predictor(3)

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        return measure_of(judge, predict, data, rows=4)(m)

    def report(line: str) -> None:
        if any(line.startswith(f"step {n}/") for n in stop_at):
            raise StopsAfter

    loss = loss_of(judge, predict, scored=partial(METHODS[kind].scored, levels=3))
    train(model, data, loss, config, folder, evaluate, report)
    return model.state_dict()


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_killed_run_ends_with_the_same_bits(kind: str, autocast: bool, tmp_path: Path) -> None:
    want = fit(kind, tmp_path / "whole", autocast=autocast)
    for n in (3, 4, 9):
        with pytest.raises(StopsAfter):
            fit(kind, tmp_path / "parts", stop_at=(n,), autocast=autocast)
    found = fit(kind, tmp_path / "parts", autocast=autocast)
    assert all(torch.equal(want[name], found[name]) for name in want)


@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle"])
def test_training_raises_acceptance(kind: str) -> None:
    model, judge, data = setup(kind)
    predict = METHODS[kind].predictor(3)
    measure = measure_of(judge, predict, data)
    before = measure(model)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(40):
        adam.zero_grad()
        loss_of(judge, predict)(model, data(step), 0.0).backward()
        adam.step()
    after = measure(model)
    assert after["accept_1"] > before["accept_1"] + 0.03
    assert after["tokens"] > before["tokens"] + 0.03


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model, judge, data = setup("medusa")
    with torch.no_grad():
        model.lm_heads[0].weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(DivergedError, match="step 0"):
        train(
            model, data, loss_of(judge, METHODS["medusa"].predictor(3)), LoopConfig(steps=2, lr=1e-3), tmp_path, **QUIET
        )


def test_labels_stand_at_their_tokens() -> None:
    """A drafter that knows the target's distributions is accepted everywhere: the alignment of levels, columns and labels."""
    _, judge, data = setup("eagle")
    tokens, hidden = data.take([0, 1])
    distributions = judge.distributions(hidden)

    def oracle(model: object, seen: Tensor, taps: Tensor) -> list[Tensor]:
        assert taps.shape[2] == 2
        return [distributions[:, d + 1 : 20] for d in range(3)]

    for d, (p, q) in enumerate(judge.pairs(None, (tokens, hidden), oracle)):
        assert torch.equal(p, q), d


def test_the_output_matrix_is_the_targets_own() -> None:
    x = torch.randn(5, H)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(x @ output_of(TARGET).T, TARGET.unembed(x), rtol=1e-4, atol=1e-4)


def taught(kind: str) -> tuple[torch.nn.Module, Teacher]:
    """A drafter after a few steps: neither the target's copy nor noise."""
    model, judge, data = setup(kind)
    loss, adam = loss_of(judge, METHODS[kind].predictor(3)), torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(30):
        adam.zero_grad()
        loss(model, data(step), 0.0).backward()
        adam.step()
    return model.eval().requires_grad_(False), judge


@pytest.mark.parametrize("kind", ["medusa", "hydra", "eagle"])
def test_the_trainers_acceptance_by_position_is_the_engines(kind: str) -> None:
    """Train-serve parity on frozen prompts, at every anchor the engine drafted from and every depth that was judged there.

    Node by node the trainer's acceptance, sum min(p, q) on the finished rows, is one minus what the engine's ledger booked for
    it: their sums agree to rounding. So the engine's accepted counts at each depth lie within 6 standard deviations of the
    trainer's sums (a martingale; false alarms below 1e-8 a depth). Control: the trainer's
    columns one place off foretell what was accepted far worse.
    """
    from outrider.train.features import hidden_of

    model, judge = taught(kind)
    depth, more, n = 3, 24, 60
    growth = Levels(levels((1,) * depth), V)
    made = {"medusa": MedusaDrafter, "hydra": SequentialDrafter, "eagle": EagleDrafter}[kind]
    drafter = made(model, growth)  # type: ignore[arg-type]
    one = Engine(TARGET, drafter, load_rule("speculative_sampling"), Fixed(depth), slots=16, max_length=64)
    texts: dict[str, list[int]] = {}
    for i in range(n):
        prompt = [1 + i % 7, 3, 5 + i % 11]
        texts[one.submit(prompt, SamplingParams(max_tokens=more, seed=i, ignore_eos=True))] = prompt
    judged: list[tuple[str, int, int, bool]] = []  # request, anchor's position, depth, accepted
    for event in one.run():
        text = texts[event.request]
        at, room, accepted = len(text) - 1, 3 + more - len(text), len(event.tokens) - 1
        if at >= 3:  # the first verdict follows the prompt and judges nothing
            tried = min(depth, room - 1)
            judged += [(event.request, at, d, d < accepted) for d in range(min(accepted + 1, tried))]
        text += event.tokens
    assert len(judged) == one.counts.judged

    names = list(texts)
    rows = torch.tensor([texts[name] + [0] * (depth + 2) for name in names])  # behind the text nothing is judged
    hidden = hidden_of(TARGET, rows, (1, 2, 3))
    trainer = [losses.acceptance(p, q) for p, q in judge.pairs(model, (rows, hidden), METHODS[kind].predictor(depth))]

    def at_nodes(shift: int) -> torch.Tensor:
        found = [trainer[d][names.index(name), at - 1 + shift] for name, at, d, _ in judged]
        return torch.stack(found).clamp(1e-6, 1 - 1e-6)

    kept = torch.tensor([good for *_, good in judged])
    honest, shifted = at_nodes(0), at_nodes(-1)
    assert float((1 - honest).sum()) == pytest.approx(one.counts.risk, abs=1e-3 * len(judged))
    predicted = [torch.where(kept, x, 1 - x).log().sum().item() for x in (honest, shifted)]
    assert predicted[0] > predicted[1] + 20, "the control foretells what was accepted as well"
    for d in range(depth):
        chance = torch.tensor([trainer[d][names.index(name), at - 1].item() for name, at, e, _ in judged if e == d])
        count = sum(good for *_, e, good in judged if e == d)
        assert count == one.counts.accepted_at[d]
        assert len(chance) > 50
        assert abs(count - chance.sum().item()) < 6 * float((chance * (1 - chance)).sum().sqrt())


def test_rows_have_several_temperatures_in_turn(tmp_path: Path) -> None:
    """Each row is the one that a folder of its temperature alone has."""
    texts = [
        write_tokens(engine(), DOCUMENTS, replace(WANTED, temperature=t), tmp_path / str(i), **QUIET)
        for i, t in enumerate(((0.0, 1.0), 0.0, 1.0))
    ]
    assert np.array_equal(texts[0][::2], texts[1][::2]) and np.array_equal(texts[0][1::2], texts[2][1::2])
    assert not np.array_equal(texts[1], texts[2])
    with pytest.raises(ConfigError, match="name the temperature"):
        replace(WANTED, temperature=())
