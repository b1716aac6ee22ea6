"""What engines on one target share: its weights, its tokenizer, the draft models, and the lock that orders their steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from outrider.assets import shipped, shipped_prompts
from outrider.engine import contracts
from outrider.engine.turns import Turns
from outrider.errors import CapabilityError, CapacityError, ConfigError
from outrider.models.folder import files_of, identity_of, resolve_folder
from outrider.models.given import check_loading, ends_of, is_model, target_of
from outrider.models.images import images_of, is_processor
from outrider.models.lean import LeanTarget
from outrider.models.load import find_tokenizer, load_target, reads_emulated, stop_ids
from outrider.models.quantised import distance, rounding
from outrider.models.token_use import TokenUse, prompts_from, use_of
from outrider.models.translate import shared_token_share, translate
from outrider.models.vocabulary_choice import choose
from outrider.nn.held import Rounding
from outrider.options import EngineOptions
from outrider.protocols import Drafter, ImageReader, Rule, Sink, Target, Tokenizer

Progress = Callable[[float], None]
logger = logging.getLogger(__name__)

TRANSLATE = "translate:"
"""Marks a draft model of another vocabulary."""
MEASURED = 512
"""Tokens of the shipped prompts, at most, on which a rounded target is compared with its own weights."""


class ModelKey(NamedTuple):
    """Identifies a loaded draft model: its files with their state, and every option that decides what is loaded; the device is the
    target's. dtype: the one passed to `load_target`."""

    name: str
    folder: Path
    files: tuple[tuple[str, int, int], ...]
    implementation: str
    quantize: str | None
    dtype: str


@dataclass(slots=True)
class Loaded:
    """What engines on one target share: the weights of target and draft models, the tokenizer, and the lock of turns.

    images: reads images for the target, if it can.
    drafter, rule: this engine's, if they were given as objects; None: they are made from the names in `options`.
    given: draft models that were given as objects, by the name that `options` have for each.
    """

    path: str | None
    target: Target
    tokenizer: object | None
    eos: tuple[int, ...]
    options: EngineOptions
    sinks: tuple[Sink, ...] = ()
    images: ImageReader | None = None
    given: dict[str, tuple[Target, object]] = field(default_factory=dict)
    drafter: Drafter | None = None
    rule: Rule | None = None
    models: dict[ModelKey, tuple[Target, object]] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)


def load(
    target: str | Path | Target | Any,
    tokenizer: object | None,
    options: EngineOptions,
    sinks: tuple[Sink, ...],
    progress: Progress | None,
) -> Loaded:
    """The target that the options name, or `target` itself (also a model of transformers), with its tokenizer and its ends of text.

    Raises ConfigError."""
    if target is not None and not isinstance(target, str | Path):
        given = {
            name: getattr(options, name)
            for name in ("dtype", "device", "implementation", "target_quantize", "kv_dtype")
        }
        given |= {} if options.input_bits == EngineOptions().input_bits else {"input_bits": options.input_bits}
        check_loading(given, "the target")
        processor = tokenizer if is_processor(tokenizer) else None
        tokenizer = tokenizer if processor is None else getattr(processor, "tokenizer", None)
        if is_model(target):
            made = target_of(target)
            return Loaded(None, made, tokenizer, ends_of(target, tokenizer), options, sinks, images_of(made, processor))
        contracts.check("target", target, contracts.TARGET)  # before a drafter is built for it
        return Loaded(None, target, tokenizer, (), options, sinks, images_of(target, processor))
    path = str(shipped("target") if target is None else target)
    model = load_target(
        path,
        dtype=options.dtype,
        device=options.device,
        implementation=options.implementation,
        quantize=options.target_quantize,
        kv_dtype=options.kv_dtype,
        input_bits=options.input_bits,
        progress=progress,
        role="target",
    )
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(path)
    ends = stop_ids(path, tokenizer, model.vocab_size)
    if options.target_quantize is not None:
        model.notices = (*model.notices, _rounding(path, model, tokenizer, options))
    if options.kv_dtype != "auto":
        model.notices = (*model.notices, *_caching(model, tokenizer))
    return Loaded(path, model, tokenizer, ends, options, sinks, images_of(model, path))


