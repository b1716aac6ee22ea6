"""Train and measure image-token models: handwritten digits and textures, speculative decoding of pictures.

    python recipes/image_tokens.py all                     # digits, then textures, then the page
    python recipes/image_tokens.py target --kind digits    # one stage of one kind

Needs `pip install scikit-learn scikit-image matplotlib`: the pictures are those that these packages ship. Stages: target ->
draft -> export -> counts -> eagle -> ship -> evaluate -> page. Each reads what the one before it left in the work folder
(`runs/images`), and can be killed at any moment and continued by the same command. `ship` puts the digits into the package.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import image_data
import image_report
import numpy as np
import torch
from drafters import unnamed
from safetensors.torch import load_file, save_file

from outrider.drafters import counts
from outrider.models.hf.fresh import small_llama
from outrider.models.load import load_target
from outrider.train import losses
from outrider.train.checkpoint import export_model, replace_folder
from outrider.train.distill import Teacher, measure_of
from outrider.train.features import read_features, write_hidden
from outrider.train.loop import LoopConfig, train
from outrider.train.methods.base import MethodOptions

HERE = Path(__file__).resolve().parent
KINDS: tuple[image_data.Kind, ...] = ("digits", "textures")
STAGES = ("target", "draft", "export", "counts", "eagle", "ship", "evaluate", "page")


@dataclass(frozen=True)
class Config:
    """The whole recipe. A step has `rows` images of 64 tokens; `drop`: share of them without their class, for guidance."""

    work: Path = HERE.parent / "runs" / "images"
    assets: Path = HERE.parent / "src" / "outrider" / "assets" / "digits"
    docs: Path = HERE.parent / "docs"
    kinds: tuple[image_data.Kind, ...] = KINDS
    rows: int = 32
    drop: float = 0.15
    width: int = 128
    layers: int = 4
    draft_width: int = 64
    target: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=1500, lr=2e-3, warmup=60, final_lr_ratio=0.02, weight_decay=0.3, save_every_s=30.0
        )
    )
    draft: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, lr=4e-3, warmup=40, final_lr_ratio=0.02, save_every_s=30.0)
    )
    eagle: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=400, lr=3e-3, warmup=40, final_lr_ratio=0.02, save_every_s=60.0)
    )


def new_model(config: Config, images: image_data.Images, width: int, layers: int) -> torch.nn.Module:
    """A Llama over the tokens of `images`; nothing ends an image but its size."""
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return small_llama(images.vocab_size, width, layers, 1 + images.raster.tokens, **ids)


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def next_token_loss(model: torch.nn.Module, batch: torch.Tensor, progress: float) -> torch.Tensor:
    """Cross-entropy of every token of `batch [rows, 65]` but the class; `progress` is not used."""
    return losses.cross_entropy(logits_of(model, batch[:, :-1]), batch[:, 1:])


def keep_best(images: image_data.Images, place: Path) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An `evaluate` for the loop: nats per held-out token; the model of the least so far is kept at `place`.

    1,500 images are learned by heart in some epochs, so the best model is not the last one.
    """
    rows = torch.from_numpy(np.column_stack([images.held_out_class, images.held_out]))
    seen = torch.from_numpy(np.column_stack([images.training_class, images.training])[:297])

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        nats = next_token_loss(model, rows, 0.0).item()
        about = place.with_suffix(".json")
        if not about.exists() or nats < json.loads(about.read_text())["held_out_nats"]:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, place)
            about.write_text(json.dumps({"held_out_nats": nats}) + "\n")
        return {"held_out_nats": nats, "training_nats": next_token_loss(model, seen, 0.0).item()}

    return evaluate


def stage_target(config: Config, images: image_data.Images) -> None:
    """Train the target; the best on held-out images is kept."""
    folder, steps = config.work / images.kind / "target", config.target.steps
    print(images.fidelity or f"{len(images.training)} training images, {len(images.held_out)} held out")
    model = new_model(config, images, config.width, config.layers)
    print(f"target: {sum(p.numel() for p in model.parameters()):,} parameters")
    batches = lambda step: images.batch(step, config.rows, steps, config.drop)  # noqa: E731
    train(model, batches, next_token_loss, config.target, folder, keep_best(images, folder / "best.safetensors"))


