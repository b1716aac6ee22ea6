"""Train and measure image-token models: handwritten digits and textures, speculative decoding of pictures.

    python recipes/image_tokens.py all                     # digits, then textures, then the page
    python recipes/image_tokens.py target --kind digits    # one stage of one kind

Needs `pip install scikit-learn scikit-image matplotlib`: the pictures are those that these packages ship. Stages: target ->
draft -> counts -> eagle -> export -> evaluate -> page. Each reads what the one before it left in the work folder
(`runs/images`), and can be killed at any moment and continued by the same command. `export` puts the digits into the package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import image_data
import torch
from safetensors.torch import load_file, save_file

from outrider.models.hf.fresh import small_llama
from outrider.train import losses
from outrider.train.loop import LoopConfig, train

HERE = Path(__file__).resolve().parent
KINDS: tuple[image_data.Kind, ...] = ("digits", "textures")
STAGES = ("target", "draft", "counts", "eagle", "export", "evaluate", "page")


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
        default_factory=lambda: LoopConfig(steps=700, lr=2e-3, warmup=40, final_lr_ratio=0.02, save_every_s=60.0)
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
    rows = torch.from_numpy(image_data.np.column_stack([images.held_out_class, images.held_out]))
    seen = torch.from_numpy(image_data.np.column_stack([images.training_class, images.training])[:297])

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

    rows = torch.from_numpy(image_data.np.column_stack([images.held_out_class, images.held_out]))[:, :-1]
    wanted = logits_of(target, rows)

    def evaluate(draft: torch.nn.Module) -> dict[str, float]:
        save_file({k: v.clone().contiguous() for k, v in draft.state_dict().items()}, folder / "best.safetensors")
        return {"acceptance": losses.acceptance(wanted, logits_of(draft, rows)).mean().item()}

    folder.mkdir(parents=True, exist_ok=True)
    train(model, batches, loss, config.draft, folder, evaluate)


# --- the command line ------------------------------------------------------------------------------------------------

RUN = {"target": stage_target, "draft": stage_draft}


def main(config: Config, stages: tuple[str, ...]) -> None:
    """Run `stages` for each kind, in order."""
    for kind in config.kinds:
        images = image_data.load(kind)
        for stage in stages:
            print(f"--- {kind}: {stage}", flush=True)
            RUN[stage](config, images)


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