def _rounding(path: str, model: Target, tokenizer: object | None, options: EngineOptions) -> str:
    """What rounding the target's weights has changed, on text that the shipped pair was not trained on."""
    told = f"the target is {Path(path).name} with weights rounded to {options.target_quantize}, another model"

    def plain() -> Target:
        return load_target(
            path, dtype=options.dtype, device="cpu", implementation=options.implementation, role="target"
        )

    own = f"{str(model.dtype).removeprefix('torch.')} weights"
    return f"{told}: {_far(plain, cast(LeanTarget, model).storing('auto'), tokenizer, own)}"


def _caching(model: Target, tokenizer: object | None) -> tuple[str, ...]:
    """What storing keys and values in fewer bits saves, and has changed."""
    target = cast(LeanTarget, model)
    plain = target.storing("auto")
    if target.stored == plain.stored:
        return ()
    size = f"{target.token_bytes / 1024:.1f} KiB of keys and values a token, stored as {target.stored.name}"
    told = f"{size} ({plain.token_bytes / 1024:.1f} as {plain.stored.name}), another model"
    widened = "" if target.native is not None else "; PyTorch widens them in every pass, which saves memory and no time"
    return (f"{told}: {_far(lambda: plain, target, tokenizer, f'its {plain.stored.name} cache')}{widened}",)


def _far(plain: Callable[[], Target], model: Target, tokenizer: object | None, own: str) -> str:
    """How far a target is from what it was made of, which is called `own`, in a clause."""
    if tokenizer is None:
        return "how far from its own was not measured, since there is no tokenizer"
    text = [t for prompt in shipped_prompts() for t in cast(Tokenizer, tokenizer).encode(prompt)]
    try:
        far = distance(plain(), model, text[: min(MEASURED, model.max_length)])
    except CapacityError:
        return "how far from its own was not measured, since both do not fit into memory"
    return (
        f"on {far.tokens} tokens of code, mean KL {far.kl:.2g} nats and mean total variation {far.tv:.2%} from {own}, the same "
        f"most likely token at {far.agree:.1%}"
    )


def load_model(loaded: Loaded, options: EngineOptions, name: str) -> tuple[Target, object]:
    """A draft model in the target's dtype, with its tokenizer; its weights are quantised if the options say so.

    "translate:NAME" is the model NAME with another tokenizer: it drafts with the tokens that both vocabularies spell the same.
    """
    if name in loaded.given:
        own = {"draft_quantize": options.draft_quantize, "draft_vocabulary": options.draft_vocabulary}
        check_loading(own, "the draft")
        return loaded.given[name]
    if name.startswith(TRANSLATE):
        if options.draft_vocabulary is not None:
            raise ConfigError(
                f"draft_vocabulary does not go with {name!r}: it drafts only the tokens that both vocabularies share; drop one"
            )
        return _translated(loaded, options, name.removeprefix(TRANSLATE))
    if options.draft_vocabulary is not None:
        return reduced(loaded, options, name)
    key = _key(loaded, options, name)
    if key not in loaded.models:
        loaded.models[key] = (_recipe(loaded, key)(), find_tokenizer(name))
    return loaded.models[key]


def load_elsewhere(loaded: Loaded, options: EngineOptions, name: str) -> Callable[[], Target]:
    """What loads the same draft model in another process. Raises CapabilityError for one that is not loaded from a folder alone."""
    if name in loaded.given or name.startswith(TRANSLATE) or options.draft_vocabulary is not None:
        raise CapabilityError(
            "a process of its own loads a draft model from its folder as it is: drop 'apart:', or give a path or Hub name, without "
            "translate: and draft_vocabulary"
        )
    return _recipe(loaded, _key(loaded, options, name))


def _recipe(loaded: Loaded, key: ModelKey) -> Callable[[], Target]:
    """What loads a draft model: it can be pickled."""
    return partial(
        load_target,
        key.name,
        dtype=key.dtype,
        device=str(loaded.target.device),
        implementation=key.implementation,
        quantize=key.quantize,
        role="draft",
    )


