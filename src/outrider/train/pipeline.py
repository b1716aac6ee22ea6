"""From text and a target to a trained drafter in a folder: prepare data, fit, measure, export. Every stage is resumable."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outrider.build import Engine, build_engine
from outrider.deprecated import current
from outrider.drafters.checkpoint import output_head
from outrider.drafters.dflash.network import DFlashConfig, DFlashNetwork
from outrider.drafters.eagle.eagle1 import Eagle1Network
from outrider.drafters.eagle.eagle3 import Eagle3Network
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.medusa.network import MedusaConfig, MedusaNetwork
from outrider.errors import ConfigError, unknown_name
from outrider.models.checkpoint import Checkpoint
from outrider.models.config import Unsupported
from outrider.models.folder import resolve_folder
from outrider.models.hf.fresh import small_llama
from outrider.models.load import load_target, load_tokenizer
from outrider.protocols import Target
from outrider.train import data
from outrider.train.block import SHARES, Blocks, block_distillation_loss, block_loss, new_blocks
from outrider.train.checkpoint import identity_of, replace_folder, write_model
from outrider.train.corpus import read_corpus
from outrider.train.drafter import (
    Teacher,
    feature_loss,
    loss_of,
    measure_of,
    new_draft,
    new_features,
    new_heads,
    new_last_features,
    output_of,
    predictor,
)
from outrider.train.features import (
    DataSpec,
    Features,
    cut_prompts,
    hidden_of,
    read_features,
    write_hidden,
    write_tokens,
)
from outrider.train.keyed import hidden_folder, part_folder, run_folder
from outrider.train.loop import BOOKKEEPING, LoopConfig, LossOf, share_computing, train
from outrider.train.losses import LOSSES
from outrider.train.slots import objective_named

KINDS: dict[str, frozenset[str]] = {
    "medusa": frozenset({"blocks", "loss"}),
    "eagle": frozenset({"width", "taps", "loss"}),
    "eagle1": frozenset({"width"}),
    "dflash": frozenset({"blocks", "width", "taps", "anchors", "objective", "labels", "loss"}),
    "draft": frozenset({"blocks", "width", "loss"}),
}
"""What can be trained, and which of the choices that not every kind has it reads; the others are refused, not dropped."""
LABELS = ("distributions", "tokens")
ELSEWHERE = frozenset({"target", "data", "work", "out", "pattern", "skip_bad", "rows", "held_out", "slots"})
"""Fields of a job that do not bear on the training of a drafter, or do so through the data alone."""
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One training run.

    target: folder or Hub name. data: files and folders of text. work: what can be resumed; out: the finished drafter.
    rows, held_out: rows of training and held-out data. levels: heads, levels of the training-time test, or drafted slots of a
    block. blocks: residual blocks of a head, or layers of a block drafter. width: of a feature drafter, 0 for the target's.
    taps: blocks that a feature or block drafter reads, () for EAGLE-3's choice. anchors: blocks of a row and step.
    objective: of a block drafter, a name of `slots.ARMS`; labels: what it learns, the target's "distributions" or the "tokens".
    loss: a name of `losses.LOSSES`; a block drafter that learns laws knows three of them. For a draft model, `blocks` are
    its layers and a width of 0 is about half of the target's.
    """

    kind: str
    target: Path | str
    data: tuple[Path, ...]
    work: Path
    out: Path
    loop: LoopConfig
    pattern: str = "*"
    skip_bad: bool = False
    rows: int = 800
    held_out: int = 64
    prompt: int = 64
    length: int = 256
    temperature: float = 1.0
    batch: int = 8
    levels: int = 4
    blocks: int = 1
    width: int = 0
    taps: tuple[int, ...] = ()
    slots: int = 16
    anchors: int = 16
    objective: str = "decay"
    labels: str = "distributions"
    loss: str = "staged"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", current(self.labels, {"laws": "distributions"}, "labels"))
        if isinstance(self.data, str | Path):  # one place, not its letters
            object.__setattr__(self, "data", (Path(self.data),))
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("drafter to train", self.kind, tuple(KINDS)))
        if self.levels < 1 or self.length <= self.levels + 1:
            raise ConfigError(f"levels must be >= 1 and well below the rows' length, got {self.levels}, {self.length}")
        if self.anchors < 1:
            raise ConfigError(f"a row needs at least one anchor, got {self.anchors}")
        objective_named(self.objective, self.levels + 1)
        if self.labels not in LABELS:
            raise ConfigError(unknown_name("kind of labels", self.labels, LABELS))
        if self.loss not in LOSSES:
            raise ConfigError(unknown_name("loss", self.loss, LOSSES))
        if self.kind == "dflash" and self.labels == "distributions" and self.loss not in SHARES:
            raise ConfigError(f"a block drafter learns distributions by {', '.join(SHARES)}, not by {self.loss}")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """ConfigError for a choice that would change nothing."""
        given = {f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default}
        unread = sorted(given & frozenset().union(*KINDS.values()) - KINDS[self.kind])
        if unread:
            kinds = ", ".join(kind for kind, read in KINDS.items() if set(unread) <= read)
            raise ConfigError(f"{self.kind} does not read {', '.join(unread)}" + (f"; {kinds} would" if kinds else ""))
        if self.kind == "dflash" and self.labels == "tokens" and "loss" in given:
            raise ConfigError("labels 'tokens' have one loss, weighted by the objective: leave the loss out")

    def choices(self, taps: tuple[int, ...]) -> dict[str, Any]:
        """All that decides what a training on given data makes: two trainings that differ in any of it share no checkpoint.

        Every field counts but those that say where things lie, what the data are of (which have a name of their own) and how a
        run is watched; so a field that is added counts. taps: as `taps_of` has them.
        """
        plain = asdict(self)
        plain["labels"] = {"distributions": "laws"}.get(self.labels, self.labels)  # as keys of work folders have it
        loop = {k: v for k, v in plain.pop("loop").items() if k not in BOOKKEEPING}
        return {k: v for k, v in plain.items() if k not in ELSEWHERE} | {"loop": loop, "taps": taps}

    def wanted(self, part: str) -> DataSpec:
        """The data of a part, "training" or "held_out"."""
        rows = self.rows if part == "training" else self.held_out
        return DataSpec(rows, self.prompt, self.length, self.temperature, self.loop.seed)


