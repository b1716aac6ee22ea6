"""The target's logits on training text, computed once and kept on disk, so that a draft can be trained on them several times.

A forward of the target costs many times a step of the draft. With labels on disk the target runs once per token and the
draft's passes are cheap. float16 holds a logit to three digits, which is more than training needs; a token takes ``2 V``
bytes, so this is for small vocabularies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from outrider.errors import ConfigError
from outrider.train.causal_lm import CausalLM


@dataclass(frozen=True)
class Labels:
    """Windows of tokens and the target's logits on them, as batches addressed by step number."""

    tokens: torch.Tensor  # [M, L + 1] token ids
    logits: np.ndarray  # [M, L, V] float16, memory-mapped
    rows: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Whole batches in one pass."""
        return len(self.tokens) // self.rows

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch of step ``step``: tokens ``[rows, L + 1]`` and target logits ``[rows, L, V] float32``."""
        epoch, index = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.tokens))
        chosen = np.sort(order[index * self.rows : (index + 1) * self.rows])
        return self.tokens[chosen], torch.from_numpy(self.logits[chosen].astype(np.float32))


def write_labels(target: CausalLM, tokens: torch.Tensor, folder: Path, rows: int = 4, report=print) -> None:
    """Write the logits of ``target`` on ``tokens [M, L + 1]``; continues after the windows that are already on disk.

    The progress file is written after the rows it counts are flushed, so a kill costs at most one batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(tokens), tokens.shape[1] - 1, target.config.vocab_size)
    path, progress = folder / "logits.npy", folder / "done"
    done, writer = int(progress.read_text()) if progress.exists() else 0, folder / "target"
    if done and not np.array_equal(np.load(folder / "tokens.npy", allow_pickle=False), tokens.numpy()):
        raise ConfigError(f"{folder} holds labels of other text; use a new folder")
    if done and not (writer.exists() and writer.read_text() == weights_of(target)):
        raise ConfigError(f"{folder} holds labels of another target; use a new folder")
    if not done:
        writer.write_text(weights_of(target))
        np.save(folder / "tokens.npy", tokens.numpy(), allow_pickle=False)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape).flush()
    logits = np.lib.format.open_memmap(path, mode="r+")
    with torch.no_grad():
        for first in range(done, len(tokens), rows):
            part = tokens[first : first + rows, :-1]
            found = target(input_ids=part, use_cache=False).logits.half()
            if not bool(torch.isfinite(found).all()):
                raise ConfigError("a logit does not fit into float16: use a target of a smaller range")
            logits[first : first + rows] = found.numpy()
            if first // rows % 16 == 15 or first + rows >= len(tokens):
                logits.flush()
                progress.write_text(str(min(first + rows, len(tokens))))
                report(f"labels: {min(first + rows, len(tokens))}/{len(tokens)} windows")


def weights_of(model: CausalLM) -> str:
    """The identity of a model: a digest of all its weights."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_labels(folder: Path, rows: int, seed: int) -> Labels:
    """Finished labels of ``folder``."""
    tokens = torch.from_numpy(np.load(folder / "tokens.npy", allow_pickle=False))
    if int((folder / "done").read_text()) != len(tokens):
        raise ConfigError(f"{folder}: labels are not finished")
    return Labels(tokens, np.load(folder / "logits.npy", mmap_mode="r", allow_pickle=False), rows, seed)
