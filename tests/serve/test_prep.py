"""Client-sized work: judged before it starts, done where it stops nobody, and ended when it does not end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError

from outrider.errors import RequestError
from outrider.models.tokenizer import load_tokenizer
from outrider.serve import prep as prep_module
from outrider.serve.body import CONTAINERS, KEYS, check, parsed
from outrider.serve.chat.fields import ChatRequest
from outrider.serve.expressions import risky, wild
from outrider.serve.parsing import BadField, parse
from outrider.serve.prep import SHORT, Prep
from outrider.serve.prep_worker import Refused, conversation, encoder
from outrider.serve.requests import CompletionRequest
from outrider.serve.tickets import Unavailable
from tests.serve.harness import Running

T = TypeVar("T")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, O200K, r" {2,}", r"\p{N}{1,3}", "[一-龥]+", r"(?:ab)+c"])
def test_expressions_of_common_tokenizers_are_tame(pattern: str) -> None:
    assert not risky(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(x|y)*z", r"a*a*b", r"(?<=a)b", r"(a)\1", r"(((a?){8}){8}){8}b", "a?" * 20 + "a" * 20, "(a|a)" * 12],
)
def test_expressions_that_may_loop_are_wild(pattern: str) -> None:
    assert risky(pattern)
    part = {"type": "Sequence", "of": [{"pattern": {"Regex": pattern}}]}
    assert wild(json.dumps({"normalizer": part})) == (True, False)
    assert wild(json.dumps({"pre_tokenizer": None, "decoder": part})) == (False, True)


def test_json_is_judged_before_it_is_read() -> None:
    check(b'"' + b'\\"' * 500_000, 0)  # a text that does not end is looked at once
    check(b'{"a": "[[[[,,,,\\"{{{{", "b": [1, 2]}', 2)  # what stands in texts is no structure
    for data in (
        b"[" + b"1," * 100 + b"1]",
        b"[" + b"[]," * CONTAINERS + b"1]",
        b"[" * 40 + b"]" * 40,
        b"]" * (CONTAINERS + 1),
    ):
        with pytest.raises(BadField):
            check(data, 99)
    with pytest.raises(BadField, match="keys"):
        parsed(json.dumps({str(i): 1 for i in range(KEYS + 1)}).encode(), 1 << 20)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [-1] * 300_000},
        {"prompt": [[-1] * 1000] * 60},
        {"prompt": [True] * 300_000},
        {"prompt": "x", "stop": [0] * 300_000},
        {"prompt": "x", "stop_token_ids": [-1] * 300_000},
    ],
)
def test_one_wrong_value_says_as_much_as_a_million(fields: dict[str, Any]) -> None:
    """Validation ends at the first one: no object is made of each of the others."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", **fields})
    assert caught.value.error_count() < 10


def test_what_a_reply_has_may_be_sent_back() -> None:
    """The official client's `model_dump` of an answer, with null for what there was not."""
    answer = {"role": "assistant", "content": "y", "refusal": None, "annotations": None, "audio": None}
    answer |= {"function_call": None, "tool_calls": None}
    empty = {"role": "assistant", "content": None, "tool_calls": [], "annotations": []}
    read = {
        "role": "assistant",
        "content": '{"a": 1}',
        "parsed": {"a": 1},
        "reasoning": None,
        "reasoning_content": None,
    }
    body = parse(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}, answer, empty, read]})
    assert [m.text for m in body.messages] == ["x", "y", "", '{"a": 1}']
    user = {"role": "user", "content": "x"}
    for wrong in (
        {"role": "user", "content": None},
        {"role": "user"},
        {**answer, "tool_calls": [{"id": "1"}]},
        {**user, "parsed": {"a": 1}},
        {**user, "reasoning": "because"},
    ):
        with pytest.raises(BadField):
            parse(ChatRequest, {"model": "m", "messages": [wrong]})


class Unsized:
    """A tokenizer of no file: `Prep` reads nothing for it."""

    chat_template = None


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from outrider.assets import shipped

    return load_tokenizer(shipped("target"))


