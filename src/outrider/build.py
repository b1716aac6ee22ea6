"""The engine that users build: parts and hooks from a target and a drafter, or from paths and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

import torch

from outrider.control.registry import load_controller
from outrider.display import html_of, line_of, plot_of
from outrider.drafters.combine import gated, lend
from outrider.drafters.registry import carries, parse_speculative_config
from outrider.drafters.registry import load_drafter as _load_drafter
from outrider.engine import contracts
from outrider.engine.core import EngineCore
from outrider.engine.fit import check_fit
from outrider.engine.outputs import Result
from outrider.engine.parts import CoreOptions, Defect, Hooks, Parts
from outrider.engine.prompts import Prompts, as_prompts
from outrider.engine.turns import Turns
from outrider.errors import ConfigError
from outrider.loading import Loaded, Progress, give, load, load_elsewhere, load_model, name_of, restricts, rounding_of
from outrider.models.folder import resolve_folder
from outrider.models.given import Model, is_model
from outrider.nn.held import Rounding
from outrider.nn.shares import share_out
from outrider.notices import notices_of, vocabulary_without_model, wasted_option
from outrider.options import EngineKeywords, EngineOptions, check_names, with_keywords
from outrider.params import SamplingParams
from outrider.protocols import Controller, Drafter, ImageReader, KVCache, Rule, Sink, Target
from outrider.raster import find_raster
from outrider.sampling.grammar import grammars_of
from outrider.sampling.pipeline import LogitsPipeline
from outrider.verify import best_exact, load_rule, reads_codes

ControllerFor = Callable[[Drafter, Rule, Target], Controller]
"""Makes the controller of an engine from its drafter, rule and target."""


@with_keywords
def build_engine(
    target: str | Path | Target | Model | None = None,
    draft: str | Path | Drafter | Model = "auto",
    *,
    rule: str | Rule = "auto",
    tokenizer: object | None = None,
    draft_tokenizer: object | None = None,
    sinks: Seq[Sink] = (),
    speculative_config: str | dict | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
    controller: ControllerFor | None = None,
    on_defect: Callable[[Defect], None] | None = None,
    selectable: bool = False,
    **options: Unpack[EngineKeywords],
) -> Engine:
    """An engine for `target` (a folder, a Hub name, a Target, a model of transformers, or None: the shipped pair) with `draft` (see
    `load_drafter`).

    draft, rule: a name, or a drafter or rule object; as draft also a model of transformers. tokenizer: of the target, where it is
    an object; None: the engine works on token ids; a processor of transformers also reads images (`Engine.images`).
    draft_tokenizer: of a draft model object, to check that its vocabulary is the target's. Models that are objects stay as they
    were found (`models.hf.target.HFTarget`).
    options: the other fields of `EngineOptions` (`capacity` is another name of `slots`). speculative_config: vLLM's JSON; it
    replaces draft, length and rule.
    controller: makes the controller of draft lengths (None: the one that `lengths` names). on_defect: called with every contained
    failure.
    selectable: a request's `drafters` may choose among the members of a combined drafter.
    Raises ConfigError for a bad option or checkpoint, CapabilityError for parts that do not fit, CapacityError for memory.
    """
    if capacity is not None:
        options["slots"] = capacity
    named, drafter, custom_rule = names_of({**options, "draft": draft, "rule": rule})
    check_names(named)
    if isinstance(target, str | Path):
        named["target"] = str(target)
    wanted = EngineOptions(**named)  # type: ignore[arg-type]
    if speculative_config is not None:
        changes, drafter = parse_speculative_config(speculative_config), None
        wanted, custom_rule = wanted.changed(**changes), None if "rule" in changes else custom_rule
    if custom_rule is None:
        load_rule(wanted.rule)  # report a wrong name before anything is loaded
    loaded = load(target, tokenizer, wanted, tuple(sinks), progress)
    if is_model(draft):
        give(loaded, draft, draft_tokenizer, name_of(draft))
    return assemble(
        loaded, wanted, drafter, custom_rule, controller=controller, on_defect=on_defect, selectable=selectable
    )


class Engine(EngineCore):
    """Decodes many sequences together, each exactly by the target's distribution (see `engine.core.EngineCore`).

    target, drafter, rule, controller: see `protocols`. tokenizer: a Hugging Face tokenizer, or None to work on ids alone.
    slots: sequences decoded together. max_length: most tokens (prompt and output) of a sequence; the target's context if None.
    chunk: rows of a prompt chunk. eos: ids that end a sequence. sinks: receive one StepRecord per step. on_defect: called with
    every contained failure. turns: shared by engines on one model, so that they take turns. loaded, notices: set by `build`.
    prefix_cache, kv_memory: see `EngineOptions`. images: reads images for the target, if it can.
    Raises CapabilityError when parts do not fit together.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: Rule,
        controller: Controller,
        *,
        tokenizer: Any = None,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int = 256,
        eos: Iterable[int] = (),
        sinks: Seq[Sink] = (),
        on_defect: Callable[[Defect], None] | None = None,
        allow_lossy: bool = False,
        turns: Turns | None = None,
        loaded: Loaded | None = None,
        notices: Iterable[str] = (),
        prefix_cache: bool = True,
        kv_memory: float | None = None,
        images: ImageReader | None = None,
    ) -> None:
        contracts.check_parts(target, drafter, rule, controller)
        turns = turns or Turns()  # first: it raises in a forked process before anything is allocated
        check_fit(target, drafter, rule, allow_lossy)
        most, ends = min(max_length or target.max_length, target.max_length), tuple(frozenset(eos))
        memory = None if kv_memory is None else int(kv_memory * 1e9)
        kv = _new_kv(target, slots, most + drafter.max_nodes, memory, drafter)
        drafter.bind(slots, most)
        lend(kv, drafter)
        pipeline = LogitsPipeline(target.vocab_size, ends, grammars_of(tokenizer, target.vocab_size, ends))
        super().__init__(
            Parts(target, kv, pipeline, rule, drafter),
            Hooks(controller, tuple(sinks), on_defect),
            CoreOptions(slots, most, chunk, tokenizer, turns, prefix_cache, images),
        )
        self.loaded = loaded
        self._notices = tuple(notices)

    build = staticmethod(build_engine)

    def __repr__(self) -> str:
        return line_of(self, self.loaded.path if self.loaded else None)

    def _repr_html_(self) -> str:
        return html_of(self, self.loaded.path if self.loaded else None)

    def plot(self) -> Any:
        """A matplotlib figure: acceptance by position, and the ledger. Raises ConfigError where matplotlib is missing."""
        return plot_of(self)

    @property
    def notices(self) -> list[str]:
        """Sentences that a user should read: how parts were loaded, and which of them have failed since."""
        return [*self._notices, *super().notices]


