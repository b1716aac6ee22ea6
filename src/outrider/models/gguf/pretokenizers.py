"""How byte-level vocabularies cut a text into words, by the name in `tokenizer.ggml.pre`: facts of the models' tokenizer files.

Expressions are applied one after the other, each to the pieces that the ones before have left whole. They are those of the models'
own tokenizer.json (llama.cpp's `src/llama-vocab.cpp` has the same in its spelling).
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True, slots=True)
class Cut:
    """expressions: see the module. whole_words: a word that is a token is that token, whatever the merges make of it.

    begins: whether the begin of text is added where the file does not say.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


def _words(digits: str) -> str:
    return _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + _TAIL


def _cased(contractions: str, digits: str) -> str:
    """Words end where a capital follows a small letter (Tekken, o200k)."""
    end = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{end}{_UPPER}*{_LOWER}+{contractions}|{end}{_UPPER}+{_LOWER}*{contractions}|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = Cut((_words(r"\p{N}{1,3}"),), whole_words=True, begins=True)
_LLAMA3_LIKE = Cut((_words(r"\p{N}{1,3}"),))
_QWEN2 = Cut((_words(r"\p{N}"),))
_DIGITS = Cut((r"\p{N}", _GPT2))
_PLAIN = Cut((_GPT2,))
_O200K = Cut((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),))
_DEEPSEEK_CODER = Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))

CUTS: dict[str, Cut] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _LLAMA3_LIKE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b", "exaone"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling"), _PLAIN),
    **dict.fromkeys(("gpt-4o", "kanana2"), _O200K),
    "tekken": Cut((_cased("", r"\p{N}"),), whole_words=True, begins=True),
    "glm4": Cut(_LLAMA3.expressions, whole_words=True),
    "deepseek-coder": _DEEPSEEK_CODER,
}
"""The names that are read; a file with another one needs its tokenizer.json beside it."""
