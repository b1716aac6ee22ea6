"""From a name, a path or vLLM's JSON to a drafter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from outrider.drafters.combine import first_of
from outrider.drafters.model import ModelDrafter, Sample, Siblings
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import Prediction
from outrider.drafters.shapes import Shape, Shared, levels
from outrider.drafters.vllm_config import parse_speculative_config
from outrider.errors import CapabilityError, ConfigError, unknown_name
from outrider.protocols import Drafter, Rule, Target

__all__ = ["first_difference", "load_drafter", "parse_speculative_config"]

NAMES = ("none", "auto", "ngram", "prediction")
SHAPES = {
    "tree": "children of a node of each level, drawn without replacement",
    "iid": "children of a node of each level, drawn independently",
    "batch": "independent drafts that share nothing but the anchor",
    "shared": "independent drafts, merged where they agree",
}
"""Ways to write a tree of a draft model, and what their numbers mean."""
LoadModel = Callable[[str], tuple[Target, object]]
"""Path or Hub name -> the model and its tokenizer."""


@runtime_checkable
class _Tokenizer(Protocol):
    def get_vocab(self) -> Mapping[str, int]: ...


def load_drafter(
    spec: str,
    *,
    target: Target,
    length: int,
    rule: Rule | None = None,
    tokenizer: object | None = None,
    target_path: str | None = None,
    load_model: LoadModel | None = None,
) -> Drafter:
    """The drafter `spec` for `target`, at most `length` deep.

    spec: one of
      "none"        plain decoding
      "ngram"       prompt lookup; "ngram:2-4" sets the sizes of its n-grams, "ngram:3" just one
      "prediction"  the request's own predicted continuation
      PATH          a draft model: a folder or a Hub name; "greedy:PATH" proposes its most likely tokens, not draws,
                    "tree:3x2x1:PATH" a tree with 3 children of the anchor, 2 of each of those, and so on, drawn without
                    replacement; "iid:3x2x1:PATH" the same drawn independently; "batch:4:PATH" 4 independent drafts that
                    are tried at their first token only; "shared:4:PATH" 4 independent drafts, merged where they agree
      "auto"        "prediction", then the folder `draft` beside a target folder named `target`, or else "ngram"
      "A+B"         per sequence the first of A ("ngram" or "prediction") and B that proposes something

    rule: a rule that couples through noise lane `gumbel` makes a draft model draw with the same noise.
    load_model: loads a draft model; how (device, dtype, quantisation) is the caller's business.
    Raises ConfigError for a bad spec, CapabilityError for a draft model whose tokens mean other strings.
    """
    if length < 0:
        raise ConfigError(f"the draft length must be >= 0, got {length}; 0 is plain decoding")
    if length == 0 or spec == "none":
        return NoDraft()
    if spec == "auto":
        sibling = _sibling(target_path)
        spec = f"prediction+{sibling}" if sibling is not None and load_model is not None else "prediction+ngram"
    parts: list[Drafter] = []
    while (head := re.match(r"(ngram(:[^+/]*)?|prediction)(\+|$)", spec)) is not None:
        name = head.group(1)
        parts.append(Prediction(length) if name == "prediction" else _ngram(name, length))
        spec = spec[head.end() :]
        if not spec:
            if head.group(3):
                raise ConfigError(f"a drafter is missing after {head.group(0)!r}: name one, or drop the '+'")
            return first_of(*parts)
    coupled = rule is not None and rule.lane == "gumbel"
    return first_of(*parts, _model(spec, target, length, coupled, tokenizer, load_model))


def _sibling(target_path: str | None) -> str | None:
    """The folder `draft` beside a folder `target`."""
    if target_path is None:
        return None
    folder = Path(target_path).expanduser()
    draft = folder.resolve().parent / "draft"
    return str(draft) if folder.is_dir() and folder.resolve().name == "target" and draft.is_dir() else None


def _ngram(spec: str, length: int) -> NGram:
    _, _, sizes = spec.partition(":")
    if not sizes and spec == "ngram":
        return NGram(length)
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", sizes)
    if found is None:
        raise ConfigError(f"n-gram sizes are written 'ngram:MIN-MAX' or 'ngram:N', got {spec!r}")
    return NGram(length, min_n=int(found.group(1)), max_n=int(found.group(2) or found.group(1)))


def _model(
    spec: str, target: Target, length: int, coupled: bool, tokenizer: object | None, load_model: LoadModel | None
) -> ModelDrafter:
    sample: Sample = "coupled" if coupled else "law"
    path, shape = spec, None
    siblings: Siblings = "iid"
    if spec.startswith("greedy:"):
        sample, path = "greedy", spec.removeprefix("greedy:")
    elif spec.partition(":")[0] in SHAPES:
        path, shape, siblings = _shape(spec, length)
    if not path or path in ("none", "auto"):
        raise ConfigError(f"{spec!r} names no draft model: give a folder or a Hub name, or use 'none' or 'auto' alone")
    if get_close_matches(path, NAMES, cutoff=0.7) and not Path(path).exists():
        raise ConfigError(unknown_name("drafter", path, NAMES))
    if load_model is None:
        raise ConfigError(
            f"the draft model {path!r} cannot be loaded here: pass load_model, or a drafter without a model"
        )
    model, draft_tokenizer = load_model(path)
    if tokenizer is not None and draft_tokenizer is not None:
        check_vocabulary(tokenizer, draft_tokenizer, min(target.vocab_size, model.vocab_size), path)
    return ModelDrafter(
        model,
        length,
        shape=shape,
        siblings=siblings,
        sample=sample,
        vocab_size=target.vocab_size,
    )


def _shape(spec: str, length: int) -> tuple[str, Shape, Siblings]:
    """Path, shape and way of drawing siblings of 'tree:3x2x1:PATH', 'iid:3x2x1:PATH', 'batch:4:PATH', 'shared:4:PATH'."""
    kind = spec.partition(":")[0]
    pattern, example = (r"(\d{1,4}(?:x\d{1,4})*)", "3x2x1") if kind in ("tree", "iid") else (r"(\d{1,4})", "4")
    found = re.fullmatch(rf"{kind}:{pattern}:(.*)", spec)
    if found is None:
        raise ConfigError(f"a tree is written '{kind}:{example}:PATH' ({SHAPES[kind]}), got {spec!r}")
    numbers, path = tuple(int(w) for w in found.group(1).split("x")), found.group(2)
    if len(numbers) > length:
        raise ConfigError(
            f"the tree of {spec!r} has {len(numbers)} levels, the draft length is {length}: raise the length"
        )
    if kind == "batch":
        return path, levels((numbers[0],) + (1,) * (length - 1)), "iid"
    if kind == "shared":
        return path, Shared(numbers[0], length), "iid"
    return path, levels(numbers), "iid" if kind == "iid" else "without_replacement"


def check_vocabulary(target: object, draft: object, limit: int, name: str) -> None:
    """CapabilityError if any id below `limit` stands for different strings in the tokenizers of target and draft."""
    differs = first_difference(cast(_Tokenizer, target).get_vocab(), cast(_Tokenizer, draft).get_vocab(), limit)
    if differs is not None:
        token, ours, theirs = differs
        raise CapabilityError(
            f"token {token} is {ours!r} for the target and {theirs!r} for the draft model {name!r}: "
            "use a draft with the target's tokenizer, or 'ngram'"
        )


def first_difference(target: Mapping[str, int], draft: Mapping[str, int], limit: int) -> tuple[int, str, str] | None:
    """Lowest id below `limit` that two vocabularies (string -> id) both have and read differently, with both strings.

    An id that only one of them has is padding of the other one's model and no difference.
    """
    ours = {token: text for text, token in target.items()}
    pairs = ((i, ours.get(i, text), text) for text, i in draft.items() if i < limit)
    return min((pair for pair in pairs if pair[1] != pair[2]), default=None)
