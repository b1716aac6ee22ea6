"""Whatever bytes a page has: read, or refused as a fault, within its time and size."""

from __future__ import annotations

import itertools
import random

import pytest

from outrider.integrations.watch import page as reader
from outrider.integrations.watch.flavours import WANTED, flavour_of
from outrider.integrations.watch.page import MOST_LINES, Page, parse
from outrider.web import Fault
from tests.watch.server import PAGES


def garbled(number: int) -> bytes:
    """A page that something has happened to: cut, bytes changed, lines doubled, dropped or swapped, or noise."""
    rng = random.Random(number)
    data = bytearray(PAGES[rng.choice(sorted(PAGES))].encode())
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(7):
            case 0:
                del data[rng.randrange(len(data) + 1) :]
            case 1:
                for _ in range(rng.randint(1, 60)):
                    if data:
                        data[rng.randrange(len(data))] = rng.randrange(256)
            case 2:
                lines = bytes(data).split(b"\n")
                rng.shuffle(lines)
                data = bytearray(b"\n".join(lines))
            case 3:
                at = rng.randrange(len(data) + 1)
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 300)))
            case 4:
                data = bytearray(bytes(data).replace(b'"', rng.choice([b"", b"\\", b'""', b"{"]), rng.randint(1, 9)))
            case 5:
                values = [
                    b" NaN\n",
                    b" -1\n",
                    b" +Inf\n",
                    b" 1e400\n",
                    b" 1_0\n",
                    b" \n",
                    b" 0x1F\n",
                    b" 99999999999999999999\n",
                ]
                data = bytearray(bytes(data).replace(b".0\n", rng.choice(values), rng.randint(1, 30)))
            case 6:
                data += rng.randbytes(rng.randint(1, 400))
    return bytes(data)


def tried(body: bytes) -> Page | Fault:
    try:
        return parse(body, WANTED)
    except Fault as fault:
        return fault


def test_a_thousand_garbled_pages_are_read_or_refused() -> None:
    read = refused = 0
    for number in range(1000):
        page = tried(garbled(number))
        if isinstance(page, Fault):
            assert page.kind in ("cut", "garbled", "large") and len(str(page)) < 200
            refused += 1
            continue
        flavour = flavour_of(page)
        if flavour is not None:
            sums = flavour.read(page).sums
            assert all(isinstance(v, (int, float)) and 0 <= v <= 1e20 for v in sums.values())
        read += 1
    assert read > 50 and refused > 50


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PAGES["vllm"].encode()[:-3], "cut"),
        (b"vllm:generation_tokens_total{" + b"\\" * 10_000 + b"} 1\n", "large"),
        (b"vllm:generation_tokens_total 1\n" * (MOST_LINES + 1), "large"),
        (b'vllm:generation_tokens_total{a="b} 1\n', "garbled"),
        (b"vllm:generation_tokens_total one\n", "garbled"),
    ],
)
def test_what_is_no_page_is_refused_by_kind(body: bytes, kind: str) -> None:
    with pytest.raises(Fault) as caught:
        parse(body, WANTED)
    assert caught.value.kind == kind


def test_reading_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.5)
    monkeypatch.setattr(reader, "perf_counter", lambda: next(ticks))
    with pytest.raises(Fault, match="takes more than"):
        parse(b"vllm:generation_tokens_total 1\n" * 100, WANTED)
    assert next(ticks) < reader.SECONDS + 2


def test_a_value_that_no_counter_has_is_left_out_and_named() -> None:
    text = (
        PAGES["llamacpp"]
        .replace("num_drafts_total 12", "num_drafts_total NaN")
        .replace("processing 0", "processing -1")
    )
    page = parse(text.encode(), WANTED)
    assert page.odd == {"llamacpp:spec_decode_num_drafts_total", "llamacpp:requests_processing"}
    assert "llamacpp:tokens_predicted_total" in page and page.total("llamacpp:spec_decode_num_drafts_total") is None