def taps_of(job: Job, target: Target) -> tuple[int, ...]:
    """Blocks whose outputs the drafter reads; for features by default those of EAGLE-3: 2, L / 2, L - 3."""
    if job.kind in ("medusa", "eagle1", "draft"):
        return (target.layers,)
    middle = {2, target.layers // 2, target.layers - 3}
    taps = job.taps or tuple(sorted(t for t in middle if 0 < t <= target.layers))
    if any(not 0 <= t <= target.layers for t in taps):
        raise ConfigError(f"taps {taps} are not blocks of a target with {target.layers}")
    return taps


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data on disk. training, held_out: the folders of their text; layers: of the hidden states that are asked for."""

    training: Path
    held_out: Path
    layers: tuple[int, ...]

    @property
    def parts(self) -> tuple[Path, Path]:
        return self.training, self.held_out


def texts_of(job: Job, report: Report = print) -> dict[str, list[data.Document]]:
    """The documents of either part: every one once, whole files on one side; a single text is cut in two."""
    documents = read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, report=report)
    training, held_out = data.split(documents)
    if len(documents) == 1:
        training, held_out = ([part] for part in data.halve(documents[0]))
    elif not training or not held_out:  # few documents: every tenth, at least one
        training, held_out = [d for i, d in enumerate(documents) if i % 10], documents[::10]
    return {"held_out": held_out, "training": training}


def prepare(job: Job, report: Report = print) -> Prepared:
    """Text and hidden states of the training and the held-out part, continued where they are not there yet."""
    texts, identity = texts_of(job, report), identity_of(resolve_folder(job.target))
    engine = engine_of(job)
    for notice in engine.notices:
        report(notice)
    target = engine.parts.target
    layers = tuple(sorted({*taps_of(job, target), target.layers}))
    folders: dict[str, Path] = {}
    # files may begin alike (a licence): what the training starts from is not held out
    begun = {tuple(p) for p in cut_prompts(texts["training"], engine.encode, job.wanted("training"))}
    for part, documents in texts.items():
        wanted, apart = job.wanted(part), begun if part == "held_out" else set[tuple[int, ...]]()
        prompts = cut_prompts(documents, engine.encode, wanted, apart)
        folders[part] = part_folder(job.work, part, identity, documents, wanted, prompts)
        tokens = write_tokens(engine, documents, wanted, folders[part], report, apart)
        place, held = hidden_folder(folders[part], layers)
        place.mkdir(exist_ok=True)
        write_hidden(target, tokens, held, place, report=report)
    return Prepared(folders["training"], folders["held_out"], layers)


def engine_of(job: Job) -> Engine:
    """What writes the target's own text: with the target's companion draft, where there is one."""
    return build_engine(job.target, slots=job.slots, length=4, max_length=job.length + 8)


def run(job: Job, report: Report = print) -> dict[str, Any]:
    """Everything; the last measures on held-out rows. Finished stages are not done again."""
    ready = prepare(job, report)
    target = load_target(job.target, dtype="float32")
    taps = taps_of(job, target)
    held = {p: hidden_folder(p, ready.layers)[0] for p in ready.parts}
    training, held_out = (
        read_features(p, taps, hidden=held[p], rows=job.batch, seed=job.loop.seed, report=report) for p in ready.parts
    )
    model = new_model(job, target, training)
    report(f"{job.kind}: {sum(p.numel() for p in model.parameters()):,} parameters, reads layers {taps}")
    judge = Teacher.of(target, training.layers, taps)
    predict = predictor(model, job.levels)
    evaluate = measure_of(Teacher.of(target, held_out.layers, taps), predict, held_out)
    batches, loss = fit_inputs(job, judge, model, training)
    state = train(
        model, batches, loss, job.loop, run_folder(job.work, job.kind, ready.parts, job.choices(taps)), evaluate, report
    )
    export(model, job, report)
    spent = {"seconds": state["seconds"], "computing": share_computing(state)}
    return {"drafter": job.kind, "steps": state["step"], **spent, **state["history"][-1]}


def fit_inputs(
    job: Job, judge: Teacher, model: nn.Module, training: Features
) -> tuple[Callable[[int], tuple[Tensor, ...]], LossOf]:
    """What a drafter is trained on, step by step, and its loss."""
    if isinstance(model, DFlashNetwork):
        size = model.config.block
        first = 1 if job.prompt == job.length else job.prompt - 1
        batches, how = Blocks(training, size, job.anchors, first), objective_named(job.objective, size)
        if job.labels == "distributions":
            return batches, block_distillation_loss(judge.taps, judge.last, judge.target, how, job.loss)
        return batches, block_loss(judge.taps, how)
    if isinstance(model, Eagle1Network):
        return training, feature_loss(judge)
    levels = 1 if job.kind == "draft" else job.levels  # all levels of a language model are its next-token law
    return training, loss_of(judge, predictor(model, levels), job.loss)


def new_model(job: Job, target: Target, training: Features) -> nn.Module:
    """The drafter before its first step."""
    taps = taps_of(job, target)
    if job.kind == "draft":
        return draft_model(job, target)
    if job.kind == "medusa":
        config = MedusaConfig(target.hidden_size, target.vocab_size, job.levels, target.layers, job.blocks)
        return new_heads(config, target, final_norm(job.target), job.loop.seed)
    _, hidden = training.take(list(range(min(8, len(training.tokens)))))
    seen = hidden[:, :, [training.layers.index(t) for t in taps]].flatten(0, 1)
    if job.kind == "dflash":
        return new_blocks(block_config(job, target), target, seen, *head_of(job.target, target), job.loop.seed)
    config = feature_config(job, target)
    if job.kind == "eagle1":
        return new_last_features(config, target, job.loop.seed)
    return new_features(config, target, seen, job.loop.seed)


def feature_config(job: Job, target: Target) -> EagleConfig:
    """Shapes of a feature drafter: heads of 32 where they divide its width; one that foresees features is as wide as the target."""
    width = job.width or target.hidden_size
    if job.kind == "eagle1" and width != target.hidden_size:
        raise ConfigError(f"eagle1 is as wide as its target, here {target.hidden_size}: leave the width out")
    each = next((d for d in (32, 16, 8) if width % d == 0), 0)
    if not each or (job.width and width % 32):
        raise ConfigError(f"the width of a feature drafter must be a multiple of 32 (its heads), got {width}")
    heads, inner = width // each, -(-8 * width // 3 // 32) * 32
    return EagleConfig(width, target.hidden_size, taps_of(job, target), target.vocab_size, heads, heads, each, inner)


def draft_model(job: Job, target: Target) -> nn.Module:
    """A fresh language model over the target's tokens; its context is the target's."""
    tokenizer = whole_tokenizer(job.target)
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in ("pad", "bos", "eos")}
    width = job.width or max(32, target.hidden_size // 64 * 32)
    length = min(target.max_length, 1 << 17)
    return new_draft(small_llama(target.vocab_size, width, job.blocks, length, seed=job.loop.seed, **ids), target)


def whole_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a folder as transformers has it: one that can be saved, with all its special tokens."""
    tokenizer = load_tokenizer(str(path))  # which refuses code, and what is too large
    if hasattr(tokenizer, "save_pretrained"):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_folder(path), local_files_only=True, trust_remote_code=False)


