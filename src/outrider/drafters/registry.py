"""From a name, a path or vLLM's JSON to a drafter."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from outrider.drafters.checkpoint import read_config
from outrider.drafters.combine import first_of
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.network import DFlashNetwork
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.forced import Forced
from outrider.drafters.medusa.network import MedusaDrafter, MedusaNetwork
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.tree.growth import BestFirst, Growth, Levels, Sample, Siblings
from outrider.drafters.tree.shapes import MergedDrafts, Shape, Static, levels
from outrider.drafters.vllm_config import parse_speculative_config
from outrider.errors import CapabilityError, ConfigError, unknown_name
from outrider.protocols import Drafter, Rule, Target, Tokenizer
from outrider.vocabulary import first_difference

__all__ = ["companion_folder", "load_drafter", "parse_speculative_config"]

NAMES = ("none", "auto", "ngram", "prediction", "forced", "medusa", "eagle", "dflash", "early")
SHAPES = {
    "tree": "children of a node of each level, drawn without replacement",
    "iid": "children of a node of each level, drawn independently",
    "hub": "children of a node of each level, 2 or 1; pairs of the most likely token and another one",
    "batch": "independent drafts that share nothing but the anchor",
    "shared": "independent drafts, merged where they agree",
}
"""Ways to write a tree of a draft model, and what their numbers mean."""
WAYS: dict[str, Siblings] = {"tree": "without_replacement", "iid": "iid", "hub": "hub"}
"""How siblings of a tree written level by level are drawn."""
LoadModel = Callable[[str], tuple[Target, object]]
"""Path or Hub name -> the model and its tokenizer."""
FindFolder = Callable[[str], Path]
"""Path or Hub name -> the folder, downloaded if need be."""


def load_drafter(
    spec: str,
    *,
    target: Target,
    length: int,
    rule: Rule | None = None,
    tokenizer: object | None = None,
    target_path: str | None = None,
    load_model: LoadModel | None = None,
    find_folder: FindFolder | None = None,
) -> Drafter:
    """The drafter `spec` for `target`, at most `length` deep.

    spec: one of
      "none"        plain decoding
      "ngram"       prompt lookup; "ngram:2-4" sets the sizes of its n-grams, "ngram:3" just one
      "prediction"  the request's own predicted continuation
      "forced"      what a request's grammar dictates next; "forced:4" only where it dictates at least 4 tokens
      PATH          a draft model: a folder or a Hub name; "greedy:PATH" proposes its most likely tokens, not draws,
                    "tree:3x2x1:PATH" a tree with 3 children of the anchor, 2 of each of those, and so on, drawn without
                    replacement; "iid:3x2x1:PATH" the same drawn independently; "batch:4:PATH" 4 independent drafts that
                    are tried at their first token only; "shared:4:PATH" 4 independent drafts, merged where they agree
      "medusa"      trained heads on the target's last hidden state: of the folder `medusa` beside the target, or "medusa:PATH"
      "eagle"       a trained layer on the target's hidden states, likewise
      "dflash"      a trained block drafter: all tokens of a draft from one pass, likewise
      "early:K"     the target's own first K layers with its norm and head
                    All take the prefixes above ("greedy:", "tree:3x2x1:", "iid:...", ...), and so does, for them and for a
                    draft model, "dynamic:16:PATH" or "dynamic:16x4:PATH": in every step the 16 nodes that the draft finds most
                    promising, 4 children of a node looked at
      "auto"        "prediction", then "forced", then the folder `draft` beside a target folder named `target`, or else "ngram"
      "A+B"         per sequence the first of A ("ngram", "prediction" or "forced") and B that proposes something

    rule: a rule that couples through noise lane `gumbel` makes a draft model draw with the same noise.
    load_model: loads a draft model; how (device, dtype, quantisation) is the caller's business. find_folder: finds the folder of
    a learned drafter; without it only folders are read.
    Raises ConfigError for a bad spec, CapabilityError for a draft model whose tokens mean other strings.
    """
    if length < 0:
        raise ConfigError(f"the draft length must be >= 0, got {length}; 0 is plain decoding")
    if length == 0 or spec == "none":
        return NoDraft()
    if spec == "auto":
        sibling = companion_folder(target_path, "draft")
        has_model = sibling is not None and load_model is not None
        # a model sees further than a few dictated tokens; a whole draft of them spares its passes
        spec = f"prediction+forced:{length}+{sibling}" if has_model else "prediction+forced+ngram"
    parts: list[Drafter] = []
    while (head := re.match(r"(ngram(:[^+/]*)?|prediction|forced(:\d{1,4})?)(\+|$)", spec)) is not None:
        name = head.group(1)
        parts.append(_without_model(name, length))
        spec = spec[head.end() :]
        if not spec:
            if head.group(4):
                raise ConfigError(f"a drafter is missing after {head.group(0)!r}: name one, or drop the '+'")
            return first_of(*parts)
    coupled = rule is not None and rule.lane == "gumbel"
    how = _grown(spec, length, "coupled" if coupled else "sampled")
    kind, _, path = how.path.partition(":")
    if kind == "early":
        return first_of(*parts, early_exit(target, _layers(how.path), how.growth(target.vocab_size)))
    if kind in LEARNED and (path or not Path(kind).exists()):
        return first_of(
            *parts, LEARNED[kind](_learned_folder(kind, path, target_path, find_folder), target, how, target_path)
        )
    return first_of(*parts, _model(how, target, length, tokenizer, load_model))


def companion_folder(target_path: str | None, part: str) -> str | None:
    """The folder `part` beside a folder `target`, or `part-X` or `part` beside `target-X`; None where there is none."""
    if target_path is None or not Path(target_path).expanduser().is_dir():
        return None
    folder = Path(target_path).expanduser().resolve()
    head, dash, tail = folder.name.partition("-")
    if head != "target":
        return None
    found = (folder.parent / name for name in dict.fromkeys((part + dash + tail, part)))
    return next((str(path) for path in found if path.is_dir()), None)


def _learned_folder(kind: str, path: str, target_path: str | None, find_folder: FindFolder | None) -> Path:
    """The folder of a learned drafter: the one that is named (a path or a Hub name), or the target's companion."""
    folder = path or companion_folder(target_path, kind)
    if folder is None:
        raise ConfigError(f"this target has no companion folder {kind!r}: write '{kind}:PATH', or train one")
    return Path(folder).expanduser() if find_folder is None else find_folder(folder)


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """What is written before a path: how the drafter grows its drafts."""

    path: str
    sample: Sample
    siblings: Siblings
    shape: Shape
    dynamic: tuple[int, int] | None = None

    def growth(self, vocab_size: int) -> Growth:
        if self.dynamic is not None:
            nodes, width = self.dynamic
            return BestFirst(nodes, self.shape.depth, vocab_size, width=width)
        return Levels(self.shape, vocab_size, sample=self.sample, siblings=self.siblings)