def within(work: Callable[[Prep], Awaitable[T]], tokenizer: Any, most: int = 1 << 20) -> T:
    """What `work` makes of a Prep, which is closed behind it."""

    async def run() -> T:
        prep = Prep(tokenizer, (0,), most)
        try:
            return await work(prep)
        finally:
            await prep.close()

    return asyncio.run(run())


def test_a_process_reads_a_text_as_it_is_read_here(tokenizer: Any) -> None:
    """With and without special tokens; and it counts instead of sending what no context holds."""
    texts = ["def f(x):\n\treturn 'é' + x  # 漢字\n" * 300, "", "x"]

    async def work(prep: Prep) -> list[Any]:
        assert prep.in_thread(SHORT + 1, False) and not prep.in_thread(SHORT, False) and not prep.wild
        return [await prep.encode(texts, special, 1 << 20) for special in (True, False)]

    assert within(work, tokenizer) == [[encoder(tokenizer)(t, special) for t in texts] for special in (True, False)]
    with pytest.raises(RequestError, match="context holds 11"):
        within(lambda prep: prep.encode(texts, True, 10), tokenizer)


def test_a_grammar_that_does_not_end_costs_its_own_request_alone(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client's schema goes on behind it, and the same one is refused at once the next time."""
    pytest.importorskip("llguidance")
    monkeypatch.setattr(prep_module, "GRAMMAR_SECONDS", 0.5)
    bad = "json:" + json.dumps({"allOf": [{"type": "integer", "multipleOf": 10007}, {"multipleOf": 10009}]})

    async def work(prep: Prep) -> None:
        await prep.try_grammar('json:{"type": "null"}')
        with pytest.raises(RequestError, match="cannot be compiled within"):
            await prep.try_grammar(bad)
        await prep.try_grammar('json:{"type": "boolean"}')
        with pytest.raises(RequestError, match="cannot be read|cannot be used"):
            await prep.try_grammar("regex:(")
        monkeypatch.setattr(prep.grammars, "do", None)  # who tries again falls over it
        with pytest.raises(RequestError, match="cannot be compiled within"):
            await prep.try_grammar(bad)

    within(work, tokenizer)


def test_a_grammar_that_a_busy_machine_gave_up_is_tried_again_later(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that time decides is held against a grammar for good."""
    pytest.importorskip("llguidance")
    grammar = 'json:{"type": "integer"}'

    async def work(prep: Prep) -> None:
        await prep.try_grammar('json:{"type": "null"}')  # its process has started
        monkeypatch.setattr(prep_module, "GRAMMAR_SECONDS", 1e-6)
        monkeypatch.setattr(prep_module, "AGAIN_SECONDS", 3600.0)
        with pytest.raises(RequestError, match="cannot be compiled"):
            await prep.try_grammar(grammar)
        monkeypatch.setattr(prep_module, "GRAMMAR_SECONDS", 30.0)
        with pytest.raises(RequestError, match="cannot be compiled"):
            await prep.try_grammar(grammar)
        monkeypatch.setattr(prep_module, "monotonic", lambda: time.monotonic() + 3601.0)
        await prep.try_grammar(grammar)

    within(work, tokenizer)


def test_a_grammar_that_fails_beside_the_server_is_not_compiled_in_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that runs out of memory, say, has not said yes."""
    pytest.importorskip("llguidance")

    async def work(prep: Prep) -> None:
        async def fail(*_: Any) -> dict[str, Any]:
            return {"failed": "MemoryError"}

        monkeypatch.setattr(prep.grammars, "do", fail)
        for _ in range(2):
            with pytest.raises(RequestError, match="cannot be compiled .MemoryError"):
                await prep.try_grammar('json:{"type": "integer"}')

    within(work, tokenizer)


def test_a_process_that_cannot_start_is_no_fault_of_the_job(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(prep: Prep) -> list[list[int]]:
        with monkeypatch.context() as broken:
            broken.setattr(prep_module.sys, "executable", "/no/such/program")
            with pytest.raises(Unavailable, match="started"):
                await prep.encode(["x"], True, 10)
            with pytest.raises(Unavailable, match="started"):
                await prep.try_grammar('json:{"type": "integer"}')
        await prep.try_grammar('json:{"type": "integer"}')
        return await prep.encode(["x"], True, 10)

    pytest.importorskip("llguidance")
    assert within(work, tokenizer) == [encoder(tokenizer)("x", True)]


def test_a_process_takes_no_more_memory_than_it_may(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that would take more ends with its process, and the next one finds another."""
    monkeypatch.setattr(prep_module, "TEXT_SECONDS", 30.0)

    async def work(prep: Prep) -> list[list[int]]:
        with pytest.raises(RequestError):
            await prep.encode(["aé" * 1_500_000], True, 1 << 40)
        return await prep.encode(["x"], True, 10)

    monkeypatch.setattr(prep_module, "MEMORY", 96 << 20)
    assert within(work, tokenizer) == [encoder(tokenizer)("x", True)]


@pytest.fixture(scope="module")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tokenizer with a template that loops when it is told to, and an expression that may."""
    import shutil

    from outrider.assets import shipped

    folder = tmp_path_factory.mktemp("looping")
    for file in shipped("draft").glob("token*.json"):
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    settings["chat_template"] = (
        "{% if messages[0].content == 'loop' %}" + loop + "{% elif messages[0].content == 'no' %}"
        "{{ raise_exception('no') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


def test_templates_and_expressions_that_loop_are_ended(looping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for its own request; the same template serves the next conversation, as it would here."""
    monkeypatch.setattr(prep_module, "TEXT_SECONDS", 1.0)
    tokenizer = load_tokenizer(looping)
    fine = [{"role": "user", "content": "def f("}]

    async def work(prep: Prep) -> list[int]:
        assert prep.wild and prep.in_thread(1, False) and prep.in_thread(1, True)
        await prep.chat(fine, False)  # it is loaded now
        for hopeless in (
            prep.chat([{"role": "user", "content": "loop"}], False),
            prep.encode(["a" * 60 + "!"], True, 1000),
        ):
            with pytest.raises(RequestError, match="could not be read"):
                await hopeless
        with pytest.raises(Refused):
            await prep.chat([{"role": "user", "content": "no"}], False)
        return await prep.chat(fine, False)

    assert within(work, tokenizer) == conversation(tokenizer, fine, False)


def test_a_tokenizer_of_no_file_is_used_where_it_is() -> None:
    async def work(prep: Prep) -> bool:
        await prep.try_grammar("json:{}")  # the engine says what is missing
        return prep.in_thread(1 << 20, True)

    assert within(work, Unsized()) is False


def test_long_bodies_stop_no_stream(server: Running) -> None:
    """A prompt of wrong ids, a long text and one of ids beyond the context are refused by name while health answers."""
    late: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            start = time.monotonic()
            assert server.call("GET", "/health")[0] == 200
            late.append(time.monotonic() - start)
            time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    for prompt, words in (([-1] * 60_000, "greater"), ([1] * 60_000, "context holds"), ("é" * 90_000, "context holds")):
        status, _, reply = server.call("POST", "/v1/completions", {"model": "pycode", "prompt": prompt})
        assert status == 400 and words in json.loads(reply)["error"]["message"]
    stop.set()
    thread.join()
    assert late and server.bridge.held == 0


def test_special_tokens_are_a_field(server: Running) -> None:
    """vLLM's name, for both kinds of request; a tokenizer without special tokens writes the same either way."""
    for path, more in (
        ("completions", {"prompt": "x = "}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        counts = []
        for special in (True, False):
            body = {"model": "pycode", "max_tokens": 1, "add_special_tokens": special, **more}
            status, _, reply = server.call("POST", f"/v1/{path}", body)
            assert status == 200
            counts.append(json.loads(reply)["usage"]["prompt_tokens"])
        assert counts[0] >= counts[1] > 0
