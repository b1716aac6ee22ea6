"""`model.generate(..., custom_generate=FOLDER)` of transformers: its own text, decoded by Outrider; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from outrider.assets import shipped
from outrider.errors import ConfigError
from outrider.integrations.transformers import FOLDER, params_of

TRUST: dict[str, Any] = {"custom_generate": FOLDER, "trust_remote_code": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    found = (AutoModelForCausalLM.from_pretrained(shipped(n), dtype=torch.float32) for n in ("target", "draft"))
    return tuple(found)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def modules_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the folder's code to a cache of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def padded() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 0, 40, 50, 60], [30, 31, 32, 33, 34]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_greedy_text_is_that_of_transformers(pair: Any) -> None:
    target, draft = pair
    more = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**padded(), **more)
    modes = target.training, [p.requires_grad for p in target.parameters()]
    for how in ({"assistant_model": draft}, {"draft": "ngram"}, {"prompt_lookup_num_tokens": 3}, {}):
        assert torch.equal(target.generate(**padded(), **more, **how, **TRUST), plain)
    assert modes == (target.training, [p.requires_grad for p in target.parameters()])


def test_sampling_follows_torchs_seed_and_returns_several(pair: Any) -> None:
    target, draft = pair
    ask = {
        "max_new_tokens": 8,
        "do_sample": True,
        "temperature": 0.9,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
    }
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(target.generate(**padded(), assistant_model=draft, pad_token_id=0, **ask, **TRUST).sequences)
    assert found[0].shape[0] == 6 and torch.equal(found[0], found[1]) and found[0].tolist() != found[2].tolist()
    assert torch.equal(found[0][:, :5], padded()["input_ids"].repeat_interleave(3, 0))


def test_the_settings_are_those_that_transformers_would_use(pair: Any) -> None:
    """The call's, then the model's, then the defaults: among them the 50 likeliest tokens."""
    config, _ = pair[0]._prepare_generation_config(None, do_sample=True, temperature=0.7, max_new_tokens=5)
    made = params_of(config, 3)
    assert (made.temperature, made.top_k, made.max_tokens, made.n) == (0.7, 50, 5, 1)
    config, _ = pair[0]._prepare_generation_config(None, max_length=9)
    assert (params_of(config, 3).temperature, params_of(config, 3).max_tokens) == (0.0, 6)


def test_a_streamer_gets_every_token(pair: Any) -> None:
    target, draft = pair

    class Kept:
        def __init__(self) -> None:
            self.tokens, self.ended = list[int](), False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    kept, ids = Kept(), torch.tensor([[30, 31, 32]])
    found = target.generate(ids, assistant_model=draft, max_new_tokens=12, do_sample=False, streamer=kept, **TRUST)
    assert kept.tokens == found[0].tolist() and kept.ended


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 2},
        {"output_scores": True, "return_dict_in_generate": True},
        {"pixels": 1},
        {"token_type_ids": torch.zeros(1, 2, dtype=torch.long)},
    ],
)
def test_what_is_not_applied_is_refused_by_name(pair: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(asked))):
        pair[0].generate(torch.tensor([[30, 31]]), max_new_tokens=4, **asked, **TRUST)


def test_without_trust_nothing_is_run(pair: Any) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        pair[0].generate(torch.tensor([[30, 31]]), custom_generate=FOLDER, trust_remote_code=False)
