"""From paths and names to an engine. The only place that knows how parts are loaded; everything it makes can be made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, cast

from outrider.assets import HERE, shipped
from outrider.control.fixed import Fixed
from outrider.drafters.registry import load_drafter as _load_drafter
from outrider.drafters.registry import parse_speculative_config
from outrider.engine import contracts
from outrider.engine.core import Engine, Result
from outrider.engine.notices import notices_of, wasted_option
from outrider.engine.prompts import Prompts, as_prompts
from outrider.engine.turns import Turns
from outrider.errors import ConfigError
from outrider.models.folder import files_of, resolve_folder
from outrider.models.load import find_tokenizer, load_target, reads_emulated, stop_ids
from outrider.models.translate import Tokenizer, ceiling, translate
from outrider.options import EngineOptions, check_names
from outrider.params import SamplingParams
from outrider.protocols import Drafter, Rule, Sink, Target
from outrider.verify import best_exact, load_rule

Progress = Callable[[float], None]


TRANSLATE = "translate:"
"""Marks a draft model of another vocabulary."""
PROMPTS = HERE / "pycode" / "prompts.jsonl"
"""Text on which the ceiling of a translated draft is estimated."""


class ModelKey(NamedTuple):
    """Of a loaded draft model: which files it is, as they were, and every option that decides what is loaded; the device is the
    target's. dtype: as `load_target` is asked for it."""

    name: str
    folder: Path
    files: tuple[tuple[str, int, int], ...]
    implementation: str
    quantize: str | None
    dtype: str


@dataclass(slots=True)
class Loaded:
    """What engines on one target share: the weights of target and drafts, the tokenizer, and whose turn it is.

    drafter, rule: of this engine, where they were given as objects; None: they are made from the names in `options`.
    """

    path: str | None
    target: Target
    tokenizer: object | None
    eos: tuple[int, ...]
    options: EngineOptions
    sinks: tuple[Sink, ...] = ()
    drafter: Drafter | None = None
    rule: Rule | None = None
    models: dict[ModelKey, tuple[Target, object]] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)


