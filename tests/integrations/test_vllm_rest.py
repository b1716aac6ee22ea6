"""A drafter that rests while nothing is drafted ends with the cache that it would have had, on random schedules."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from outrider.integrations.vllm.plain_steps import let_steps_be_plain
from outrider.integrations.vllm.rest import ROOM, Resting, let_rest

HIDDEN = 3


@dataclass
class About:
    """As much of vLLM's `CommonAttentionMetadata` as a drafter reads."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    slot_mapping: torch.Tensor


class Cache:
    """A drafter: of every place the token behind it, the position and the hidden state that it read there."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, int, float]] = {}
        self.calls = self.rows = self.widest = 0

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: Any,
    ) -> torch.Tensor:
        about, bounds = common_attn_metadata, common_attn_metadata.query_start_loc_cpu.tolist()
        assert about.num_actual_tokens == len(target_token_ids) == len(about.slot_mapping) == bounds[-1]
        assert about.max_query_len == max(b - a for a, b in pairwise(bounds))
        self.calls, self.rows = self.calls + 1, self.rows + len(target_token_ids)
        self.widest = max(self.widest, len(target_token_ids))
        for i, (a, b) in enumerate(pairwise(bounds)):
            assert (target_positions[a:b].diff() == 1).all()
            behind = [*target_token_ids[a + 1 : b].tolist(), int(next_token_ids[i])]
            if token_indices_to_sample is not None:
                behind[int(token_indices_to_sample[i]) - a] = int(next_token_ids[i])
            for row, token in zip(range(a, b), behind, strict=True):
                place = int(about.slot_mapping[row])
                self.held[place] = (token, int(target_positions[row]), float(target_hidden_states[row, 0]))
        return torch.zeros(about.num_reqs, num_speculative_tokens, dtype=torch.int64)


@dataclass
class Text:
    """A sequence: its tokens, how many of them the target has read, and where its places begin."""

    name: str
    base: int
    tokens: list[int]
    read: int = 0
    drafted: int = 0


@dataclass
class World:
    """Random steps as vLLM makes them, for a drafter that rests and one that does not."""

    seed: int
    draw: random.Random = field(init=False)
    names: list[str] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.always, self.resting = Cache(), Cache()
        self.rest = Resting(self.resting.propose, lambda: self.names, 4096)
        self.texts: list[Text] = []

    def step(self, length: int) -> None:
        """Texts begin and end, all are read on by their draft and a token, and the drafter is asked for `length` tokens."""
        draw = self.draw
        self.texts = [t for t in self.texts if draw.random() < 0.98]
        while len(self.texts) < 2 or draw.random() < 0.03:
            self.count += 1
            tokens = [draw.randrange(50) for _ in range(draw.randrange(1, 9))]
            self.texts.append(Text(f"r{self.count}", 10_000 * self.count, tokens))
        for text in self.texts:
            if draw.random() < 0.01:  # preempted: read again from its beginning
                text.read = text.drafted = 0
        rows, last, following = [], [], []
        for text in self.texts:
            new = text.tokens[text.read :]
            kept = draw.randrange(text.drafted + 1)
            draft = [draw.randrange(50) for _ in range(text.drafted)]
            text.tokens += [*draft[:kept], draw.randrange(50)]
            rows.append([(text.base + text.read + i, text.read + i, token) for i, token in enumerate([*new, *draft])])
            last.append(len(new) + kept - 1)
            following.append(text.tokens[-1])
            text.read += len(new) + kept
        flat = [row for one in rows for row in one]
        starts = torch.tensor([0, *(len(one) for one in rows)]).cumsum(0)
        place, position, token = (torch.tensor(column) for column in zip(*flat, strict=True))
        about = About(starts, starts, len(rows), len(flat), max(map(len, rows)), place)
        hidden = (7.0 * place + token)[:, None].repeat(1, HIDDEN).float()
        self.names = [t.name for t in self.texts]
        given: dict[str, Any] = {
            "target_token_ids": token,
            "target_positions": position,
            "target_hidden_states": hidden,
            "next_token_ids": torch.tensor(following),
            "token_indices_to_sample": starts[:-1] + torch.tensor(last),
            "common_attn_metadata": about,
        }
        assert self.always.propose(num_speculative_tokens=length, **given).shape == (len(rows), length)
        self.ask(num_speculative_tokens=length, **given)
        hidden.fill_(-1.0)  # vLLM writes its buffers again
        for text in self.texts:
            text.drafted = length

    def ask(self, **given: Any) -> None:
        """The drafter that rests, with vLLM's arguments."""
        assert self.rest(**given).shape == (len(self.names), given["num_speculative_tokens"])

    def agree(self) -> bool:
        """Whether both caches hold the same for every token that was read and kept."""
        places = [t.base + i for t in self.texts for i in range(t.read)]
        return all(self.resting.held.get(p) == self.always.held[p] for p in places)