def block_config(job: Job, target: Target) -> DFlashConfig:
    """Shapes of a block drafter: the target's width, heads of 32 where that divides it, and padding for a mask token."""
    wide = target.hidden_size
    each = next((d for d in (32, 16, 8, 4) if wide % d == 0), 2)
    if job.width not in (0, wide):
        raise ConfigError(f"a block drafter is as wide as its target, here {wide}: leave the width out")
    pad = getattr(load_tokenizer(str(job.target)), "pad_token_id", None)
    mask = target.vocab_size - 1 if pad is None or pad >= target.vocab_size else int(pad)
    inner = -(-8 * wide // 3 // 32) * 32
    return DFlashConfig(
        hidden=wide,
        taps=taps_of(job, target),
        vocab_size=target.vocab_size,
        heads=wide // each,
        kv_heads=wide // each,
        head_dim=each,
        inner=inner,
        block=job.levels + 1,
        mask=mask,
        layers=job.blocks,
    )


def head_of(path: Path | str, target: Target) -> tuple[Tensor, Tensor]:
    """The target's output matrix as `DFlashNetwork.load` will find it, and the weights of the final norm before it."""
    folder = resolve_folder(path)
    head = output_head(target, str(folder), folder).to(target.device)
    norm = (output_of(target) * head).sum(0) / head.square().sum(0).clamp(min=1e-12)
    return head, norm


def final_norm(target: Path | str) -> Tensor | None:
    """Weights of the target's final norm, where our own reader knows where they are."""
    try:
        return Checkpoint(resolve_folder(target)).read(torch.float32, torch.device("cpu")).norm
    except Unsupported:
        return None


def export(model: nn.Module, job: Job, report: Report = print) -> None:
    """Put the drafter in the place of `job.out`, atomically."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    built = job.out.with_name(f".tmp-{job.out.name}-{os.getpid()}")
    shutil.rmtree(built, ignore_errors=True)
    if isinstance(model, MedusaNetwork | Eagle3Network | Eagle1Network | DFlashNetwork):
        model.save(built)
    else:
        write_model(model, whole_tokenizer(job.target), built)
    for card in job.out.glob("*.md"):  # a model card belongs to the place
        shutil.copy(card, built)
    replace_folder(built, job.out)
    report(f"written: {job.out}")


def estimate(job: Job) -> dict[str, Any]:
    """What `run` would need: disk and memory in bytes, time in seconds, from a few rows of each stage on this machine."""
    documents = read_corpus(list(job.data), pattern=job.pattern, skip_bad=job.skip_bad, report=lambda _: None)
    engine = engine_of(job)
    target = engine.parts.target
    layers = tuple(sorted({*taps_of(job, target), target.layers}))
    rows = job.rows + job.held_out
    probe = np.full((job.slots, job.length), 1, dtype=np.int64)
    started = time.perf_counter()
    probe_hidden = hidden_of(target, torch.from_numpy(probe[: min(4, job.slots)]), layers)
    capture = (time.perf_counter() - started) / len(probe_hidden) * rows
    from outrider.params import SamplingParams

    tokens = min(32, job.length - job.prompt)
    write = 0.0
    if tokens:
        prompts = [engine.encode(documents[0].text[:2000])[: job.prompt] or [1]] * job.slots
        started = time.perf_counter()
        engine.generate(
            prompts, SamplingParams(temperature=job.temperature, max_tokens=tokens, ignore_eos=True, seed=0)
        )
        write = (time.perf_counter() - started) / (job.slots * tokens) * (job.length - job.prompt) * rows
    held = Features(probe[:4], probe_hidden.half().cpu().numpy(), layers)
    exact = load_target(job.target, dtype="float32")
    model = new_model(job, exact, held)
    batches, loss = fit_inputs(job, Teacher.of(exact, layers, taps_of(job, exact)), model, replace(held, rows=1))
    started = time.perf_counter()
    loss(model, batches(0), 0.0).backward()
    step = (time.perf_counter() - started) * job.batch
    parameters = sum(p.numel() for p in model.parameters())
    predicted = (job.anchors if job.kind == "dflash" else job.length) * job.levels
    activations = job.batch * predicted * exact.vocab_size * 4 * 8
    return {
        "documents": len(documents),
        "rows": rows,
        "parameters": parameters,
        "disk_bytes": sum(
            job.wanted(p).bytes(len(layers), target.hidden_size, target.vocab_size) for p in ("training", "held_out")
        )
        + 2 * 12 * parameters,
        "memory_bytes": 16 * parameters + activations,
        "seconds": {"text": write, "hidden states": capture, "training": step * job.loop.steps},
    }