def build_engine(
    target: str | Path | Target | None = None,
    draft: str | Path | Drafter = "auto",
    *,
    rule: str | Rule = "auto",
    tokenizer: object | None = None,
    sinks: Seq[Sink] = (),
    speculative_config: str | dict | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Engine:
    """An engine for `target` (a folder, a Hub name, a Target, or None: the shipped pair) with `draft` (see `load_drafter`).

    draft, rule: a name, or a drafter or rule made by hand. options: the other fields of `EngineOptions` (`capacity` is another
    name of `slots`). speculative_config: vLLM's JSON, replaces draft, length and rule.
    Raises ConfigError for a bad option or checkpoint, CapabilityError for parts that do not fit, CapacityError for memory.
    """
    if capacity is not None:
        options["slots"] = capacity
    named, drafter, judge = names_of({**options, "draft": draft, "rule": rule})
    check_names(named)
    if isinstance(target, str | Path):
        named["target"] = str(target)
    wanted = EngineOptions(**named)  # type: ignore[arg-type]
    if speculative_config is not None:
        changes, drafter = parse_speculative_config(speculative_config), None
        wanted, judge = wanted.changed(**changes), None if "rule" in changes else judge
    if judge is None:
        load_rule(wanted.rule)  # a wrong name is said before anything is loaded
    loaded = _load(target, tokenizer, wanted, tuple(sinks), progress)
    return assemble(loaded, wanted, drafter, judge)


def names_of(options: dict[str, object]) -> tuple[dict[str, object], Drafter | None, Rule | None]:
    """`options` as plain values, and the drafter and the rule among them that were made by hand: their names stand for them."""
    named, drafter, rule = dict(options), None, None
    if isinstance(named.get("draft"), Path):
        named["draft"] = str(named["draft"])
    if not isinstance(named.get("draft", ""), str):
        contracts.check("drafter", named["draft"], contracts.DRAFTER)
        drafter = cast(Drafter, named["draft"])
        named["draft"] = str(drafter.name)
    if not isinstance(named.get("rule", ""), str):
        contracts.check("rule", named["rule"], contracts.RULE)
        rule = cast(Rule, named["rule"])
        named["rule"] = str(rule.name)
    return named, drafter, rule


def _load(
    target: str | Path | Target | None,
    tokenizer: object | None,
    options: EngineOptions,
    sinks: tuple[Sink, ...],
    progress: Progress | None,
) -> Loaded:
    if target is not None and not isinstance(target, str | Path):
        contracts.check("target", target, contracts.TARGET)  # before a drafter is made for it
        return Loaded(None, target, tokenizer, (), options, sinks)
    path = str(shipped("target") if target is None else target)
    model = load_target(
        path,
        dtype=options.dtype,
        device=options.device,
        implementation=options.implementation,
        progress=progress,
        role="target",
    )
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(path)
    ends = stop_ids(path, tokenizer)
    behind = [token for token in ends if not 0 <= token < model.vocab_size]
    if behind:
        raise ConfigError(
            f"{path} names the end-of-text token {behind[0]}, and its embedding has {model.vocab_size} rows: correct eos_token_id "
            "in its generation_config.json and config.json, or eos_token in its tokenizer_config.json"
        )
    return Loaded(path, model, tokenizer, ends, options, sinks)


def assemble(
    loaded: Loaded, options: EngineOptions, drafter: Drafter | None = None, rule: Rule | None = None
) -> Engine:
    """An engine on loaded parts. A model is loaded once for each way to load it: engines that differ in drafting share weights.

    drafter, rule: made by hand; None: those that `options` name.
    """
    if options.max_length is not None and options.max_length > loaded.target.max_length:
        raise ConfigError(
            f"max_length {options.max_length} is more than the {loaded.target.max_length} positions of the target: "
            "choose at most that"
        )
    mine = replace(loaded, options=options, drafter=drafter, rule=rule)
    auto = rule is None and options.rule == "auto"
    rule = load_rule(options.rule) if rule is None else rule
    if drafter is None:
        drafter = _load_drafter(
            options.draft if options.length else "none",
            target=loaded.target,
            target_path=None if loaded.path is None else str(resolve_folder(loaded.path)),
            tokenizer=loaded.tokenizer,
            length=options.length,
            rule=rule,
            load_model=lambda name: load_model(loaded, options, name),
            find_folder=resolve_folder,
        )
    rule = best_exact(drafter) if auto else rule
    engine = Engine(
        loaded.target,
        drafter,
        rule,
        Fixed(options.length),
        tokenizer=loaded.tokenizer,
        slots=options.slots,
        max_length=options.max_length,
        chunk=options.chunk,
        eos=loaded.eos,
        sinks=loaded.sinks,
        allow_lossy=options.allow_lossy,
        turns=loaded.turns,
    )
    engine.loaded = mine
    targets = [loaded.target, *(model for model, _ in loaded.models.values())]
    drafts = bool(engine.parts.drafter.max_depth)
    engine.notices = notices_of(targets, loaded.target.device, drafts, options.device)
    engine.notices += wasted_option(options.draft_quantize if drafts else None, len(loaded.models))
    return engine


def load_model(loaded: Loaded, options: EngineOptions, name: str) -> tuple[Target, object]:
    """A draft model and its tokenizer, in the target's dtype, its weights quantised if asked.

    "translate:NAME" is the model NAME, whose tokenizer is another one, seen through the tokens that both spell alike.
    """
    if name.startswith(TRANSLATE):
        return _translated(loaded, options, name.removeprefix(TRANSLATE))
    key = _key(loaded, options, name)
    if key not in loaded.models:
        model = load_target(
            name,
            dtype=key.dtype,
            device=str(loaded.target.device),
            implementation=options.implementation,
            quantize=options.draft_quantize,
            role="draft",
        )
        loaded.models[key] = (model, find_tokenizer(name))
    return loaded.models[key]


def _key(loaded: Loaded, options: EngineOptions, name: str, mark: str = "") -> ModelKey:
    """What tells the draft model `name` from every other; `mark` from the same one seen in another way."""
    folder, ours = resolve_folder(name).resolve(), loaded.target.dtype
    free = options.dtype == "auto" and reads_emulated(name, ours, loaded.target.device, options.implementation)
    dtype = "auto" if free else str(ours).removeprefix("torch.")
    return ModelKey(mark + name, folder, files_of(folder), options.implementation, options.draft_quantize, dtype)


def _translated(loaded: Loaded, options: EngineOptions, name: str) -> tuple[Target, object]:
    if loaded.tokenizer is None:
        raise ConfigError("a draft of another vocabulary needs the target's tokenizer: build the engine with one")
    key = _key(loaded, options, name, TRANSLATE)
    if key not in loaded.models:
        model, tokenizer = load_model(loaded, options, name)
        if tokenizer is None:
            raise ConfigError(
                f"{name} has no tokenizer.json, and translating needs the draft's tokenizer: add it to the folder"
            )
        ours = cast(Tokenizer, loaded.tokenizer)
        seen = translate(model, cast(Tokenizer, tokenizer), ours, loaded.target.vocab_size, name)
        sample = [t for row in PROMPTS.read_text(encoding="utf-8").splitlines() for t in ours.encode(row)]
        told = (
            f"{seen.notices[0]}: {ceiling(seen, sample):.0%} of the tokens of a sample of code, a ceiling of acceptance"
        )
        seen.notices = (told, *model.notices)
        loaded.models[key] = (seen, loaded.tokenizer)
    return loaded.models[key]


def companion(engine: Engine, draft: str | Drafter | None = None, **changes: object) -> Engine:
    """Another engine on the same target: same options but for `draft` and `changes`; weights are shared, caches are not.

    Raises ConfigError for what was decided when the target was loaded: the target itself, its dtype and device.
    """
    loaded = engine.loaded
    if loaded is None:
        raise ConfigError("this engine was made by hand: build the companion from the same parts")
    for name in ("target", "dtype", "device"):
        if changes.get(name, getattr(loaded.options, name)) != getattr(loaded.options, name):
            raise ConfigError(
                f"{name} was decided when the target was loaded: build a new engine for {changes[name]!r}"
            )
    named, drafter, rule = names_of({**({} if draft is None else {"draft": draft}), **changes})
    return assemble(
        loaded,
        loaded.options.changed(**named),
        drafter if "draft" in named else loaded.drafter,
        rule if "rule" in named else loaded.rule,
    )


def generate(
    prompts: Prompts,
    params: SamplingParams | Iterable[SamplingParams] | None = None,
    *,
    target: str | Path | None = None,
    **options: object,
) -> list[Result]:
    """Decode one or several prompts in one call: builds an engine (see `build_engine`), runs it, returns results in order."""
    many = as_prompts(prompts)
    options.setdefault("slots", min(8, max(1, len(many))))
    return build_engine(target, **options).generate(many, params)  # type: ignore[arg-type]


def load_drafter(spec: str, engine: Engine) -> Drafter:
    """The drafter `spec` for an engine's target."""
    return companion(engine, spec).parts.drafter
