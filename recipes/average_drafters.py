"""Average the weights of two trained drafters of the same sizes, where the second was trained on from the first.

    python recipes/average_drafters.py FIRST SECOND --share 0.7 --out OUT

A drafter that was trained on for some text often loses a little on other text; between the two lies one that keeps most of both
(Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903). Everything but the weights is FIRST's.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from outrider.train.checkpoint import replace_folder


def average(first: Path, second: Path, share: float, out: Path) -> None:
    """Write (1 - share) of the first and `share` of the second, in the first one's types."""
    if not 0 <= share <= 1:
        raise SystemExit(f"--share is that of the second drafter, 0 to 1, got {share}")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
    if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        raise SystemExit(f"{first} and {second} hold other tensors or shapes: train the second with --start {first}")
    built = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.copytree(first, built, ignore=shutil.ignore_patterns("manifest.json", "model.safetensors"))
    mixed = {n: ((1 - share) * t.float() + share * theirs[n].float()).to(t.dtype) for n, t in ours.items()}
    save_file(mixed, built / "model.safetensors")
    replace_folder(built, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of the second, 0 to 1")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    average(given.first, given.second, given.share, given.out)
