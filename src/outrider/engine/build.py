"""From paths and names to an engine. The only place that knows how parts are loaded; everything it makes can be made by hand."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from outrider.assets import HERE, shipped
from outrider.control.fixed import Fixed
from outrider.drafters.load import load_drafter as _load_drafter
from outrider.drafters.load import parse_speculative_config
from outrider.engine.engine import Engine, Result
from outrider.engine.turns import Turns
from outrider.errors import ConfigError
from outrider.protocols import Drafter, Rule, Sink, Target
from outrider.sampling.params import SamplingParams
from outrider.target.load import load_target, load_tokenizer, stop_ids
from outrider.target.translate import Tokenizer, ceiling, translate
from outrider.verify import best_exact, load_rule

Progress = Callable[[float], None]


TRANSLATE = "translate:"
"""Marks a draft model of another vocabulary."""
PROMPTS = HERE / "pycode" / "prompts.jsonl"
"""Text on which the ceiling of a translated draft is estimated."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an engine was asked for; see `build_engine`."""

    draft: str | Drafter = "auto"
    length: int = 3
    rule: str | Rule = "auto"
    dtype: str = "auto"
    device: str = "auto"
    implementation: str = "auto"
    draft_quantize: str | None = None
    slots: int = 8
    max_length: int | None = None
    chunk: int = 256
    allow_lossy: bool = False


@dataclass(slots=True)
class Loaded:
    """What engines on one target share: the weights of target and drafts, the tokenizer, and whose turn it is."""

    path: str | None
    target: Target
    tokenizer: object | None
    eos: tuple[int, ...]
    options: Options
    sinks: tuple[Sink, ...] = ()
    models: dict[str, tuple[Target, object]] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)


def build_engine(
    target: str | Path | Target | None = None,
    draft: str | Path | Drafter = "auto",
    *,
    tokenizer: object | None = None,
    sinks: Seq[Sink] = (),
    speculative_config: str | dict | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Engine:
    """An engine for `target` (a folder, a Hub name, a Target, or None: the shipped pair) with `draft` (see `load_drafter`).

    length: tokens proposed per step. rule: "auto", "speculative_sampling", "match", or a Rule. dtype, device, implementation,
    draft_quantize: see `target.load.load_target`. slots (alias capacity): sequences decoded together. max_length: context to
    reserve, prompt and output. chunk: rows of a prompt chunk. speculative_config: vLLM's JSON, replaces draft, length, rule.
    Raises ConfigError for a bad option or checkpoint, CapabilityError for parts that do not fit, CapacityError for memory.
    """
    if capacity is not None:
        options["slots"] = capacity
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        from outrider.errors import unknown_name

        raise ConfigError(unknown_name("engine option", sorted(unknown)[0], Options.__dataclass_fields__))
    wanted = Options(draft=str(draft) if isinstance(draft, Path) else draft, **options)  # type: ignore[arg-type]
    if speculative_config is not None:
        wanted = replace(wanted, **parse_speculative_config(speculative_config))
    loaded = _load(target, tokenizer, wanted, tuple(sinks), progress)
    return assemble(loaded, wanted)


def _load(
    target: str | Path | Target | None,
    tokenizer: object | None,
    options: Options,
    sinks: tuple[Sink, ...],
    progress: Progress | None,
) -> Loaded:
    if target is not None and not isinstance(target, str | Path):
        return Loaded(None, target, tokenizer, (), options, sinks)
    path = str(shipped("target") if target is None else target)
    model = load_target(
        path, dtype=options.dtype, device=options.device, implementation=options.implementation, progress=progress
    )
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
    return Loaded(path, model, tokenizer, stop_ids(path, tokenizer), options, sinks)


def assemble(loaded: Loaded, options: Options) -> Engine:
    """An engine on loaded parts. Models are loaded once per name, so engines that differ in drafting share weights."""
    auto = options.rule == "auto"
    rule = load_rule(options.rule) if isinstance(options.rule, str) else options.rule
    drafter = options.draft
    if isinstance(drafter, str):
        drafter = _load_drafter(
            drafter if options.length else "none",
            target=loaded.target,
            target_path=loaded.path,
            tokenizer=loaded.tokenizer,
            length=options.length,
            rule=rule,
            load_model=lambda name: load_model(loaded, options, name),
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
    engine.loaded = replace(loaded, options=options)
    targets = [loaded.target, *(model for model, _ in loaded.models.values())]
    engine.notices = [t.notice for t in targets if t.notice is not None]
    return engine


def load_model(loaded: Loaded, options: Options, name: str) -> tuple[Target, object]:
    """A draft model and its tokenizer, in the target's dtype, its weights quantised if asked.

    "translate:NAME" is the model NAME, whose tokenizer is another one, seen through the tokens that both spell alike.
    """
    if name.startswith(TRANSLATE):
        return _translated(loaded, options, name.removeprefix(TRANSLATE))
    if name not in loaded.models:
        dtype = str(loaded.target.dtype).removeprefix("torch.")
        model = load_target(
            name,
            dtype=dtype,
            device=str(loaded.target.device),
            implementation=options.implementation,
            quantize=options.draft_quantize,
        )
        loaded.models[name] = (model, load_tokenizer(name))
    return loaded.models[name]


def _translated(loaded: Loaded, options: Options, name: str) -> tuple[Target, object]:
    if loaded.tokenizer is None:
        raise ConfigError("a draft of another vocabulary needs the target's tokenizer: build the engine with one")
    key = TRANSLATE + name
    if key not in loaded.models:
        model, tokenizer = load_model(loaded, options, name)
        ours = cast(Tokenizer, loaded.tokenizer)
        seen = translate(model, cast(Tokenizer, tokenizer), ours, loaded.target.vocab_size, name)
        sample = [t for row in PROMPTS.read_text(encoding="utf-8").splitlines() for t in ours.encode(row)]
        seen.notice = (
            f"{seen.notice}: {ceiling(seen, sample):.0%} of the tokens of a sample of code, a ceiling of acceptance"
        )
        loaded.models[key] = (seen, loaded.tokenizer)
    return loaded.models[key]


def companion(engine: Engine, draft: str | Drafter | None = None, **changes: object) -> Engine:
    """Another engine on the same target: same options but for `draft` and `changes`; weights are shared, caches are not."""
    if engine.loaded is None:
        raise ConfigError("this engine was made by hand: build the companion from the same parts")
    options: Options = engine.loaded.options
    return assemble(engine.loaded, replace(options, **({"draft": draft} if draft is not None else {}), **changes))


def generate(
    prompts: str | Seq[str],
    params: SamplingParams | None = None,
    *,
    target: str | Path | None = None,
    **options: object,
) -> list[Result]:
    """Decode one or several prompts in one call: builds an engine (see `build_engine`), runs it, returns results in order."""
    many = [prompts] if isinstance(prompts, str) else list(prompts)
    options.setdefault("slots", min(8, max(1, len(many))))
    return build_engine(target, **options).generate(many, params)  # type: ignore[arg-type]


def load_drafter(spec: str, engine: Engine) -> Drafter:
    """The drafter `spec` for an engine's target."""
    return companion(engine, spec).parts.drafter