def _at_most(how: DraftSpec, depth: int) -> DraftSpec:
    """The same for a drafter that has no more than `depth` levels: a longer chain is not to be had."""
    if how.shape.depth > depth and isinstance(how.shape, Static) and how.shape.width == 1:
        return replace(how, shape=levels((1,) * depth))
    return how


def _medusa(folder: Path, target: Target, how: DraftSpec, target_path: str | None) -> Drafter:
    heads = MedusaNetwork.load(folder, target).to(target.device)
    return MedusaDrafter(heads, _at_most(how, heads.config.heads).growth(target.vocab_size))


def _dflash(folder: Path, target: Target, how: DraftSpec, target_path: str | None) -> Drafter:
    model = DFlashNetwork.load(folder, target, target_path).to(target.device)
    return DFlashDrafter(model, _at_most(how, model.config.block - 1).growth(target.vocab_size))


def _eagle(folder: Path, target: Target, how: DraftSpec, target_path: str | None) -> Drafter:
    kind = Eagle1Network if read_config(folder)[1] in ("eagle", "llama") else Eagle3Network
    return EagleDrafter(kind.load(folder, target).to(target.device), how.growth(target.vocab_size))


LEARNED: dict[str, Callable[[Path, Target, DraftSpec, str | None], Drafter]] = {
    "medusa": _medusa,
    "eagle": _eagle,
    "dflash": _dflash,
}
"""Drafters that were trained for one target, and how each is loaded."""
KINDS_OF = {"medusa": ("medusa",), "eagle": ("eagle", "eagle3", "eagle-3"), "dflash": ("dflash",)}
"""What config.json of each calls itself, where no language model does."""


def _layers(spec: str) -> int:
    found = re.fullmatch(r"early:(\d{1,4})", spec)
    if found is None:
        raise ConfigError(f"an early exit is written 'early:LAYERS', as 'early:2', got {spec!r}")
    return int(found.group(1))


def _without_model(spec: str, length: int) -> Drafter:
    """The drafter 'prediction', 'forced', 'forced:N', 'ngram' or 'ngram:SIZES'."""
    kind, _, least = spec.partition(":")
    if kind == "forced":
        return Forced(length, int(least or 1))
    return PredictedOutput(length) if kind == "prediction" else _ngram(spec, length)


def _ngram(spec: str, length: int) -> NGram:
    _, _, sizes = spec.partition(":")
    if not sizes and spec == "ngram":
        return NGram(length)
    found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", sizes)
    if found is None:
        raise ConfigError(f"n-gram sizes are written 'ngram:MIN-MAX' or 'ngram:N', got {spec!r}")
    return NGram(length, min_n=int(found.group(1)), max_n=int(found.group(2) or found.group(1)))


