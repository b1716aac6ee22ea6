"""Streams of text: joined pieces are the whole text up to its stop, for every kind of tokenizer and every border of tokens."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outrider.engine import text as text_module
from outrider.engine.text import UNKNOWN, StopMatcher, TextStream

CORPUS = [
    "the cat sat on the mat. 😀 the 漢字 of the cat",
    "naïve café — 👩‍👩‍👧 ends\n\n  indented",
    "aaa abab ababab 漢漢 字",
] * 4
ALPHABET = sorted({*"".join(CORPUS), "€", "𝄞", "ß", "\ufffd"})


def byte_level():
    """GPT-2 style: every byte is a token, so a character may be split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
    )
    return tokenizer


def byte_fallback():
    """Llama style: spaces are ▁, the first is dropped by the decoder, unknown characters become byte tokens."""
    known = [c for c in "▁ abcehilmnostx.\n漢" if c != " "]
    merges = [("a", "t"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("▁c", "at")]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *known, *("".join(m) for m in merges)]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace():
    """SentencePiece unigram: the first word of what is decoded loses its space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=80, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return tokenizer


def word_piece():
    """BERT style: words are joined by spaces unless they begin with ##."""
    words = ["[UNK]", "<s>", "</s>", *ALPHABET, *("##" + c for c in ALPHABET), "the", "cat", "##at"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


KINDS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": metaspace(),
    "word_piece": word_piece(),
}
any_text = st.text(st.sampled_from(ALPHABET), max_size=60)
pieces = st.lists(
    st.one_of(any_text, st.sampled_from([" the cat", "😀", "漢字", "abab", "\n\n", "👩‍👩‍👧"])), max_size=8
).map("".join)
stops = st.lists(
    st.one_of(
        st.text(st.sampled_from("ab the漢😀\n"), min_size=1, max_size=4), st.sampled_from(["ababab", "cat", "the cat"])
    ),
    max_size=4,
)


def stream(tokenizer, ids, stop=(), **options):
    """All pieces, the stream, and the number of tokens until it stopped."""
    s = TextStream(tokenizer, stop, **options)
    out = []
    for token in ids:
        out.append(s.push(token))
        if s.stopped:
            break
    return [*out, s.finish()], s


