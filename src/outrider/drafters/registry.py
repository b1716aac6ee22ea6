"""The table of drafters: from a name, a path or vLLM's JSON to a drafter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from outrider.drafters import counts, dflash, eagle, medusa, mtp, vllm_config
from outrider.drafters.ahead import Ahead
from outrider.drafters.apart import Apart
from outrider.drafters.checkpoint import read_config
from outrider.drafters.combine import first_of
from outrider.drafters.jacobi import parse_jacobi
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.none import NoDraft
from outrider.drafters.sparse import load_early, load_sparse, parse_sparse, view_beside, worthwhile_from
from outrider.drafters.spec import DraftSpec, parse_ahead, parse_draft
from outrider.drafters.tree.growth import Sample
from outrider.drafters.vocabulary import check_vocabulary
from outrider.drafters.without_model import check_option, hosts_of
from outrider.errors import CapabilityError, ConfigError, unknown_name
from outrider.nn.held import Rounding
from outrider.options import DRAFTERS, OF_THE_TARGET, not_apart
from outrider.protocols import Drafter, Rule, Target
from outrider.raster import find_raster


@dataclass(frozen=True, slots=True)
class LearnedDrafter:
    """A kind of drafter that is trained for one target.

    load: (folder, target, how drafts grow, the target's folder if it has one) -> the drafter. folder_types: model types in the
    `config.json` of its folders that no language model uses. vllm_methods: the methods of vLLM's `speculative_config` that mean
    it, the preferred one first. carried: whether a model's own folder has one.
    """

    load: Callable[[Path, Target, DraftSpec, str | None], Drafter]
    folder_types: tuple[str, ...]
    vllm_methods: tuple[str, ...] = ()
    carried: Callable[[Path], object] | None = None


LEARNED: Mapping[str, LearnedDrafter] = {
    "medusa": LearnedDrafter(medusa.load, ("medusa",), ("medusa",)),
    "eagle": LearnedDrafter(eagle.load, ("eagle", "eagle3", "eagle-3"), ("eagle", "eagle3")),
    "dflash": LearnedDrafter(dflash.load, ("dflash",), ("dflash",)),
    "mtp": LearnedDrafter(
        mtp.load,
        ("mtp",),
        ("mtp", "deepseek_mtp", "glm4_moe_mtp", "glm4_moe_lite_mtp", "mimo_mtp", "qwen3_next_mtp", "qwen3_5_mtp"),
        mtp.carried,
    ),
    "counts": LearnedDrafter(counts.load, ("counts",)),
}
"""A row for each learned drafter, by the name that `--draft`, a request and an experiment give it."""
AUTO_VIEW = "window:16+496"
"""The view of the target's own cache that "auto" drafts over at long contexts."""
LoadModel = Callable[[str], tuple[Target, object]]
"""Path or Hub name -> the model and its tokenizer."""
LoadElsewhere = Callable[[str], Callable[[], Target]]
"""Path or Hub name -> what loads the model in another process: it can be pickled."""
FindFolder = Callable[[str], Path]
"""Path or Hub name -> the folder, downloaded if necessary."""


def load_drafter(
    spec: str,
    *,
    target: Target,
    length: int,
    rule: Rule | None = None,
    tokenizer: object | None = None,
    target_path: str | None = None,
    load_model: LoadModel | None = None,
    load_elsewhere: LoadElsewhere | None = None,
    find_folder: FindFolder | None = None,
    rounding: Rounding | None = None,
    learned: Mapping[str, LearnedDrafter] = LEARNED,
) -> Drafter:
    """The drafter `spec` for `target`, with drafts of at most `length` levels.

    spec: one of
      "none"        plain decoding
      "ngram"       prompt lookup; "ngram:2-4" sets the sizes of its n-grams, "ngram:3" just one
      "prediction"  the request's own predicted continuation
      "suffix"      what most often followed the text's end, by a suffix tree over the text; "suffix:shared" also over the texts of
                    requests that have ended, for requests without a seed
      "recycle"     the target's own candidates of earlier steps: a chain, or "recycle:3x2x1" a tree
      "forced"      the text a request's grammar forces next; "forced:4" only where it forces at least 4 tokens
      "jacobi:8"    the next 8 guesses, drawn from what the last pass computed behind its first rejection; "jacobi:8:up" starts
                    from the row above in an image; ":fresh" draws with fresh noise in every pass
      PATH          a draft model: a folder or a Hub name; "greedy:PATH" proposes its most likely tokens, not draws,
                    "tree:3x2x1:PATH" a tree with 3 children of the anchor, 2 of each of those, and so on, drawn without
                    replacement; "iid:3x2x1:PATH" the same drawn independently; "batch:4:PATH" 4 independent drafts that
                    are compared at their first token only; "shared:4:PATH" 4 independent drafts, merged where they agree
                    A folder of a trained drafter says itself which of the following it is.
      "medusa"      trained heads on the target's hidden states, side by side or one after the other, as the folder says: from the
                    folder `medusa` beside the target, or "medusa:PATH"
      "eagle"       a trained layer on the target's hidden states, likewise
      "mtp"         the head for multi-token prediction that the target's own folder carries, or a trained one, likewise
      "dflash"      a trained block drafter: all tokens of a draft from one pass, likewise
      "counts"      tables of an image model's tokens by place, left and upper neighbour, likewise
      "early:K"     the target's own first K layers with its norm and head; "early:K:sparse:..." over a view of its cache
      "sparse:window:16+496"  the target itself, looking at the first 16 and the newest 496 tokens of its own cache; chains only.
                    "sparse:snap:512", "sparse:pillar:512": at 512 tokens, chosen by the attention of the prompt's last rows, or
                    of the last verification
      "sparse:int8" the target itself, looking at all tokens in a copy of its cache with 8 bits a number; also trees
                    All these take the prefixes above ("greedy:", "tree:3x2x1:", "iid:...", ...), "sparse" those of chains.
                    They and draft models also take "dynamic:16:PATH" or "dynamic:16x4:PATH": in every step the 16 nodes
                    likeliest to be accepted, at most 4 below each; and "stop:PATH" or "stop:0.3:PATH": a chain that ends where
                    a further token is expected to bring fewer than 0.3 tokens
      "ahead:4:M"   the draft model M, whose next drafts are prepared for the 4 likeliest outcomes while the target verifies
      "apart:ahead:4:M"  the same in a process of its own, for draft models whose passes are mostly Python
      "auto"        "prediction", then "forced", then the folder `draft` beside a target folder named `target`, or else the
                    target's own MTP head, or else "ngram" and after that, at contexts where a view is expected to be faster
                    than plain decoding, "sparse:window:16+496"; also instead of the draft model, where it is faster than that
      "A+B"         per sequence the first of A (one of the five without a model above) and B that proposes something

    rule: with a rule that couples through noise lane `gumbel`, a draft model draws with the same noise.
    load_model: loads a draft model; the caller decides device, dtype and quantisation. load_elsewhere: says how another process
    does. find_folder: finds the folder of a learned
    drafter; without it only local folders are read. rounding: of the matrices of trained drafters.
    learned: the drafters that are trained for one target, by name.
    Raises ConfigError for a bad spec, CapabilityError for a draft model whose tokens stand for other strings.
    """
    if length < 0:
        raise ConfigError(f"the draft length must be >= 0, got {length}; 0 is plain decoding")
    if length == 0 or spec == "none":
        return NoDraft()
    sample: Sample = "coupled" if rule is not None and rule.lane == "gumbel" else "sampled"
    find = _Finder(
        target, length, sample, tokenizer, target_path, load_model, load_elsewhere, find_folder, rounding, learned
    )
    return first_of(*(find.auto() if spec == "auto" else find.parts(spec)))


@dataclass(frozen=True, slots=True)
class _Finder:
    """Finds the drafters that specs name, with what `load_drafter` was given."""

    target: Target
    length: int
    sample: Sample
    tokenizer: object | None
    target_path: str | None
    load_model: LoadModel | None
    load_elsewhere: LoadElsewhere | None
    find_folder: FindFolder | None
    rounding: Rounding | None
    learned: Mapping[str, LearnedDrafter]

    def parts(self, spec: str, least: int = 0) -> list[Drafter]:
        """The drafters of a spec, in order. least: the context below which a view of the target's cache drafts nothing."""
        parts, rest = hosts_of(spec, self.length)
        if rest.partition(":")[0] == "jacobi":
            raster = find_raster(self.target_path)
            parts.append(parse_jacobi(rest, self.length, self.target.vocab_size, raster.width if raster else 0))
        elif rest or not parts:
            parts.append(self._ahead(rest, least))
        return parts

    def auto(self) -> list[Drafter]:
        """What "auto" is: see `load_drafter`."""
        sibling = None if self.load_model is None else companion_folder(self.target_path, "draft")
        how = self._parse("mtp", self.length)
        # forced tokens replace a model or a head only if they fill a whole draft; for fewer it drafts further ahead
        before = f"prediction+forced:{how.shape.depth}"
        if sibling is not None and self.load_model is not None:
            (*parts, model) = self.parts(f"{before}+{sibling}")
            if learned_kind(sibling, self.learned) is None:
                grows, load = how.growth(self.target.vocab_size), partial(self.load_model, sibling)
                view = view_beside(AUTO_VIEW, self.target, load, grows)
                parts += [] if view is None else [view]
            return [*parts, model]
        if (own := self._own_head(how)) is not None:
            return [*self.parts(before), own]
        least = worthwhile_from(self.target, parse_sparse(AUTO_VIEW))
        return self.parts("prediction+forced+ngram" + ("" if least is None else f"+sparse:{AUTO_VIEW}"), least or 0)

    def _parse(self, spec: str, length: int) -> DraftSpec:
        return replace(parse_draft(spec, length, self.sample), rounding=self.rounding)

    def _ahead(self, spec: str, least: int) -> Drafter:
        """The last part of a spec, prepared ahead or in a process of its own if it says so."""
        inner = spec.removeprefix("apart:")
        premises, path = parse_ahead(inner)
        how = self._parse(path, self.length + (premises > 0))
        if premises and how.stop is not None:
            raise ConfigError(
                "a chain that stops early learns from every verdict and cannot be drafted ahead: drop one of the two"
            )
        kind, path = self._kind(how)
        check_option(kind, path, spec, how.path)
        if inner != spec and kind in (*OF_THE_TARGET, *self.learned):
            raise not_apart(kind)
        found = self._last(kind, path, how, least)
        if inner == spec:
            return Ahead(found, premises) if premises else found
        if type(found) is not ModelDrafter or self.load_elsewhere is None:
            raise CapabilityError(f"no process of its own can load {how.path!r} here: drop 'apart:'")
        make = partial(_make, self.load_elsewhere(how.path), how, self.target.vocab_size, premises)
        instead = self._parse(path, self.length)
        return Apart(make, _model_drafter(found.model, instead, self.target.vocab_size))

    def _kind(self, how: DraftSpec) -> tuple[str, str]:
        """The kind of a spec's last part, and what stands behind it. A folder says itself what it holds."""
        kind, _, path = how.path.partition(":")
        if kind in self.learned and not path and Path(kind).exists():
            return "", how.path
        if kind not in self.learned and (own := learned_kind(how.path, self.learned)) is not None:
            return own, how.path
        return kind, path

    def _last(self, kind: str, path: str, how: DraftSpec, least: int) -> Drafter:
        """The last part of a spec: a model, a trained drafter, or the target itself in part."""
        if kind in OF_THE_TARGET:
            growth = how.growth(self.target.vocab_size)
            return (
                load_early(path, self.target, growth)
                if kind == "early"
                else load_sparse(path, self.target, growth, least)
            )
        if kind in self.learned:
            folder = _learned_folder(kind, path, self.target_path, self.find_folder, self.learned)
            return self.learned[kind].load(folder, self.target, how, self.target_path)
        return self._model(how)

    def _own_head(self, how: DraftSpec) -> Drafter | None:
        """The drafter of the target's own MTP head; None where there is none, or it cannot be run: `--draft mtp` says why."""
        if (path := self.target_path) is None or not carries("mtp", path, self.learned):
            return None
        try:
            return self.learned["mtp"].load(Path(path).expanduser(), self.target, how, path)
        except (ConfigError, CapabilityError):
            return None

    def _model(self, how: DraftSpec) -> ModelDrafter:
        path, target = how.path, self.target
        names = (*DRAFTERS, *self.learned)
        if not path or path in ("none", "auto"):
            raise ConfigError(
                f"{path!r} is not a draft model: give a folder or a Hub name, or use 'none' or 'auto' alone"
            )
        if get_close_matches(path, names, cutoff=0.7) and not Path(path).exists():
            raise ConfigError(unknown_name("drafter", path, names))
        if self.load_model is None:
            raise ConfigError(
                f"the draft model {path!r} cannot be loaded here: pass load_model, or a drafter without a model"
            )
        model, draft_tokenizer = self.load_model(path)
        if self.tokenizer is not None and draft_tokenizer is not None:
            check_vocabulary(self.tokenizer, draft_tokenizer, min(target.vocab_size, model.vocab_size), path)
        return _model_drafter(model, how, target.vocab_size)


def _model_drafter(model: Target, how: DraftSpec, vocab_size: int) -> ModelDrafter:
    growth = how.growth(vocab_size)
    return ModelDrafter(model, growth.depth, growth=growth, vocab_size=vocab_size)


def _make(load: Callable[[], Target], how: DraftSpec, vocab_size: int, premises: int) -> Drafter:
    """A draft model, prepared ahead for so many outcomes: what a process of its own runs."""
    made = _model_drafter(load(), how, vocab_size)
    return Ahead(made, premises) if premises else made


def parse_speculative_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """Engine options for vLLM's `speculative_config`, see `vllm_config.engine_options`."""
    methods = {m: name for name, row in LEARNED.items() for m in row.vllm_methods}
    return vllm_config.engine_options(config, methods, {m for m, name in methods.items() if LEARNED[name].carried})


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


def _learned_folder(
    kind: str,
    path: str,
    target_path: str | None,
    find_folder: FindFolder | None,
    learned: Mapping[str, LearnedDrafter],
) -> Path:
    """The folder of a learned drafter: the named one (a path or a Hub name), or the target's companion folder, or its own."""
    folder = (
        path or companion_folder(target_path, kind) or (target_path if carries(kind, target_path, learned) else None)
    )
    if folder is None:
        own = ", and its own carries none" if kind in learned and learned[kind].carried else ""
        raise ConfigError(f"this target has no companion folder {kind!r}{own}: write '{kind}:PATH', or train one")
    return Path(folder).expanduser() if find_folder is None else find_folder(folder)


def carries(kind: str, target_path: str | None, learned: Mapping[str, LearnedDrafter] = LEARNED) -> bool:
    """Whether the target's own folder has a drafter of this kind, in which case `--draft KIND` needs no path."""
    find = learned[kind].carried if kind in learned else None
    folder = None if target_path is None else Path(target_path).expanduser()
    return find is not None and folder is not None and folder.is_dir() and bool(find(folder))


def learned_kind(path: str, learned: Mapping[str, LearnedDrafter] = LEARNED) -> str | None:
    """Which trained drafter a folder holds, by its `config.json`; None for a folder of a model, and for what is no folder."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return None
    found = read_config(folder)[1]
    return next((name for name, row in learned.items() if found in row.folder_types), None)