def names_of(options: dict[str, object]) -> tuple[dict[str, object], Drafter | None, Rule | None]:
    """`options` as plain values, and the drafter and rule objects among them; in the options their names replace them."""
    named, drafter, rule = dict(options), None, None
    for name, otherwise in (("draft", "none"), ("rule", "auto")):
        if name in named and named[name] is None:
            raise ConfigError(f"{name} is None: write {name}={otherwise!r}, or leave it out")
    if isinstance(named.get("draft"), Path):
        named["draft"] = str(named["draft"])
    if is_model(named.get("draft")):  # it becomes a drafter for a target, by its name
        named["draft"] = name_of(named["draft"])
    if not isinstance(named.get("draft", ""), str):
        contracts.check("drafter", named["draft"], contracts.DRAFTER)
        drafter = cast(Drafter, named["draft"])
        named["draft"] = str(drafter.name)
    if not isinstance(named.get("rule", ""), str):
        contracts.check("rule", named["rule"], contracts.RULE)
        rule = cast(Rule, named["rule"])
        named["rule"] = str(rule.name)
    return named, drafter, rule


def assemble(
    loaded: Loaded,
    options: EngineOptions,
    drafter: Drafter | None = None,
    rule: Rule | None = None,
    *,
    controller: ControllerFor | None = None,
    on_defect: Callable[[Defect], None] | None = None,
    selectable: bool = False,
) -> Engine:
    """An engine on loaded parts. A model is loaded once per set of loading options: engines that differ in drafting share weights.

    drafter, rule: objects; None: those that `options` name. controller, on_defect, selectable: as for `build_engine`.
    """
    if options.max_length is not None and options.max_length > loaded.target.max_length:
        raise ConfigError(
            f"max_length {options.max_length} is more than the {loaded.target.max_length} positions of the target: "
            "choose at most that"
        )
    mine = replace(loaded, options=options, drafter=drafter, rule=rule)
    auto = rule is None and options.rule == "auto"
    rule = _rule(loaded, options) if rule is None else rule
    rounding = rounding_of(options)
    drafter = _drafter(loaded, options, rule, rounding) if drafter is None else drafter
    rule = best_exact(drafter) if auto else rule
    return Engine(
        loaded.target,
        gated(drafter) if selectable else drafter,
        rule,
        _controller(options, drafter, rule, loaded.target)
        if controller is None
        else controller(drafter, rule, loaded.target),
        tokenizer=loaded.tokenizer,
        slots=options.slots,
        max_length=options.max_length,
        chunk=options.chunk,
        eos=loaded.eos,
        sinks=loaded.sinks,
        on_defect=on_defect,
        allow_lossy=options.allow_lossy,
        turns=loaded.turns,
        loaded=mine,
        images=loaded.images,
        notices=_notices(loaded, options, drafter, rounding is not None and rounding.used),
        prefix_cache=options.prefix_cache,
        kv_memory=options.kv_memory,
    )


def _new_kv(target: Target, slots: int, length: int, memory: int | None, drafter: Drafter) -> KVCache:
    """The target's cache. memory: bytes that it and the drafter's may take together."""
    if memory is not None and not contracts.takes(target.new_kv, ("slots", "length", "memory=")):
        raise ConfigError(
            f"kv_memory was given, and the cache of {type(target).__name__} is not in pages: leave it out, and lower max_length "
            "or slots"
        )
    own = share_out(target, drafter, slots, length, memory)
    return target.new_kv(slots, length) if own is None else target.new_kv(slots, length, memory=own)  # type: ignore[call-arg]


