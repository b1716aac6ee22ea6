"""Bytes of single tokens and where they stand in the text, for every kind of vocabulary; stop strings that name special tokens."""

from __future__ import annotations

import itertools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from outrider.engine.text import TextStream, special_tokens
from outrider.models.tokenizer import PlainTokenizer
from outrider.models.translate import byte_alphabet
from outrider.serve.spelling import Offsets, Spelling

LETTERS = {b: c for c, b in byte_alphabet().items()}


def bytewise() -> PlainTokenizer:
    """Every byte is a token; GPT-2's alphabet."""
    core = Tokenizer(models.BPE(vocab={c: b for b, c in LETTERS.items()}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|end|>", special=True)])
    return PlainTokenizer(core, None)


def sentences() -> PlainTokenizer:
    """SentencePiece's way: blanks are U+2581, unknown characters fall back to <0xNN>, a leading blank is dropped."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "\u2581a", "a", "b", "\u2581and"]
    core = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<s>", special=True)])
    return PlainTokenizer(core, None)


def ids_of(tokenizer: PlainTokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    vocab = tokenizer.get_vocab()
    return [vocab[LETTERS[b]] if LETTERS[b] in vocab and "<0x00>" not in vocab else vocab[f"<0x{b:02X}>"] for b in data]


@pytest.mark.parametrize("make", [bytewise, sentences])
@pytest.mark.parametrize("text", ["日本 ok 😀 end", "é", "plain", "\n \t"])
def test_tokens_that_are_parts_of_characters_have_their_bytes(make, text: str) -> None:
    """Joined they are the text; the offset of each is the character that it begins, continues or is."""
    tokenizer = make()
    spelling, offsets = Spelling(tokenizer), Offsets(Spelling(tokenizer))
    ids = ids_of(tokenizer, text.encode())
    assert b"".join(map(spelling.bytes_of, ids)) == text.encode()
    where = [offsets.next(t) for t in ids]
    assert where == [i for i, c in enumerate(text) for _ in c.encode()]
    for token, at in zip(ids, where, strict=True):
        if "\ufffd" not in spelling.text(token):
            assert text[at : at + 1] == spelling.text(token)


def test_words_keep_the_blank_before_them() -> None:
    tokenizer = sentences()
    vocab, spelling = tokenizer.get_vocab(), Spelling(tokenizer)
    assert [spelling.text(vocab[p]) for p in ("\u2581a", "a", "\u2581", "\u2581and")] == [" a", "a", " ", " and"]


def test_special_tokens_are_named_and_take_no_room() -> None:
    tokenizer = bytewise()
    end = tokenizer.get_vocab()["<|end|>"]
    spelling, offsets = Spelling(tokenizer), Offsets(Spelling(tokenizer))
    assert (
        spelling.text(end) == "<|end|>"
        and spelling.shown(end) == ""
        and spelling.keys([end], end) == [""]
        and special_tokens(tokenizer)[end] == "<|end|>"
    )
    (a, b) = ids_of(tokenizer, b"ab")
    assert [offsets.next(t) for t in (a, end, b, end)] == [0, 1, 1, 2]


def test_alternatives_keep_apart() -> None:
    """All first bytes of characters look alike as text; as keys they do not, and the chosen one is found by its text."""
    tokenizer = bytewise()
    spelling, ids = Spelling(tokenizer), ids_of(tokenizer, bytes(range(0xC2, 0xD0)) + b"a")
    for chosen in (ids[0], ids[-1], ids_of(tokenizer, b"z")[0]):
        keys = spelling.keys(ids, chosen)
        assert len(set(keys)) == len(ids)
        assert chosen not in ids or keys[ids.index(chosen)] == spelling.text(chosen)
        assert all(k in ("\ufffd", "a") or k.startswith("bytes:\\x") for k in keys)


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    spelling = Spelling(None)
    assert spelling.text(17) == "token_id:17" and spelling.keys([17, 18], 17) == ["token_id:17", "token_id:18"]


# ------------------------------------------------------------------ stop strings
def cut(full: list[str], special: set[str], stop: tuple[str, ...], least: int = 0) -> tuple[str, bool]:
    """The definition: read character by character; a stop string ends the text where it completes, specials are not shown."""
    read, plain = list[tuple[str, bool]](), [s for s in stop if not any(x in s or s in x for x in special)]
    for n, token in enumerate(full, start=1):
        for char in token:
            read.append((char, token not in special))
            shown = "".join(c for c, visible in read if visible)
            seen = "".join(c for c, _ in read)
            ends = [len(shown) - len(s) for s in stop if read[-1][1] and shown.endswith(s)]
            named = [s for s in stop if s not in plain and seen.endswith(s)]
            ends += [sum(visible for _, visible in read[: len(seen) - len(s)]) for s in named]
            if ends and n > least:
                return shown[: min(ends)], True
    return "".join(c for c, visible in read if visible), False


@pytest.mark.parametrize(
    "stop", [("<|end|>",), ("\n<|end|>",), ("a<|end|>b",), ("<|end|><s>",), ("ab",), ("b\n", "<|end|>a"), ("d|>",)]
)
@pytest.mark.parametrize("least", [0, 3])
def test_stop_strings_may_name_special_tokens(stop: tuple[str, ...], least: int) -> None:
    """All texts of four tokens, pushed one by one and in pieces; what is shown never has to be taken back."""
    tokenizer = bytewise()
    special = special_tokens(tokenizer)
    names = {v: k for k, v in special.items()}
    for full in itertools.product(["<|end|>", "<s>", "a", "b", "\n"], repeat=4):
        ids = [names[w] if w in names else ids_of(tokenizer, w.encode())[0] for w in full]
        wanted, stopped = cut(list(full), set(names), stop, least)
        for size in (1, 2, 4):
            stream = TextStream(tokenizer, stop, min_tokens=least, special=special)
            got = "".join(stream.extend(ids[i : i + size])[0] for i in range(0, 4, size))
            assert (got + stream.finish(), stream.stopped) == (wanted, stopped), (full, size)


def test_without_such_stop_strings_nothing_changes() -> None:
    tokenizer = bytewise()
    end = tokenizer.get_vocab()["<|end|>"]
    stream = TextStream(tokenizer, ("ab",), special=special_tokens(tokenizer))
    a, b = ids_of(tokenizer, b"ab")
    assert [stream.push(t) for t in (a, end, b)] == ["", "", ""] and stream.stop_string == "ab"