def test_what_waits_is_bounded() -> None:
    """Also where no draft is ever asked for, all is read in the end, a forward for many steps."""
    world = World(1)
    world.draw.random = lambda: 0.5  # type: ignore[method-assign]  # no text begins or ends
    for _ in range(4 * ROOM):
        world.step(0)
    assert world.resting.calls <= 6 and world.always.calls == 4 * ROOM
    assert world.resting.rows > 0.7 * world.always.rows


def test_no_more_waits_than_a_forward_takes() -> None:
    world = World(2)
    world.draw.random = lambda: 0.5  # type: ignore[method-assign]
    world.rest = Resting(world.resting.propose, lambda: world.names, 8)
    world.step(0)
    world.resting.widest = 0
    for _ in range(20):
        world.step(0)
    world.step(3)
    assert world.agree() and world.resting.widest <= 8 and world.resting.calls < 15


def test_what_does_not_fit_a_forward_is_left_out_instead_of_ending_the_server() -> None:
    world = World(2)
    world.draw.random = lambda: 0.5  # type: ignore[method-assign]
    world.rest = Resting(world.resting.propose, lambda: world.names, 8)
    for _ in range(3):
        world.step(0)
    world.texts.append(Text("long", 99_000, list(range(7))))
    world.resting.widest = 0
    world.step(3)
    assert world.resting.widest == 9  # vLLM's own step, without what waits


def test_rows_of_images_are_handed_on_as_they_are() -> None:
    seen = list[Any]()
    resting = Resting(lambda **given: seen.append(given), lambda: ["a"], 64)
    about = About(torch.tensor([0, 1]), torch.tensor([0, 1]), 1, 1, 1, torch.tensor([5]))
    given = {"common_attn_metadata": about, "num_speculative_tokens": 0, "target_token_ids": torch.tensor([7])}
    for position, images in ((torch.zeros(3, 1), None), (torch.zeros(1), ([], None))):
        resting(**given, target_positions=position, target_hidden_states=torch.zeros(1, 3), mm_embed_inputs=images)
    assert [one["target_positions"].dim() for one in seen] == [2, 1]


class State(NamedTuple):
    """What a step leaves for sampling."""

    scheduler_output: Any
    hidden_states: torch.Tensor
    aux_hidden_states: list[torch.Tensor]
    slot_mappings: dict[str, torch.Tensor]


class Runner:
    """As much of vLLM's runner as steps need: a step's rows in buffers, and a drafter that is asked where there is speculation."""

    use_aux_hidden_state_outputs, use_async_scheduling = True, False
    supports_mm_inputs = uses_mrope = False

    def __init__(self, rest: Resting, names: list[str]) -> None:
        self.speculative_config: Any = "eagle3"
        self.drafter = SimpleNamespace(propose=rest, _draft_attn_layer_names={"draft"})
        self.model_config = SimpleNamespace(is_hybrid=False)
        self.vllm_config = SimpleNamespace(kv_transfer_config=None)
        self.parallel_config = SimpleNamespace(pipeline_parallel_size=1)
        self.input_batch, self.given = SimpleNamespace(req_ids=names), dict[str, Any]()
        self.execute_model_state: State | None = None
        self.plain = 0
        self.input_ids = SimpleNamespace(gpu=torch.zeros(0))

    def get_model(self) -> object:
        return object()

    def _get_positions(self, n: int) -> torch.Tensor:
        return self.given["target_positions"][:n]

    def execute_model(self, scheduler_output: Any) -> None:
        hidden, about = self.given["target_hidden_states"], self.given["common_attn_metadata"]
        self.input_ids.gpu = self.given["target_token_ids"]
        self.plain += self.speculative_config is None
        several = list(hidden.clone().split(1, dim=-1))  # a forward's own tensors
        self.execute_model_state = State(scheduler_output, hidden[:, :1], several, {"draft": about.slot_mapping})

    def sample_tokens(self) -> Any:
        self.execute_model_state = None
        return self.drafter.propose(**self.given) if self.speculative_config else None


