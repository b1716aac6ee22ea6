"""Tokenizers and chat templates from GGUF files: those of the folder they were made from, text by text."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from outrider.errors import ConfigError
from outrider.models.convert import convert
from outrider.models.gguf.template import TemplateRefusal, render
from outrider.models.gguf.tokenizer import GgufTokenizer
from outrider.models.load import find_tokenizer, load_tokenizer, stop_ids, vocab_fingerprint
from outrider.models.tokenizer import whole_tokenizer
from outrider.vocabulary import first_difference
from tests.checkpoints import make_checkpoint
from tests.gguf_files import byte_level, make_pair, save_tokenizer, sentencepiece
from tests.models.test_gguf_damaged import kinds, vocabulary

pytest.importorskip("gguf")
TEXTS = [
    "", " ", "  ", "   ", "\n", "\t\n ", "Hello", " Hello", "  Hello  ", "def main(): return 'hello'  # x", "It's 3.14159 o'clock",
    "a\n\n\nb", "été 日本語 🙂", "\u200b\ufeff", "quick brown fox", "tabs\tand   spaces ", "<s>text</s> more", "12345 67", "ﬁ ½",
]  # fmt: skip
KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <s> there"}]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a tokenizer of this kind, and the GGUF file of it."""
    folder = tmp_path_factory.mktemp("pair")
    core: Tokenizer = KINDS[request.param]()
    source = make_checkpoint(folder / "source", vocab_size=core.get_vocab_size(), num_hidden_layers=1)
    named = {"byte-level": {"pad_token": "<pad>"}, "sentencepiece": {"unk_token": "<unk>"}}[request.param]
    save_tokenizer(core, source, bos_token="<s>", eos_token="</s>", **named)
    convert(source, folder / "model.gguf", "f32")
    return source, folder / "model.gguf"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_those_of_the_folder(pair: tuple[Path, Path], text: str) -> None:
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(pair[0]), load_tokenizer(pair[1])
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert all(ours.decode(i, skip_special_tokens=False) == theirs.decode(i) for i in ids)


def test_vocabularies_agree_by_text(pair: tuple[Path, Path]) -> None:
    """So that a folder can draft for a file, and a file for a folder."""
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(pair[0]), load_tokenizer(pair[1])
    assert isinstance(ours, GgufTokenizer)
    assert vocab_fingerprint(ours) == vocab_fingerprint(theirs)
    assert first_difference(theirs.get_vocab(), ours.get_vocab()) is None
    assert stop_ids(pair[1], ours) == (theirs.eos_token_id,)


@pytest.mark.parametrize("more", [False, True])
def test_conversations_are_filled_in_as_transformers_does(pair: tuple[Path, Path], more: bool) -> None:
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(pair[0]), load_tokenizer(pair[1])
    asked = {"add_generation_prompt": more, "return_dict": False}
    assert ours.apply_chat_template(TALK, tokenize=False, **asked) == theirs.apply_chat_template(
        TALK, tokenize=False, **asked
    )
    assert ours.apply_chat_template(TALK, tokenize=True, **asked) == theirs.apply_chat_template(
        TALK, tokenize=True, **asked
    )


def test_it_can_be_saved_as_transformers_saves_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = whole_tokenizer(pair[1])
    whole.save_pretrained(tmp_path)
    again, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(pair[1])
    assert all(again.encode(text) == ours.encode(text) for text in TEXTS)
    assert again.chat_template == ours.chat_template


def test_a_file_without_a_vocabulary_works_on_ids(tmp_path: Path) -> None:
    _, file = make_pair(tmp_path)
    assert find_tokenizer(file) is None
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(file)


def test_an_unknown_way_to_cut_words_takes_the_file_beside(tmp_path: Path) -> None:
    source, file = make_pair(tmp_path, tokenizer=True)
    data = file.read_bytes()
    file.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-9"))
    with pytest.raises(ConfigError, match=r"gpt-9.*tokenizer\.json beside"):
        load_tokenizer(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert load_tokenizer(file).encode("hello") == load_tokenizer(source).encode("hello")


@pytest.mark.parametrize("begin", ["a:b", "$A", "$x", ":"])
def test_special_tokens_may_have_any_text(begin: str, tmp_path: Path) -> None:
    """Also one that means something in the templates of the library."""
    (tmp_path / "x.gguf").write_bytes(
        vocabulary(["<unk>", begin, "</s>", "a", "b", "ab"], types=kinds(2, 3, 3, 1, 1, 1))
    )
    assert load_tokenizer(tmp_path / "x.gguf").encode("ab") == [1, 0, 5]


HOSTILE = {
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "changes": "{{ messages.append(1) }}",
    "functions": "{{ raise_exception.__globals__ }}",
    "formats": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "range": "{{ range(10 ** 9) | length }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_templates_reach_nothing(name: str) -> None:
    """jinja2 answers with an error of its own, or with nothing; and the conversation is as it was."""
    out, messages = "", [{"role": "user", "content": "x"}]
    with contextlib.suppress(jinja2.TemplateError, OverflowError):
        out = render(HOSTILE[name], {"messages": messages})
    assert out == "" and messages == [{"role": "user", "content": "x"}]


def test_what_templates_expect() -> None:
    assert render("{{ {'a': 'é<'} | tojson }}", {}) == '{"a": "é<"}'
    assert render("{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}) == "1"
    assert render("{% generation %}{{ x }}{% endgeneration %}", {"x": "y"}) == "y"
    with pytest.raises(TemplateRefusal, match="roles"):
        render("{{ raise_exception('roles') }}", {})
