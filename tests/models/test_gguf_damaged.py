"""Damaged and hostile GGUF files end in one sentence (ConfigError), at once and in little memory; whole ones are read.

The reader is fed files made byte by byte: every check of the format has a file that only this check refuses, and every byte of a
small model's header is changed and cut.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.models.gguf.checkpoint import GgufCheckpoint
from outrider.models.gguf.reader import Strings, read_header
from outrider.models.gguf.vocabulary import read_vocabulary, stops
from outrider.models.gguf.weights import Weights
from tests.gguf_files import array, entry, info, make_pair, raw_file, text
from tests.work import lines_run

U32, F32, BOOL, STR, ARR, U64 = 4, 6, 7, 8, 9, 10
READER, WORK, BYTES = "models/gguf", 8, 64 << 20
"""How much a damaged file may cost its reader: so many times the lines of Python that the whole one takes, and memory."""
ARCH = entry("general.architecture", STR, text("llama"))


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def strings(key: str, values: list[str | bytes]) -> bytes:
    return entry(key, ARR, array(STR, len(values), b"".join(map(text, values))))


def read(path: Path) -> None:
    """Everything that loading reads before it allocates weights."""
    GgufCheckpoint(path)
    read_vocabulary(path)
    stops(path)


GOOD = raw_file([ARCH, u32("general.alignment", 32)], [info("a", (4, 2), 0, 0)], bytes(32))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "magic": (b"GGML" + GOOD[4:], "no GGUF file"),
    "version 1": (raw_file([ARCH], version=1), "version 1"),
    "version 4": (raw_file([ARCH], version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
    "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63) + bytes(64), "do not fit"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0) + bytes(64), "do not fit"),
    "name without end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(64), "where at most"),
    "text without end": (raw_file([text("a") + struct.pack("<IQ", STR, 1 << 33), bytes(40)]), "where at most"),
    "name not UTF-8": (raw_file([entry(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "text not UTF-8": (raw_file([entry("a", STR, text(b"\xc3\x28"))]), "not UTF-8"),
    "no name": (raw_file([entry("", U32, bytes(4))]), "no name"),
    "key twice": (raw_file([u32("a.b", 1), u32("a.b", 2)]), "occurs twice"),
    "type 13": (raw_file([entry("a", 13, bytes(8))]), "unknown type 13"),
    "bool 2": (raw_file([entry("a", BOOL, b"\x02")]), "true or false"),
    "array of arrays": (raw_file([entry("a", ARR, array(ARR, 1, array(U32, 1, bytes(4))))]), "arrays, which no model has"),
    "array of type 99": (raw_file([entry("a", ARR, array(99, 1, bytes(8)))]), "unknown type 99"),
    "long array": (raw_file([entry("a", ARR, array(U64, 1 << 20, bytes(80)))]), "more than can follow"),
    "endless array": (raw_file([entry("a", ARR, array(U32, 1 << 62, bytes(80)))]), "no model has so many"),
    "many texts": (raw_file([entry("a", ARR, array(STR, 1 << 20, bytes(80)))]), "more than can follow"),
    "long text in an array": (raw_file([entry("a", ARR, array(STR, 2, struct.pack("<QQ", 0, 1 << 40)))]), "where at most"),
    "alignment 0": (raw_file([u32("general.alignment", 0)]), "power of two"),
    "alignment 48": (raw_file([u32("general.alignment", 48)]), "power of two"),
    "alignment 2^31": (raw_file([u32("general.alignment", 1 << 31)]), "power of two"),
    "alignment text": (raw_file([entry("general.alignment", STR, text("32"))]), "power of two"),
    "tensor name": (raw_file([ARCH], [info("x" * 64, (4,), 0, 0)], bytes(32)), "where at most 63"),
    "tensor twice": (raw_file([ARCH], [info("a", (4,), 0, 0), info("a", (4,), 0, 32)], bytes(64)), "occurs twice"),
    "no dimension": (raw_file([ARCH], [info("a", (), 0, 0)], bytes(32)), "0 dimensions"),
    "five dimensions": (raw_file([ARCH], [info("a", (1,) * 5, 0, 0)], bytes(32)), "5 dimensions"),
    "dimension 0": (raw_file([ARCH], [info("a", (4, 0), 0, 0)], bytes(32)), "has the shape"),
    "product wraps": (raw_file([ARCH], [info("a", (1 << 32, 1 << 32), 0, 0)], bytes(32)), "has the shape"),
    "type 12345": (raw_file([ARCH], [info("a", (4,), 12345, 0)], bytes(32)), "unknown type 12345"),
    "type removed": (raw_file([ARCH], [info("a", (32,), 31, 0)], bytes(32)), r"q4_0_4_4 \(llama.cpp removed it\)"),
    "type not read": (raw_file([ARCH], [info("a", (256,), 16, 0)], bytes(96)), "iq2_xxs"),
    "broken blocks": (raw_file([ARCH], [info("a", (33,), 8, 0)], bytes(64)), "multiple of 32"),
    "offset odd": (raw_file([ARCH], [info("a", (4,), 0, 8)], bytes(64)), "not at a place"),
    "offset beyond": (raw_file([ARCH], [info("a", (4,), 0, 1 << 63)], bytes(64)), "not at a place"),
    "cut off": (raw_file([ARCH], [info("a", (4, 4), 0, 0)], bytes(60)), "was cut off"),
    "huge": (raw_file([ARCH], [info("a", (1 << 62,), 0, 0)], bytes(64)), "was cut off"),
    "overlap": (raw_file([ARCH], [info("a", (16,), 0, 0), info("b", (16,), 0, 32)], bytes(96)), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_headers(name: str, tmp_path: Path) -> None:
    data, said = BAD[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        Weights(tmp_path / "x.gguf")


def test_the_file_they_derive_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(GOOD)
    assert Weights(tmp_path / "x.gguf").tensors["a"].shape == (2, 4)


def vocabulary(tokens: list[str | bytes], /, **changes: bytes | None) -> bytes:
    """A SentencePiece vocabulary with these tokens; changes replace or remove keys."""
    n = len(tokens)
    keys: dict[str, bytes | None] = {
        "model": entry("tokenizer.ggml.model", STR, text("llama")),
        "tokens": strings("tokenizer.ggml.tokens", tokens),
        "scores": entry("tokenizer.ggml.scores", ARR, array(F32, n, struct.pack(f"<{n}f", *range(n)))),
        "types": entry("tokenizer.ggml.token_type", ARR, array(5, n, struct.pack(f"<{n}i", *[1] * n))),
    }
    return raw_file([ARCH, *(value for value in (keys | changes).values() if value is not None)])


def model(name: str) -> bytes:
    return entry("tokenizer.ggml.model", STR, text(name))


def kinds(*values: int) -> bytes:
    return entry("tokenizer.ggml.token_type", ARR, array(5, len(values), struct.pack(f"<{len(values)}i", *values)))


def merges(*pairs: str) -> bytes:
    return strings("tokenizer.ggml.merges", list(pairs))


ABC: list[str | bytes] = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
BAD_WORDS: dict[str, tuple[bytes, str]] = {
    "model": (vocabulary(ABC, model=model("t5")), "of the kind 't5'"),
    "no tokens": (vocabulary(ABC, tokens=None), "no list of tokens"),
    "tokens are numbers": (
        vocabulary(ABC, tokens=entry("tokenizer.ggml.tokens", ARR, array(U32, 6, bytes(24)))), "no list of tokens"),
    "token twice": (vocabulary([*ABC[:5], "a"]), "occurs twice"),
    "token not UTF-8": (vocabulary([*ABC[:5], b"\xff"]), "not UTF-8"),
    "no scores": (vocabulary(ABC, scores=None), "no scores"),
    "few scores": (vocabulary(ABC, scores=entry("tokenizer.ggml.scores", ARR, array(F32, 2, bytes(8)))), "each of the 6"),
    "scores are bytes": (vocabulary(ABC, scores=entry("tokenizer.ggml.scores", ARR, array(0, 6, bytes(6)))), "each of the 6"),
    "score NaN": (
        vocabulary(ABC, scores=entry("tokenizer.ggml.scores", ARR, array(F32, 6, struct.pack("<6f", *[float("nan")] * 6)))),
        "no number"),
    "kinds are floats": (
        vocabulary(ABC, types=entry("tokenizer.ggml.token_type", ARR, array(F32, 6, bytes(24)))), "each of the 6"),
    "kind 7": (vocabulary(ABC, types=kinds(1, 1, 1, 1, 1, 7)), "kind that does not exist"),
    "byte token": (vocabulary([*ABC[:5], "<0x-1>"], types=kinds(1, 1, 1, 1, 1, 6)), "not written <0xNN>"),
    "token too long": (vocabulary([*ABC[:5], "a" * 1025]), "1025 characters"),
    "end beyond": (vocabulary(ABC, end=u32("tokenizer.ggml.eos_token_id", 6)), "from 0 to 5"),
    "default beyond": (vocabulary(["a", "b"]), "no token 2 for eos"),
    "no merges": (vocabulary(ABC, model=model("gpt2")), "no merges"),
    "merge of one": (vocabulary(ABC, model=model("gpt2"), merges=merges("ab")), "not of two tokens"),
    "merge of strangers": (vocabulary(ABC, model=model("gpt2"), merges=merges("a x")), "not of two tokens"),
    "merge to a stranger": (vocabulary(ABC, model=model("gpt2"), merges=merges("b a")), "not of two tokens"),
    "template": (
        vocabulary(ABC, template=entry("tokenizer.chat_template", STR, text("x" * (1 << 20 | 1)))), "chat template"),
    "flag": (vocabulary(ABC, flag=u32("tokenizer.ggml.add_bos_token", 1)), "true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_WORDS)
def test_damaged_vocabularies(name: str, tmp_path: Path) -> None:
    data, said = BAD_WORDS[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        read_vocabulary(tmp_path / "x.gguf")


def test_the_vocabulary_they_derive_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(vocabulary([*ABC[:5], ""], types=kinds(2, 3, 3, 1, 1, 5)))
    found = read_vocabulary(tmp_path / "x.gguf")
    assert found.tokens[5] == "[EMPTY_5]" and found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert stops(tmp_path / "x.gguf") == (2,)


def test_ends_of_text_are_refused_where_the_vocabulary_is(tmp_path: Path) -> None:
    """They are also asked for where a tokenizer.json beside the file has taken the place of the damaged vocabulary."""
    (tmp_path / "x.gguf").write_bytes(vocabulary(ABC, types=u32("tokenizer.ggml.token_type", 3)))
    with pytest.raises(ConfigError, match="each of the 6"):
        stops(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole model whose header has some 2 KB, with a vocabulary."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    _, file = make_pair(folder, **sizes, num_attention_heads=2, num_key_value_heads=2)
    gguf = pytest.importorskip("gguf")
    weights = Weights(file)
    writer = gguf.GGUFWriter(folder / "out.gguf", "llama")
    for key, value in weights.values.items():
        if not key.startswith(("tokenizer", "general.architecture")):
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(ABC)
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1])
    writer.add_eos_token_id(2)
    for name in weights.tensors:
        writer.add_tensor(name, weights.numbers(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "out.gguf").read_bytes()


def damage(data: bytes, path: Path, changed: bytes) -> bool:
    """Whether the changed file is refused; anything but ConfigError raises."""
    if changed == data:
        return False
    path.write_bytes(changed)
    try:
        read(path)
        said = ""
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    return bool(said)


def header_bytes(data: bytes, path: Path) -> int:
    path.write_bytes(data)
    read(path)
    return min(info.offset for info in read_header(path).tensors)


STEPS = [pytest.param(17, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
def test_every_byte_of_a_header_changed_and_cut(small: bytes, step: int, tmp_path: Path) -> None:
    """Each byte gets two other values, and the file is cut at each."""
    path = tmp_path / "x.gguf"
    end, whole, work = header_bytes(small, path), lines_run(lambda: read(path), READER), []
    assert 1200 < end < 4096 and whole > 500

    def is_refused(changed: bytes) -> bool:
        found: list[bool] = []
        work.append(lines_run(lambda: found.append(damage(small, path, changed)), READER))
        return found[0]

    refused = 0
    for i in range(0, end, step):
        for value in (small[i] ^ 0xFF, small[i] ^ 1):
            refused += is_refused(small[:i] + bytes([value]) + small[i + 1 :])
        assert is_refused(small[:i])
    assert refused > end // step  # the others change a name, a score or a norm: another file, and no damaged one
    assert max(work) < WORK * whole, (max(work), whole)


@pytest.mark.parametrize("step", STEPS)
def test_every_length_and_count_changed(small: bytes, step: int, tmp_path: Path) -> None:
    """Every eight bytes of the header become 0, 1, 2^31, 2^63 and 2^64 - 1; none makes the reader ask for memory."""
    path = tmp_path / "x.gguf"
    tracemalloc.start()
    for i in range(8, header_bytes(small, path) - 8, step):
        for value in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1):
            damage(small, path, small[:i] + struct.pack("<Q", value) + small[i + 8 :])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BYTES


KEYS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "architecture": (lambda d: d.replace(text("llama"), text("llamb"), 1), "architecture 'llamb'"),
    "layers": (lambda d: patched(d, "llama.block_count", 900), "tensors for 900 layers"),
    "heads": (lambda d: patched(d, "llama.attention.head_count", 3), "must be a multiple|has shape"),
    "width": (lambda d: patched(d, "llama.embedding_length", 16), "has shape"),
    "experts": (lambda d: d.replace(b"llama.vocab_size", b"llama.expert_cnt"), "not known to be without effect"),
    "context": (lambda d: patched(d, "llama.context_length", 0), "from 1"),
    "a tensor away": (lambda d: d.replace(b"ffn_up", b"ffn_uq"), "is missing"),
}


def patched(data: bytes, key: str, value: int) -> bytes:
    at = data.index(text(key)) + len(text(key)) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_contradict_the_tensors(name: str, small: bytes, tmp_path: Path) -> None:
    change, said = KEYS[name]
    (tmp_path / "x.gguf").write_bytes(change(small))
    with pytest.raises(ConfigError, match=said):
        GgufCheckpoint(tmp_path / "x.gguf")


def test_strings_are_made_when_they_are_asked_for(small: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small)
    stored = read_header(tmp_path / "x.gguf").values["tokenizer.ggml.tokens"]
    assert isinstance(stored, Strings) and stored.decoded("tokens", tmp_path) == ABC