@dataclass
class PlainWorld(World):
    """Steps without drafts run as without speculation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.runner = Runner(self.rest, self.names)
        assert let_steps_be_plain(self.runner, State) == ""

    def ask(self, **given: Any) -> None:
        runner, starts = self.runner, given["common_attn_metadata"].query_start_loc.tolist()
        runner.given, runner.input_batch.req_ids = given, self.names
        drafts = {t.name: [1] * t.drafted for t in self.texts if t.drafted}
        rows = {name: b - a for name, (a, b) in zip(self.names, pairwise(starts), strict=True)}
        length = given["num_speculative_tokens"]
        out = SimpleNamespace(
            num_scheduled_tokens=rows,
            total_num_scheduled_tokens=starts[-1],
            scheduled_spec_decode_tokens=drafts,
            num_spec_tokens_to_schedule=length,
        )
        before = runner.plain
        runner.execute_model(out)
        drafted = runner.sample_tokens()
        assert runner.speculative_config == "eagle3"
        assert drafted is not None or not (length or drafts or max(rows.values()) > 1)
        assert (drafted is None) == (runner.plain > before)


@pytest.mark.parametrize("kind", [World, PlainWorld])
def test_the_cache_is_whole_whenever_a_draft_is_asked_for(kind: type[World]) -> None:
    for seed in range(20):
        world = kind(seed)
        for _ in range(150):
            length = world.draw.choice((0, 0, 0, 0, 0, 2))
            world.step(length)
            assert length == 0 or world.agree()
        assert world.resting.calls < 0.8 * world.always.calls
        assert not isinstance(world, PlainWorld) or world.runner.plain > 30


def test_a_step_that_fails_leaves_the_speculation_where_it_was() -> None:
    runner = Runner(Resting(Cache().propose, lambda: ["a"], 64), ["a"])
    runner.execute_model = lambda scheduler_output: 1 / 0  # type: ignore[method-assign]
    assert let_steps_be_plain(runner, State) == ""
    out = SimpleNamespace(
        num_scheduled_tokens={"a": 1},
        total_num_scheduled_tokens=1,
        scheduled_spec_decode_tokens={},
        num_spec_tokens_to_schedule=0,
    )
    with pytest.raises(ZeroDivisionError):
        runner.execute_model(out)
    assert runner.speculative_config == "eagle3"


def test_steps_are_plain_only_where_nothing_else_reads_what_drafts_leave() -> None:
    def changed(path: str, value: Any) -> Runner:
        runner = Runner(Resting(Cache().propose, lambda: ["a"], 64), ["a"])
        place, _, name = path.rpartition(".")
        setattr(getattr(runner, place) if place else runner, name, value)
        return runner

    for path, value, word in (
        ("use_async_scheduling", True, "asynchronous"),
        ("model_config.is_hybrid", True, "recurrent"),
        ("uses_mrope", True, "other rows"),
        ("vllm_config.kv_transfer_config", {}, "other machines"),
        ("parallel_config.pipeline_parallel_size", 2, "other machines"),
        ("drafter._draft_attn_layer_names", set(), "interface"),
    ):
        runner = changed(path, value)
        before = runner.execute_model
        assert word in let_steps_be_plain(runner, State) and runner.execute_model == before
    assert "interface" in let_steps_be_plain(changed("uses_mrope", False), tuple)


def runner(device: str, propose: Any) -> Any:
    return SimpleNamespace(
        drafter=SimpleNamespace(propose=propose),
        device=torch.device(device),
        input_batch=SimpleNamespace(req_ids=[]),
    )


def test_it_rests_only_where_the_interface_is_known() -> None:
    for method in ("eagle", "eagle3", "draft_model", "dflash"):
        known = runner("cpu", Cache().propose)
        assert let_rest(known, method, 64) == "" and isinstance(known.drafter.propose, Resting)
    for made, method, word in (
        (runner("cpu", Cache().propose), "mtp", "mtp"),
        (runner("meta", Cache().propose), "eagle3", "GPU"),
        (runner("cpu", lambda *args: None), "eagle3", "interface"),
    ):
        before = made.drafter.propose
        assert word in let_rest(made, method, 64) and made.drafter.propose == before