def _grown(spec: str, length: int, sample: Sample) -> DraftSpec:
    """A spec without the drafters that need no model -> how to grow, and what is left of it."""
    if spec.startswith("greedy:"):
        return DraftSpec(spec.removeprefix("greedy:"), "greedy", "iid", levels((1,) * length))
    if spec.startswith("dynamic:"):
        found = re.fullmatch(r"dynamic:(\d{1,4})(?:x(\d{1,3}))?:(.*)", spec)
        if found is None:
            raise ConfigError(
                f"a dynamic tree is written 'dynamic:NODES:PATH' or 'dynamic:NODESxWIDTH:PATH', got {spec!r}"
            )
        sizes = int(found.group(1)), int(found.group(2) or 4)
        return DraftSpec(found.group(3), sample, "iid", levels((1,) * length), sizes)
    if spec.partition(":")[0] in SHAPES:
        path, shape, siblings = _shape(spec, length)
        return DraftSpec(path, sample, siblings, shape)
    return DraftSpec(spec, sample, "iid", levels((1,) * length))


def _model(
    how: DraftSpec, target: Target, length: int, tokenizer: object | None, load_model: LoadModel | None
) -> ModelDrafter:
    path = how.path
    if not path or path in ("none", "auto"):
        raise ConfigError(f"{path!r} names no draft model: give a folder or a Hub name, or use 'none' or 'auto' alone")
    if get_close_matches(path, NAMES, cutoff=0.7) and not Path(path).exists():
        raise ConfigError(unknown_name("drafter", path, NAMES))
    if load_model is None:
        raise ConfigError(
            f"the draft model {path!r} cannot be loaded here: pass load_model, or a drafter without a model"
        )
    refuse_learned(path)
    model, draft_tokenizer = load_model(path)
    if tokenizer is not None and draft_tokenizer is not None:
        check_vocabulary(tokenizer, draft_tokenizer, min(target.vocab_size, model.vocab_size), path)
    return ModelDrafter(model, length, growth=how.growth(target.vocab_size), vocab_size=target.vocab_size)


def refuse_learned(path: str) -> None:
    """ConfigError for a folder that holds no model but a trained drafter, which goes by the name before its path."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return
    found = read_config(folder)[1]
    name = next((name for name, kinds in KINDS_OF.items() if found in kinds), None)
    if name is not None:
        raise ConfigError(f"{path} holds a trained drafter of type {found!r}, not a model: write {name}:{path}")


def _shape(spec: str, length: int) -> tuple[str, Shape, Siblings]:
    """Path, shape and way of drawing siblings of 'tree:3x2x1:PATH', 'batch:4:PATH' and the other SHAPES."""
    kind = spec.partition(":")[0]
    if found := re.fullmatch(r"(tree|iid|hub):((?:a|\d{1,4})(?:,(?:a|\d{1,4}))+|a):(.*)", spec):
        shape = Static(tuple(-1 if up == "a" else int(up) for up in found.group(2).split(",")))
        return found.group(3), _no_deeper(shape, length, spec), WAYS[kind]
    pattern, example = (r"(\d{1,4}(?:x\d{1,4})*)", "3x2x1") if kind in WAYS else (r"(\d{1,4})", "4")
    found = re.fullmatch(rf"{kind}:{pattern}:(.*)", spec)
    if found is None:
        raise ConfigError(f"a tree is written '{kind}:{example}:PATH' ({SHAPES[kind]}), got {spec!r}")
    numbers, path = tuple(int(w) for w in found.group(1).split("x")), found.group(2)
    if kind == "batch":
        return path, levels((numbers[0],) + (1,) * (length - 1)), "iid"
    if kind == "shared":
        return path, MergedDrafts(numbers[0], length), "iid"
    return path, _no_deeper(levels(numbers), length, spec), WAYS[kind]


def _no_deeper(shape: Static, length: int, spec: str) -> Static:
    if shape.depth > length:
        raise ConfigError(
            f"the tree of {spec!r} has {shape.depth} levels, the draft length is {length}: raise the length"
        )
    return shape


def check_vocabulary(target: object, draft: object, limit: int, name: str) -> None:
    """CapabilityError if any id below `limit` stands for different strings in the tokenizers of target and draft."""
    differs = first_difference(cast(Tokenizer, target).get_vocab(), cast(Tokenizer, draft).get_vocab(), limit)
    if differs is not None:
        token, ours, theirs = differs
        raise CapabilityError(
            f"token {token} is {ours!r} for the target and {theirs!r} for the draft model {name!r}: "
            f"write 'translate:{name}' to draft with the tokens that both spell alike, or use 'ngram'"
        )
