"""Speculative decoding of pictures on the clock: the shipped digits' target, grown to 160 million parameters with the same output.

The shipped target is so small that the fixed part of a pass is most of its time. Growing changes what a pass costs and not what it
computes: every channel of the residual stream stands there eight times, more heads and a wider MLP add nothing (their output
columns are 0), nor do eight more layers. Tokens per pass are therefore those of docs/images.md, and the time is that of a target
of this size.

    python benchmarks/image_tokens.py --pictures 24 --slots 1,4

Every picture is drawn by every arm, in an order drawn anew for each; ratios of tokens per second to plain drawing are paired by
picture, with 95% intervals over pictures (over groups of them where several are drawn together). Guidance has two rows for a token;
`--guidance 1` has one.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.assets import shipped_images
from outrider.evaluate.images import Painter, load_painter
from outrider.evaluate.measure import machine
from outrider.evaluate.statistics.ratios import paired_ratio
from outrider.raster import read_raster

COPIES = 8
"""Of every channel of the residual stream: a power of two, so that dividing by it is exact in bfloat16."""
LAYERS, HEADS, INNER = 12, 32, 2816
READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears that read the residual stream; `o_proj` and `down_proj` write to it."""


def wider(weight: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """A linear [n, d] that reads the residual stream: [rows, COPIES d], what is new is random."""
    out = torch.randn(rows, weight.shape[1] * COPIES, generator=generator) * 0.02
    out[: len(weight)] = weight.float().repeat(1, COPIES) / COPIES
    return out


def longer(weight: Tensor, columns: int) -> Tensor:
    """A linear [d, n] that writes to the residual stream: [COPIES d, columns], nothing from what is new."""
    out = torch.zeros(weight.shape[0] * COPIES, columns)
    out[:, : weight.shape[1]] = weight.float().repeat(COPIES, 1)
    return out


def grown_weights(small: dict[str, Tensor], layers: int, width: int) -> dict[str, Tensor]:
    """The weights of the grown model. width: of all heads together."""
    draw = torch.Generator().manual_seed(0)
    size = {"q_proj": width, "k_proj": width, "v_proj": width, "gate_proj": INNER, "up_proj": INNER}
    out = {
        "model.embed_tokens.weight": small["model.embed_tokens.weight"].float().repeat(1, COPIES),
        "model.norm.weight": small["model.norm.weight"].float().repeat(COPIES),
        "lm_head.weight": small["model.embed_tokens.weight"].float().repeat(1, COPIES) / COPIES,
    }
    for layer in range(LAYERS):
        like = f"model.layers.{min(layer, layers - 1)}."
        for name, weight in small.items():
            if not name.startswith(like):
                continue
            part, place = name.split(".")[-2], name.replace(like, f"model.layers.{layer}.")
            if part in READ:
                out[place] = wider(weight, size[part], draw)
            elif weight.ndim == 2:
                out[place] = longer(weight, width if part == "o_proj" else INNER) * (layer < layers)
            else:
                out[place] = weight.float().repeat(COPIES)
    return {name: tensor.bfloat16().contiguous() for name, tensor in out.items()}


def grow(source: Path, folder: Path) -> Path:
    """Write the grown target of `source` into `folder`, unless it is there."""
    if (folder / "raster.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    width = HEADS * config["head_dim"]
    small = load_file(source / "model.safetensors")
    save_file(grown_weights(small, config["num_hidden_layers"], width), folder / "model.safetensors", {"format": "pt"})
    config |= {
        "hidden_size": config["hidden_size"] * COPIES, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "raster.json").write_text((source / "raster.json").read_text())
    return folder


def arms(parts: Path, length: int) -> dict[str, tuple[str, str]]:
    """Name -> draft and rule."""
    return {
        "plain": ("none", "speculative_sampling"),
        f"draft, length {length}": (str(parts / "draft"), "block"),
        "counts": (f"counts:{parts / 'counts'}", "block"),
        "jacobi": (f"jacobi:{length}", "speculative_sampling"),
        "jacobi up": (f"jacobi:{length}:up", "speculative_sampling"),
    }


def drawn(painter: Painter, group: list[tuple[str | None, int]]) -> tuple[float, int, int]:
    """Seconds, tokens and passes of a sequence of one group of pictures, drawn together."""
    painter.engine.reset()
    began = time.perf_counter()
    pictures = painter.draw(group)
    seconds = time.perf_counter() - began
    counts, _ = painter.engine.reset()
    return seconds, sum(len(p.tokens) for p in pictures), counts.steps


def measure(target: Path, parts: Path, slots: int, args: argparse.Namespace) -> None:
    """Print the arms of one number of pictures at a time."""
    named = arms(parts, args.length)
    painters = {
        name: load_painter(
            target, draft, length=0 if name == "plain" else args.length, rule=rule, guidance=args.guidance, slots=slots,
            dtype="bfloat16",
        )
        for name, (draft, rule) in named.items()
    }  # fmt: skip
    classes, order = list(read_raster(target).classes), random.Random(0)
    jobs: list[tuple[str | None, int]] = [(classes[i % len(classes)], i) for i in range(args.pictures)]
    groups = [jobs[i : i + slots] for i in range(0, len(jobs), slots)]
    for painter in painters.values():
        drawn(painter, groups[0])  # compiles, and reads the weights once
    found = defaultdict(list)
    for group in groups:
        for name in order.sample(list(painters), len(painters)):
            found[name].append(drawn(painters[name], group))
    base = np.asarray(found["plain"], dtype=float)
    per_pass = base[:, 0].sum() / base[:, 2].sum()
    print(f"\n{slots} at a time, {len(groups)} groups; plain: {base[:, 1].sum() / base[:, 0].sum():.1f} tokens/s")
    print(
        "| arm | tokens per pass | time of a pass with its draft, plain's is 1 | tokens/s over plain |\n|---|---|---|---|"
    )
    for name in list(named)[1:]:
        own = np.asarray(found[name], dtype=float)
        r = paired_ratio(own[:, 1], own[:, 0], base[:, 1], base[:, 0])
        cost = own[:, 0].sum() / own[:, 2].sum() / per_pass
        length = own[:, 1].sum() / own[:, 2].sum()
        print(f"| {name} | {length:.2f} | {cost:.2f} | {r.value:.2f} ({r.low:.2f} to {r.high:.2f}) |", flush=True)


def same_output(small: Path, big: Path) -> float:
    """The largest difference of a probability between the two targets, along some pictures of the small one."""
    painters = [load_painter(f, "none", length=0, guidance=1.0, dtype="bfloat16") for f in (small, big)]
    tokens = painters[0].raster.prompt("7") + painters[0].draw([("7", 0)])[0].tokens
    from outrider.evaluate.scoring.score import Clock, logits_along

    rows = [torch.cat(list(logits_along(p.engine.parts.target, tokens, 0, Clock()))).softmax(-1) for p in painters]
    return float((rows[0] - rows[1]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--slots", default="1,4", help="pictures drawn together, one number or several")
    parser.add_argument("--length", type=int, default=5)
    parser.add_argument("--guidance", type=float, help="scale of guidance (default: the model's own)")
    parser.add_argument("--work", type=Path, default=Path("runs/images/grown"))
    args = parser.parse_args()
    source = shipped_images()
    target = grow(source, args.work)
    count = sum(t.numel() for t in load_file(target / "model.safetensors").values())
    most = same_output(source, target)
    print(f"{count / 1e6:.0f}M parameters; of the same probabilities up to {most:.4f}; {machine()['cpu']}")
    if most > 0.05:
        raise SystemExit("the grown target is another model: delete its folder, and look at `grown_weights`")
    for slots in map(int, args.slots.split(",")):
        measure(target, source.parent, slots, args)


if __name__ == "__main__":
    main()