def cut(text, stop):
    """The reference: text before the stop string that completes first (the longest of several), where it ends, and which it is."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not found:
        return text, len(text), None
    end, _, s = min(found)
    return text[: end - len(s)], end, s


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(text=pieces, stop=stops)
def test_streamed_text_is_the_decoded_text_up_to_the_stop(kind, text, stop):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    out, s = stream(tokenizer, ids, stop)
    want, end, which = cut(whole, stop)
    assert "".join(out) == want
    assert s.stop_string == which
    if which is not None and UNKNOWN not in whole:
        # It stopped with the very token that completed the stop string.
        assert len(tokenizer.decode(ids[: s.tokens]).rstrip(UNKNOWN)) >= end
        assert len(tokenizer.decode(ids[: s.tokens - 1]).rstrip(UNKNOWN)) < end


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(text=pieces, stop=stops, sizes=st.lists(st.integers(1, 7), min_size=1), minimum=st.integers(0, 6))
def test_several_tokens_at_once_are_the_same_as_one_by_one(kind, text, stop, sizes, minimum):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text).ids
    pushed, one = stream(tokenizer, ids, stop, min_tokens=minimum)
    many, out, i, turn = TextStream(tokenizer, stop, min_tokens=minimum), [], 0, 0
    while i < len(ids) and not many.stopped:
        step = ids[i : i + sizes[turn % len(sizes)]]
        turn += 1
        piece, used = many.extend(step)
        assert used == len(step) or many.stopped
        i += used
        out.append(piece)
    assert "".join([*out, many.finish()]) == "".join(pushed)
    assert (many.stop_string, many.tokens) == (one.stop_string, one.tokens)
    if many.stopped:
        assert many.extend(ids) == ("", 0)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "word_piece"])
@settings(max_examples=50)
@given(data=st.data())
def test_any_tokens_even_broken_characters(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60))
    out, _ = stream(tokenizer, ids)
    assert "".join(out) == tokenizer.decode(ids)


@settings(max_examples=50)
@given(run=st.binary(max_size=40))
def test_runs_of_byte_tokens_never_fail_and_keep_their_length(run):
    """Stray bytes after whole characters turn those, already shown, into replacement characters: the one inexact case."""
    tokenizer = KINDS["byte_fallback"]
    ids = [*tokenizer.encode("cat").ids, *(3 + b for b in run), *tokenizer.encode("x").ids]
    out, _ = stream(tokenizer, ids)
    assert len("".join(out)) >= len("cat")
    if UNKNOWN not in tokenizer.decode(ids):
        assert "".join(out) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(text=pieces)
def test_a_replacement_character_is_shown_only_when_certain(kind, text):
    """What has been shown at any moment is a prefix of the final text: half a character is never shown."""
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text).ids
    whole = tokenizer.decode(ids)
    out, _ = stream(tokenizer, ids)
    shown = ""
    for piece in out:
        shown += piece
        assert whole.startswith(shown)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(text=pieces, split=st.integers(0, 60))
def test_with_the_end_of_the_prompt_as_context_the_output_continues_it(kind, text, split):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("the cat" + text).ids
    split = min(split + 2, len(ids))
    prompt = tokenizer.decode(ids[:split])
    out, s = stream(tokenizer, ids[split:], context=ids[max(0, split - 12) : split])
    if not prompt.endswith(UNKNOWN) and tokenizer.decode(ids[max(0, split - 12) : split]):
        assert prompt + "".join(out) == tokenizer.decode(ids)
    assert s.tokens == len(ids) - split


def test_the_first_word_keeps_its_space_only_with_context():
    tokenizer = KINDS["metaspace"]
    ids = tokenizer.encode("the cat the cat").ids
    half = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[i:]) == "the cat")
    assert "".join(stream(tokenizer, ids[half:])[0]) == "the cat"
    assert "".join(stream(tokenizer, ids[half:], context=ids[:half])[0]) == " the cat"


def test_text_is_shown_as_soon_as_it_is_certain():
    tokenizer = KINDS["byte_level"]
    face = tokenizer.encode("😀").ids
    s = TextStream(tokenizer, ["abc"])
    plain = [s.push(t) for t in [*tokenizer.encode("x").ids, *face]]
    assert plain[0] == "x" and plain[-1] == "😀" and not any(plain[1:-1])
    a, b, c, d = (tokenizer.token_to_id(t) for t in "abcd")
    assert [s.push(t) for t in (a, b, d)] == ["", "", "abd"]
    assert [s.push(t) for t in (a, a, b)] == ["", "a", ""]
    assert s.push(c) == "" and s.stopped and s.stop_string == "abc"
    assert s.push(a) == "" and s.finish() == ""


def test_half_a_character_is_shown_at_the_end_only():
    tokenizer = KINDS["byte_level"]
    first = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("€")[0][0][0]
    s = TextStream(tokenizer)
    assert s.push(tokenizer.token_to_id(first)) == ""
    assert s.finish() == UNKNOWN


def test_of_two_stop_strings_the_one_completed_first_counts_and_of_equal_ends_the_longest():
    for stop, text, want, which in (
        (["abcd", "c"], "xabcd", "xab", "c"),
        (["b", "ab"], "xab", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),
        (["ababc"], "abababc", "ab", "ababc"),
    ):
        out, s = stream(KINDS["byte_level"], KINDS["byte_level"].encode(text).ids, stop)
        assert ("".join(out), s.stop_string) == (want, which)


def test_a_stop_string_completed_within_the_minimum_is_only_text():
    tokenizer = KINDS["byte_level"]
    ids = [tokenizer.token_to_id(t) for t in "abxab"]
    for minimum, want, count in ((0, "", 2), (1, "", 2), (2, "abx", 5), (4, "abx", 5), (5, "abxab", 5)):
        out, s = stream(tokenizer, ids, ["ab"], min_tokens=minimum)
        assert ("".join(out), s.tokens) == (want, count)


@settings(max_examples=200)
@given(stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), text=st.text("abc", max_size=30))
def test_the_matcher_finds_every_completion_and_holds_no_more_than_needed(stop, text):
    matcher = StopMatcher(stop)
    for n, char in enumerate(text, start=1):
        got = matcher.feed(char)
        ending = [s for s in stop if text[:n].endswith(s)]
        assert got == max(ending, key=len, default=None)
        assert matcher.held == max(k for s in stop for k in range(len(s)) if text[:n].endswith(s[:k]))


@pytest.mark.parametrize("token", ["a", "bad byte"])
def test_a_long_stream_decodes_a_bounded_window(token):
    """Linear in the number of tokens: even in a run of undecodable bytes no decode grows with the stream."""
    inner = KINDS["byte_level"]
    longest = 0

    class Counting:
        def decode(self, ids, /, skip_special_tokens=True):
            nonlocal longest
            longest = max(longest, len(ids))
            return inner.decode(ids, skip_special_tokens=skip_special_tokens)

    bad = next(i for i in range(inner.get_vocab_size()) if inner.decode([i]) == UNKNOWN)
    ids = [inner.token_to_id("a") if token == "a" else bad] * 1000
    out, _ = stream(Counting(), ids)
    assert "".join(out) == inner.decode(ids)
    assert longest <= (2 * text_module.STRIDE if token == "a" else 4 * text_module.PATIENCE)


def test_special_tokens_are_skipped_unless_asked_for():
    tokenizer = KINDS["byte_level"]
    ids = [tokenizer.token_to_id("<s>"), *tokenizer.encode("the cat").ids, tokenizer.token_to_id("</s>")]
    assert "".join(stream(tokenizer, ids)[0]) == "the cat"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)[0]) == tokenizer.decode(
        ids, skip_special_tokens=False
    )