def rounding_of(options: EngineOptions) -> Rounding | None:
    """How `draft_quantize` rounds trained drafters; None to leave them as they are."""
    return None if options.draft_quantize is None else rounding(options.draft_quantize)


def give(loaded: Loaded, model: Any, tokenizer: object | None, name: str) -> None:
    """Remember a draft model that was given as an object of transformers."""
    loaded.given[name] = (target_of(model), tokenizer)


def name_of(model: Any) -> str:
    """What the options call a model that was given as an object: no path and no Hub name looks like it."""
    plain = getattr(model, "_orig_mod", model)
    return f"<{type(plain).__name__} {id(plain):#x}>"


def _key(loaded: Loaded, options: EngineOptions, name: str, mark: str = "") -> ModelKey:
    """The key of the draft model `name`; `mark` distinguishes a translated one from the model itself."""
    folder, ours = resolve_folder(name).resolve(), loaded.target.dtype
    free = options.dtype == "auto" and reads_emulated(name, ours, loaded.target.device, options.implementation)
    dtype = "auto" if free else str(ours).removeprefix("torch.")
    return ModelKey(mark + name, folder, files_of(folder), options.implementation, options.draft_quantize, dtype)


VOCABULARY = "vocabulary:"
"""Marks a draft model with a part of its vocabulary."""


def restricts(key: ModelKey, options: EngineOptions) -> bool:
    """Whether a loaded model is what `draft_vocabulary` made of the draft that these options name, and not of another engine's."""
    mark = f"{VOCABULARY}{options.draft_vocabulary}:{options.longest}:"
    name = key.name.removeprefix(mark)
    return name != key.name and (options.draft == "auto" or name in str(options.draft))


def reduced(loaded: Loaded, options: EngineOptions, name: str) -> tuple[Target, object]:
    """The draft model `name` with the tokens that `draft_vocabulary` says, and in its notices what that was predicted to do."""
    wanted = options.draft_vocabulary
    key = _key(loaded, options, name, f"{VOCABULARY}{wanted}:{options.longest}:")
    if key not in loaded.models:
        model, tokenizer = load_model(loaded, options.changed(draft_vocabulary=None), name)
        size = None if wanted == "auto" else int(cast(int, wanted))
        made, told = choose(loaded.target, model, token_use(loaded), size, max(1, options.longest), name)
        if made is None:
            told_so = f"{name} keeps all its {model.vocab_size:,} tokens, since fewer do not pay: {told.sentence('it')}"
            loaded.models[key] = (model, tokenizer)
            model.notices = (*model.notices, told_so)
        else:
            made.notices, made.predicted = (*model.notices, told.sentence(name)), told
            loaded.models[key] = (made, tokenizer)
    return loaded.models[key]


def token_use(loaded: Loaded) -> TokenUse:
    """Which tokens the target uses, from the cache if it was counted before."""
    target, tokenizer = loaded.target, loaded.tokenizer
    if loaded.path is None:
        raise ConfigError(
            "draft_vocabulary needs a target from a folder or the Hub, whose tokens are counted once: leave it out, or give one"
        )
    prompts = shipped_prompts() if tokenizer is not None else []
    texts = [list(cast(Tokenizer, tokenizer).encode(prompt)) for prompt in prompts]
    cache = "" if loaded.options.kv_dtype == "auto" else f" {loaded.options.kv_dtype}"
    cache += "" if loaded.options.input_bits == 8 else f" {loaded.options.input_bits}"
    key = f"{identity_of(resolve_folder(loaded.path))} {target.dtype} {loaded.options.target_quantize}{cache}"
    return use_of(target, key, prompts_from(texts, target.vocab_size), logger.warning)


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
        sample = [t for prompt in shipped_prompts() for t in ours.encode(prompt)]
        share = shared_token_share(seen, sample)
        notice = f"{seen.notices[0]}: {share:.0%} of the tokens of a sample of code, an upper bound of acceptance"
        seen.notices = (notice, *model.notices)
        loaded.models[key] = (seen, loaded.tokenizer)
    return loaded.models[key]
