"""Images over HTTP, in the shapes of the three APIs: the text is the engine's own, and whatever is wrong with them is a 400."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from functools import cache
from threading import Event, get_ident
from typing import Any, cast

import pytest

from outrider.build import Engine
from outrider.models.hf import images
from outrider.params import SamplingParams
from outrider.pictured import ImagePrompt
from outrider.serve import reading as reading_module
from outrider.serve.reading import Reading
from outrider.serve.tickets import Unavailable
from tests.checkpoints_images import picture, small
from tests.models.test_pictures import bomb
from tests.serve.harness import Running, serving

NEW = 8
ASKED = "What is in it?"


@cache
def engine() -> Engine:
    kit = small("idefics3")
    return Engine.build(target=kit.model, tokenizer=kit.processor, draft="ngram", length=2, slots=2, max_length=400)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(engine=engine(), model="small") as running:
        yield running


def data(number: int = 1) -> str:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def url(number: int = 1) -> str:
    return f"data:image/png;base64,{data(number)}"


def expected(*numbers: int) -> str:
    content = [*({"type": "image", "image": picture(n)} for n in numbers), {"type": "text", "text": ASKED}]
    prompt = engine().images.chat([{"role": "user", "content": content}])
    return engine().generate([prompt], SamplingParams(max_tokens=NEW, temperature=0.0))[0].text


def chat(*urls: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": u, "detail": "high"}} for u in urls]
    content = [*parts, {"type": "text", "text": ASKED}]
    return {
        "model": "small",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW,
        "temperature": 0,
        **more,
    }


def message(source: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]
    return {"model": "small", "messages": [{"role": "user", "content": content}], "max_tokens": NEW, "temperature": 0}


def response(address: str) -> dict[str, Any]:
    content = [{"type": "input_image", "image_url": address, "detail": "auto"}, {"type": "input_text", "text": ASKED}]
    item = {"role": "user", "content": content}
    return {"model": "small", "input": [item], "max_output_tokens": NEW, "temperature": 0}


def answered(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, _, found = server.call("POST", path, body)
    assert status == 200, found
    return json.loads(found)


def test_every_api_reads_images(server: Running) -> None:
    right = expected(1)
    assert right != expected(2)
    first = answered(server, "/v1/chat/completions", chat(url()))
    assert first["choices"][0]["message"]["content"] == right
    kit = small("idefics3")
    shown = f"[user]{kit.mark}{ASKED}[assistant]"
    assert first["usage"]["prompt_tokens"] == kit.inputs(shown, [picture(1)])["input_ids"].shape[1]
    two = answered(server, "/v1/chat/completions", chat(url(1), url(2)))
    assert two["choices"][0]["message"]["content"] == expected(1, 2)
    source = {"type": "base64", "media_type": "image/png", "data": data()}
    assert answered(server, "/v1/messages", message(source))["content"][0]["text"] == right
    assert answered(
        server, "/v1/messages/count_tokens", {k: v for k, v in message(source).items() if k[:3] in ("mod", "mes")}
    )
    found = answered(server, "/v1/responses", response(url()))
    assert found["output"][-1]["content"][0]["text"] == right


def test_the_images_of_a_prompt_are_seen_one_between_two_steps(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a command of its own, which the next one follows only when it is done; then the prompt is queued."""
    reader, worker, done = engine().images, server.bridge.worker, list[str]()

    def noted(thing: Any, name: str) -> None:
        own = getattr(thing, name)
        monkeypatch.setattr(thing, name, lambda *given: (done.append(name), own(*given))[1])

    noted(worker, "see")
    noted(worker, "admit")
    noted(reader, "rows")
    answered(server, "/v1/chat/completions", chat(url(7), url(8)))
    assert done == ["see", "rows", "see", "rows", "admit", "rows", "rows"]