def trained(config: Config, images: image_data.Images, part: str) -> torch.nn.Module:
    """The best "target" or "draft" of the work folder."""
    place = config.work / images.kind / part / "best.safetensors"
    if not place.is_file():
        raise SystemExit(f"{place} is missing: run the stage {part!r} first")
    shape = (config.width, config.layers) if part == "target" else (config.draft_width, 1)
    model = new_model(config, images, *shape)
    model.load_state_dict(load_file(place))
    return model.eval().requires_grad_(False)


def stage_draft(config: Config, images: image_data.Images) -> None:
    """Distil the target into a draft of one layer: KL first, then mostly total variation, which is one minus acceptance."""
    folder, steps, target = config.work / images.kind / "draft", config.draft.steps, trained(config, images, "target")
    model = new_model(config, images, config.draft_width, 1)
    print(f"draft: {sum(p.numel() for p in model.parameters()):,} parameters")

    def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = images.batch(step, config.rows, steps, config.drop, seed=1)
        with torch.no_grad():
            return tokens, logits_of(target, tokens[:, :-1])

    def loss(draft: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], progress: float) -> torch.Tensor:
        tv, kl = (0.0, 1.0) if progress < losses.ONLY_KL else (1.0, 0.1)
        return losses.distillation(batch[1], logits_of(draft, batch[0][:, :-1]), tv, kl)

    rows = torch.from_numpy(np.column_stack([images.held_out_class, images.held_out]))[:, :-1]
    wanted = logits_of(target, rows)

    def evaluate(draft: torch.nn.Module) -> dict[str, float]:
        save_file({k: v.clone().contiguous() for k, v in draft.state_dict().items()}, folder / "best.safetensors")
        return {"acceptance": losses.acceptance(wanted, logits_of(draft, rows)).mean().item()}

    folder.mkdir(parents=True, exist_ok=True)
    train(model, batches, loss, config.draft, folder, evaluate)


# --- folders of a pair, and what is made for it ----------------------------------------------------------------------


def model_folder(config: Config, images: image_data.Images) -> Path:
    """Where the finished parts of a kind are: target, draft, counts, eagle."""
    return config.work / images.kind / "model"


