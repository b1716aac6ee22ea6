"""A tokenizer from a GGUF file: `tokenizers`' own machinery, set up from the file's vocabulary. Needs no torch.

Two repairs make it equal to llama.cpp's on its own test strings where transformers' builder is not: SentencePiece puts the space in
front by a normaliser (every space becomes U+2581, words are not cut first), and Llama 3's vocabularies take a word that is a token
whole, whatever the merges make of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from outrider.errors import ConfigError
from outrider.models.gguf.pretokenizers import CUTS, Cut
from outrider.models.gguf.template import render
from outrider.models.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, USER, Vocabulary, read_vocabulary

SPACE = "\u2581"


class GgufTokenizer:
    """Encodes and decodes as transformers' fast tokenizers do, and fills in the file's chat template, in a sandbox.

    name_or_path: the file. chat_template: its text, None if there is none.
    """

    def __init__(self, core: Tokenizer, vocabulary: Vocabulary) -> None:
        self._core = core
        self.name_or_path = str(vocabulary.path)
        self.chat_template = vocabulary.template
        self.special = {f"{name}_token": vocabulary.text_of(name) for name in ("bos", "eos", "unk", "pad")}
        self.bos_token_id, self.eos_token_id = vocabulary.special.get("bos"), vocabulary.special.get("eos")
        self.pad_token_id = vocabulary.special.get("pad")

    @property
    def core(self) -> Tokenizer:
        """The machinery alone."""
        return self._core

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: int | list[int], skip_special_tokens: bool = True) -> str:
        return self._core.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self._core.get_vocab(with_added_tokens=True)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **more: Any,
    ) -> str | list[int]:
        """The prompt of a conversation, as text or as ids. Raises what the template raises; `return_dict` must be False."""
        if return_dict:
            raise ConfigError("the tokenizer of a GGUF file gives ids or text, no dictionary: give return_dict=False")
        if self.chat_template is None:
            raise ConfigError(f"{self.name_or_path} has no chat template: give the prompt as text")
        named = {name: text for name, text in self.special.items() if text is not None}
        given = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **named, **more}
        text = render(self.chat_template, {"messages": messages, **given})
        return self.encode(text, add_special_tokens=False) if tokenize else text


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """The tokenizer of a GGUF file. Raises ConfigError for a vocabulary that is damaged, or cut in a way that is not known."""
    vocabulary = read_vocabulary(path)
    if vocabulary.model == "llama":
        core, begins = _sentencepiece(vocabulary), True
    else:
        cut = CUTS.get(vocabulary.cut or "")
        if cut is None:
            raise ConfigError(
                f"{path} cuts words in a way that is not known here (tokenizer.ggml.pre {str(vocabulary.cut)[:40]!r}): put the "
                "model's tokenizer.json beside the file, and it is used"
            )
        core, begins = _byte_level(vocabulary, cut), cut.begins
    _add_special(core, vocabulary)
    _add_ends(core, vocabulary, begins)
    return GgufTokenizer(core, vocabulary)


def _sentencepiece(v: Vocabulary) -> Tokenizer:
    ids = {token: i for i, token in enumerate(v.tokens)}
    unknown = v.text_of("unk")
    core = Tokenizer(
        models.BPE(
            vocab=ids, merges=list(_implied_merges(v, ids)), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if v.space_prefix else replace
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if v.space_prefix else back)
    return core


def _implied_merges(v: Vocabulary, ids: dict[str, int]) -> Iterator[tuple[str, str]]:
    """SentencePiece joins the pair whose token has the highest score: as merges, every way to make a token, best token first."""
    scores = v.scores or ()
    plain = [i for i, kind in enumerate(v.kinds) if kind not in (BYTE, CONTROL, UNKNOWN)]
    apart = {v.tokens[i] for i, kind in enumerate(v.kinds) if kind in (BYTE, CONTROL, UNKNOWN)}
    for i in sorted(plain, key=lambda i: (-scores[i], i)):
        token = v.tokens[i]
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in ids and second in ids and first not in apart and second not in apart:
                yield first, second


def _byte_level(v: Vocabulary, cut: Cut) -> Tokenizer:
    ids = {token: i for i, token in enumerate(v.tokens)}
    core = Tokenizer(models.BPE(vocab=ids, merges=v.merges or [], ignore_merges=cut.whole_words))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in cut.expressions]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _add_special(core: Tokenizer, v: Vocabulary) -> None:
    """Control tokens are special; what the model's makers added is one token in a text, and is shown."""
    of = lambda *kinds: [v.tokens[i] for i, kind in enumerate(v.kinds) if kind in kinds]  # noqa: E731
    named = {v.tokens[i] for name, i in v.special.items() if name in ("bos", "eos", "unk", "pad")}
    special = list(dict.fromkeys([*of(CONTROL, UNKNOWN), *sorted(named)]))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    shown = [token for token in of(USER) if token not in named]
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in shown])


def _add_ends(core: Tokenizer, v: Vocabulary, begins: bool) -> None:
    """The begin and the end of text, where the file says so, or its kind of vocabulary has them."""
    first = ["bos"] if (begins if v.begins is None else v.begins) and "bos" in v.special else []
    last = ["eos"] if v.ends and "eos" in v.special else []
    if not first and not last:
        return
    # by names of ours: a template reads "$" and ":" in a token's own text as signs
    given = [{"id": name, "ids": [v.special[name]], "tokens": [v.text_of(name)]} for name in (*first, *last)]
    core.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=given,  # type: ignore[arg-type]  # the library's stub knows pairs only
    )