def test_images_that_are_more_than_is_kept_are_seen_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt holds what was seen of it until it is queued, and its sequence from then on."""
    seen, real = list[int](), images.entry_of
    monkeypatch.setattr(images, "entry_of", lambda *given: (seen.append(1), real(*given))[1])
    monkeypatch.setattr(images, "KEPT", 1)
    answered(server, "/v1/chat/completions", chat(url(31), url(32), url(33)))
    assert len(seen) == 3


def refused(server: Running, path: str, body: dict[str, Any]) -> str:
    status, _, found = server.call("POST", path, body)
    assert status == 400, (status, found)
    error = json.loads(found)["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    return error["message"]


def test_bad_images_are_a_400_that_says_what_to_do(server: Running) -> None:
    wrong = {
        "http://127.0.0.1:1/a.png": "never fetched",
        "data:image/png;base64,AAAA": "no PNG",
        f"data:image/png;base64,{base64.b64encode(bomb(50_000, 50_000)).decode()}": "pixels",
        f"data:image/png;base64,{data()[:200]}": "damaged",
    }
    for address, why in wrong.items():
        assert why in refused(server, "/v1/chat/completions", chat(address))
    assert "at most 32" in refused(server, "/v1/chat/completions", chat(*[url()] * 33))
    assert "never fetched" in refused(
        server, "/v1/messages", message({"type": "url", "url": "https://example.org/a.png"})
    )
    assert "never fetched" in refused(server, "/v1/responses", response("https://example.org/a.png"))
    assert "with images" in refused(server, "/v1/chat/completions", chat(url(), prompt_logprobs=0))
    told = chat(url())
    told["messages"][0]["content"][1]["text"] = f"a text with the mark {small('idefics3').mark}"
    assert "places for images" in refused(server, "/v1/chat/completions", told)
    said = chat(url())
    said["messages"][0]["role"] = "system"
    assert "messages of the user" in refused(server, "/v1/chat/completions", said)
    long = chat(url())
    long["messages"][0]["content"][1]["text"] = "x" * 500
    assert "the context holds" in refused(server, "/v1/chat/completions", long)


def test_only_images_may_make_a_body_large(server: Running) -> None:
    """A body of quotes and escapes takes far longer to read than one of an image, and everybody waits meanwhile."""
    large = chat(url())
    large["messages"][0]["content"][1]["text"] = '"' * 1_500_000
    status, _, found = server.call("POST", "/v1/chat/completions", large)
    assert status == 413 and "besides its images" in json.loads(found)["error"]["message"]
    noise = f"data:image/png;base64,{'A' * 4_000_000}"
    assert "no PNG" in refused(server, "/v1/chat/completions", chat(noise))


def test_a_model_without_images_says_so() -> None:
    with serving() as text_only:
        assert "images" in refused(text_only, "/v1/chat/completions", {**chat(url()), "model": "pycode"})


def test_pictures_of_a_client_that_has_left_are_read_to_their_end_before_the_next() -> None:
    """Or clients that come and go would have as many pictures decoded at once as there are threads."""
    begun, end, order = Event(), Event(), list[str]()

    def slow() -> ImagePrompt:
        begun.set()
        end.wait()
        order.append("the first")
        return ImagePrompt([1], [])

    def quick() -> ImagePrompt:
        order.append("the second")
        return ImagePrompt([2], [])

    async def clients() -> None:
        reading = Reading(cast(Any, None), cast(Any, None))
        first = asyncio.ensure_future(reading.alone(slow))
        await asyncio.to_thread(begun.wait)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.ensure_future(reading.alone(quick))
        try:
            await asyncio.wait([second], timeout=0.2)  # in which it would be read, if it did not wait
        finally:
            end.set()
        assert first.cancelled() and await second == [2]
        reading.close()

    asyncio.run(clients())
    assert order == ["the first", "the second"]


def test_pictures_of_all_requests_are_read_in_one_thread() -> None:
    """Every thread keeps what it has freed for itself: a server had grown by half a gigabyte for each that had read large ones."""
    threads = set[int]()

    async def clients() -> None:
        reading = Reading(cast(Any, None), cast(Any, None))
        for _ in range(3):
            await asyncio.to_thread(threads.add, 0)
            await reading.alone(lambda: (threads.add(get_ident()), ImagePrompt([1], []))[1])
        reading.close()

    asyncio.run(clients())
    assert len(threads - {0}) == 1


def test_pictures_do_not_wait_for_ever_behind_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_module, "IMAGE_SECONDS", 0.05)
    end = Event()

    async def clients() -> None:
        reading = Reading(cast(Any, None), cast(Any, None))
        first = asyncio.ensure_future(reading.alone(lambda: (end.wait(), ImagePrompt([1], []))[1]))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="images of others"):
            await reading.alone(lambda: ImagePrompt([2], []))
        with pytest.raises(Unavailable, match="make them smaller"):
            await first
        end.set()
        monkeypatch.setattr(reading_module, "IMAGE_SECONDS", 60.0)
        assert await reading.alone(lambda: ImagePrompt([3], [])) == [3]
        reading.close()

    asyncio.run(clients())