def finished(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace `folder` by what `write` puts into a new one, with a manifest."""
    built = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    write(built)
    replace_folder(built, folder)


def stage_export(config: Config, images: image_data.Images) -> None:
    """Target and draft as transformers folders in bfloat16; raster.json says what the target's tokens mean."""
    place = model_folder(config, images)
    for part in ("target", "draft"):
        export_model(trained(config, images, part), None, place / part)

    def with_raster(folder: Path) -> None:
        shutil.copytree(place / "target", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        images.raster.save(folder)

    finished(place / "target", with_raster)


def stage_counts(config: Config, images: image_data.Images) -> None:
    """Count the tables, and choose the weights that predict training images best (held-out ones choose nothing)."""
    rows = [torch.from_numpy(np.asarray(x)).long() for x in (images.training, images.training_class)]
    if images.maps is not None:  # crops are free: count many
        batch = images.batch(0, 6_000, 1, 0.0, seed=2)
        rows = [batch[:, 1:], batch[:, 0]]
    classes, wide = sorted(images.raster.classes.values()), images.raster.width
    cut = len(rows[0]) - 400
    part = counts.count(rows[0][:cut], rows[1][:cut], len(images.raster.colours), classes, wide)
    weights = counts.fit(part, rows[0][cut:], rows[1][cut:])
    tables = replace(counts.count(*rows, len(images.raster.colours), classes, wide), weights=weights)
    held = [torch.from_numpy(np.asarray(x)).long() for x in (images.held_out, images.held_out_class)]
    print(f"counts: weights {weights.tolist()}, {counts.nats(tables, *held):.3f} nats per held-out token")
    finished(model_folder(config, images) / "counts", tables.save)


def stage_eagle(config: Config, images: image_data.Images) -> None:
    """An EAGLE-3 layer on the target's hidden states of training images with their classes."""
    place, method = config.work / images.kind, unnamed("eagle")
    target = load_target(model_folder(config, images) / "target", dtype="float32")
    options = MethodOptions(
        target=model_folder(config, images) / "target", loop=config.eagle, prompt=1, length=65, batch=16, levels=4
    )
    taps = method.taps(options, target)
    held = tuple(sorted({*taps, target.layers}))
    parts = []
    for part, tokens, classes in (
        ("training", images.training, images.training_class),
        ("held_out", images.held_out, images.held_out_class),
    ):
        folder = place / "features" / part
        folder.mkdir(parents=True, exist_ok=True)
        rows = np.column_stack([classes, tokens]).astype(np.uint16)
        np.save(folder / "tokens.npy", rows, allow_pickle=False)
        write_hidden(target, rows, held, folder, rows=32)
        parts.append(read_features(folder, taps, rows=options.batch, seed=0))
    columns = [held.index(layer) for layer in taps]
    model = method.new_model(options, target, parts[0].take(list(range(8)))[1][:, :, columns].flatten(0, 1))
    judge = Teacher.of(target, held, taps)
    batches, loss = method.fit_inputs(options, judge, model, parts[0])
    train(model, batches, loss, config.eagle, place / "eagle", measure_of(judge, method.predictor(4), parts[1]))
    finished(model_folder(config, images) / "eagle", lambda folder: method.save(model, options, folder))


def stage_ship(config: Config, images: image_data.Images) -> None:
    """The digits become part of the package."""
    if images.kind == "digits":
        for part in ("target", "draft", "counts", "eagle"):
            source = model_folder(config, images) / part
            copy = partial(shutil.copytree, source, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
            finished(config.assets / part, copy)
        size = sum(p.stat().st_size for p in config.assets.rglob("*") if p.is_file())
        print(f"shipped: {size / 1e6:.2f} MB")


def stage_evaluate(config: Config, images: image_data.Images) -> None:
    """Every arm: ledger, tokens per pass, audit, quality; the figures and the table of the page."""
    image_report.evaluate(model_folder(config, images), images, config.work / images.kind)


# --- the command line ------------------------------------------------------------------------------------------------

RUN = {
    "target": stage_target,
    "draft": stage_draft,
    "export": stage_export,
    "counts": stage_counts,
    "eagle": stage_eagle,
    "ship": stage_ship,
    "evaluate": stage_evaluate,
}


def main(config: Config, stages: tuple[str, ...]) -> None:
    """Run `stages` for each kind, in order."""
    for kind in config.kinds:
        images = image_data.load(kind)
        for stage in stages:
            print(f"--- {kind}: {stage}", flush=True)
            if stage != "page":
                RUN[stage](config, images)
    if "page" in stages:
        image_report.page(config.work, config.docs)


def parse(arguments: list[str] | None = None) -> tuple[Config, tuple[str, ...]]:
    """Command line -> configuration and stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="+", choices=(*STAGES, "all"), help="what to do, in this order")
    parser.add_argument("--kind", choices=KINDS, help="one kind of images (default: both)")
    parser.add_argument("--work", type=Path, help="folder for everything intermediate (default runs/images)")
    parser.add_argument("--steps", type=int, help="steps of every training")
    given = parser.parse_args(arguments)
    config = Config()
    config = replace(config, work=given.work or config.work, kinds=(given.kind,) if given.kind else KINDS)
    change = {"steps": given.steps, "warmup": min(30, given.steps)} if given.steps else {}
    config = replace(config, **{k: replace(getattr(config, k), **change) for k in ("target", "draft", "eagle")})
    return config, STAGES if "all" in given.stage else tuple(given.stage)


if __name__ == "__main__":
    main(*parse())