def _rule(loaded: Loaded, options: EngineOptions) -> Rule:
    """The rule that the options name. One that looks at image codes takes their points from the target's folder."""
    if not reads_codes(options.rule) or loaded.path is None:
        return load_rule(options.rule)
    raster = find_raster(resolve_folder(loaded.path))
    if raster is None:
        raise ConfigError(
            f"rule {options.rule.partition(':')[0]!r} compares the colours of image tokens, and {loaded.path} has no raster.json: "
            "choose tv_budget, or an image model (docs/images.md)"
        )
    return load_rule(options.rule, torch.from_numpy(raster.codes()))


def _controller(options: EngineOptions, drafter: Drafter, rule: Rule, target: Target) -> Controller:
    """The controller that the options name. If forwards of the target read more for more rows (`row_work`), it knows."""
    name, longest = options.follows, min(options.longest, drafter.max_depth)
    first, invariant = min(options.length, longest), rule.lane == "gumbel"
    return load_controller(name, first, longest, invariant=invariant, work=getattr(target, "row_work", None))


def _drafter(loaded: Loaded, options: EngineOptions, rule: Rule, rounding: Rounding | None) -> Drafter:
    """The drafter that the options name."""
    return _load_drafter(
        options.draft if options.length else "none",
        target=loaded.target,
        target_path=None if loaded.path is None else str(resolve_folder(loaded.path)),
        tokenizer=loaded.tokenizer,
        length=options.longest,
        rule=rule,
        load_model=lambda name: load_model(loaded, options, name),
        load_elsewhere=lambda name: load_elsewhere(loaded, options, name),
        find_folder=resolve_folder,
        rounding=rounding,
    )


def _notices(loaded: Loaded, options: EngineOptions, drafter: Drafter, rounded: bool) -> list[str]:
    """What keeps this engine from being faster. rounded: whether a trained drafter's weights are."""
    drafts = bool(drafter.max_depth)
    targets = [loaded.target, *(model for model, _ in loaded.models.values())]
    found = notices_of(targets, loaded.target.device, drafts, options.device)
    folder = None if loaded.path is None else str(resolve_folder(loaded.path))
    unused = carries("mtp", folder) and "mtp" not in drafter.name.split("+")
    name = Path(str(loaded.path)).name
    told = [f"{name} carries an MTP head, which is left out: --draft mtp drafts with it"] if unused else []
    restricted = any(restricts(key, options) for key in loaded.models)
    told += vocabulary_without_model(options.draft_vocabulary if drafts else None, options.draft, restricted)
    return [*found, *told, *wasted_option(options.draft_quantize if drafts else None, rounded or bool(loaded.models))]


@with_keywords
def companion(
    engine: Engine,
    draft: str | Drafter | Model | None = None,
    *,
    rule: str | Rule | None = None,
    **changes: Unpack[EngineKeywords],
) -> Engine:
    """Another engine on the same target, with the same options except `draft` and `changes`; it shares weights, not caches.

    Raises ConfigError for changes of what was fixed when the target was loaded: the target itself, its dtype, device and rounding.
    """
    loaded = engine.loaded
    if loaded is None:
        raise ConfigError("this engine was built from part objects: build the companion from the same parts")
    parts = {name: part for name, part in (("draft", draft), ("rule", rule)) if part is not None}
    named, drafter, given = names_of({**parts, **changes})
    if is_model(draft) and named["draft"] not in loaded.given:
        give(loaded, draft, None, str(named["draft"]))
    for name in ("target", "dtype", "device", "target_quantize", "kv_dtype", "input_bits"):
        if named.get(name, getattr(loaded.options, name)) != getattr(loaded.options, name):
            raise ConfigError(f"{name} was fixed when the target was loaded: build a new engine for {named[name]!r}")
    return assemble(
        loaded,
        loaded.options.changed(**named),
        drafter if "draft" in named else loaded.drafter,
        given if "rule" in named else loaded.rule,
    )


@with_keywords
def generate(
    prompts: Prompts,
    params: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    target: str | Path | Target | Model | None = None,
    draft: str | Path | Drafter | Model = "auto",
    rule: str | Rule = "auto",
    tokenizer: object | None = None,
    progress: Progress | None = None,
    **options: Unpack[EngineKeywords],
) -> list[Result]:
    """Decode one or several prompts in one call: builds an engine (see `build_engine`), runs it, returns results in order."""
    many = as_prompts(prompts)
    options.setdefault("slots", min(8, max(1, len(many))))
    return build_engine(target, draft, rule=rule, tokenizer=tokenizer, **options).generate(
        many, params, progress=progress
    )


def load_drafter(spec: str, engine: Engine) -> Drafter:
    """The drafter `spec` for an engine's target."""
    return companion(engine, spec).parts.drafter
