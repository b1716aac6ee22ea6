"""The tokenizer of a folder in the keys of a GGUF file. What GGUF has no words for is refused, never written almost right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider.files import read_json
from outrider.models.gguf.pretokenizers import CUTS
from outrider.models.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER

_FILE_BYTES = 128 << 20
_PREFERRED = ("gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken", "gpt-4o", "deepseek-coder", "glm4")
"""Of the names that mean the same, those that are written."""
_SPACE = "\u2581"


def vocabulary_keys(folder: Path, rows: int) -> dict[str, Any]:
    """Keys behind `tokenizer.` for the tokenizer of a folder, padded to the `rows` of the embedding; empty without a tokenizer."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {"ggml.model": "none"}
    try:
        return _keys(file, rows)
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise _unwritable(file, f"it is damaged: {type(error).__name__} {str(error)[:80]}") from None


def _keys(file: Path, rows: int) -> dict[str, Any]:
    data, folder = read_json(file, _FILE_BYTES), file.parent
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file, _FILE_BYTES) if settings_file.is_file() else {}
    model = data.get("model", {})
    if model.get("type") != "BPE":
        raise _unwritable(file, f"its model is {model.get('type')!r}, not BPE")
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    ids = {**model["vocab"], **{token["content"]: i for i, token in added.items()}}
    names = {i: text for text, i in ids.items()}
    last = max(names, default=0)
    if last >= rows:
        raise _unwritable(file, f"it has the token {last} and the embedding {rows} rows")
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [NORMAL if i in names else UNUSED for i in range(rows)]
    for i, token in added.items():
        kinds[i] = CONTROL if token.get("special") else USER
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    out: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if sentencepiece:
        out |= _sentencepiece(file, data, model, tokens, kinds, merges)
    elif not merges:
        raise _unwritable(file, "it has no merges")
    else:
        out |= {
            "ggml.model": "gpt2",
            "ggml.pre": _cut_name(file, data, model),
            "ggml.merges": [" ".join(m) for m in merges],
        }
    return out | _special(settings, ids, data) | _template(folder, settings)


def _unwritable(file: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{file} cannot be written to a GGUF file ({what}): convert this model with llama.cpp's converter"
    )


def _sentencepiece(
    file: Path,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    tokens: list[str],
    kinds: list[int],
    merges: list[Any],
) -> dict[str, Any]:
    """Scores that order tokens as the merges do: the rank of the first merge that makes a token."""
    steps = (data.get("normalizer") or {}).get("normalizers") or [data.get("normalizer") or {}]
    if data.get("pre_tokenizer") is not None or not any(step.get("type") == "Replace" for step in steps):
        raise _unwritable(file, "its spaces are not written by a normaliser")
    rank: dict[str, int] = {}
    for place, (first, second) in enumerate(merges):
        rank.setdefault(first + second, place)
    last = float(len(merges))
    for i, token in enumerate(tokens):
        if kinds[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = BYTE
        if token == model.get("unk_token"):
            kinds[i] = UNKNOWN
    scores = [-float(rank.get(token, last)) if kinds[i] == NORMAL else 0.0 for i, token in enumerate(tokens)]
    prefix = any(step.get("type") == "Prepend" for step in steps)
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def _cut_name(file: Path, data: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """GGUF's name for how a byte-level tokenizer cuts words."""
    if data.get("normalizer") not in (None, {"type": "NFC"}):
        raise _unwritable(file, "its texts are normalised")
    stage = data.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers") if stage.get("type") == "Sequence" else [stage]
    expressions: list[str] = []
    for one in stages or []:
        kind = one.get("type")
        if kind == "Split" and one.get("behavior", "").lower() == "isolated" and not one.get("invert"):
            expressions.append((one.get("pattern") or {}).get("Regex", ""))
        elif kind == "Digits" and one.get("individual_digits"):
            expressions.append(r"\p{N}")
        elif kind == "ByteLevel" and not one.get("add_prefix_space"):
            expressions += [CUTS["gpt-2"].expressions[0]] if one.get("use_regex", True) else []
        else:
            raise _unwritable(file, f"its pre-tokenizer has the stage {str(kind)[:40]}")
    wanted = (tuple(expressions), bool(model.get("ignore_merges")))
    found = [name for name in _PREFERRED if (CUTS[name].expressions, CUTS[name].whole_words) == wanted]
    if not found:
        raise _unwritable(file, "it cuts words in a way that GGUF has no name for")
    return found[0]


def _special(settings: Mapping[str, Any], ids: Mapping[str, int], data: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            out[f"ggml.{key}_token_id"] = ids[text]
    single = (data.get("post_processor") or {}).get("single") or []
    around = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
    begin, end = out.get("ggml.bos_token_id"), out.get("ggml.eos_token_id")
    out["ggml.add_bos_token"] = any(ids.get(text) == begin for text in around[:1]) and begin is not None
    out["ggml.add_eos_token"] = any(ids.get(text) == end for text in around[-1:]) and end is not None and end != begin
    return out


def _template(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    return {"chat_template": template} if isinstance(template, str) else {}
