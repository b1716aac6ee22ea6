"""Checkpoints that survive a power failure: written to a temporary folder, synced, renamed, and hashed.

Layout of a run folder::

    runs/target/step-00000400/model.safetensors       one safetensors file per group of tensors
                              optimizer.safetensors
                              state.json              plain numbers: step, tokens seen, config
                              manifest.json           sha256 of every other file

A folder named ``step-*`` is complete by construction, because the rename is the last thing that happens; the hashes
detect later damage (a truncated copy, a bad disk). No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from outrider.files import sha256_of, sync
from outrider.models.hf.quiet import quietly
from outrider.train.causal_lm import CausalLM

MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint is missing files, or their contents differ from what was written."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """One verified checkpoint: groups of named tensors and their plain state."""

    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict


def replace_folder(built: Path, final: Path) -> None:
    """Replace the folder ``final`` with the finished folder ``built``; both are in the same parent folder.

    A folder cannot be renamed over a non-empty one, so an old ``final`` is first moved aside. Between the two renames
    ``final`` is missing for some microseconds; it is never half-written.
    """
    manifest = {p.relative_to(built).as_posix(): sha256_of(p) for p in sorted(built.rglob("*")) if p.is_file()}
    (built / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in built.rglob("*"):
        sync(path)
    sync(built)
    old = final.with_name(f".old-{final.name}-{os.getpid()}")
    if final.exists():
        final.rename(old)
    built.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: dict, keep: int = 2
) -> Path:
    """Write ``folder/step-XXXXXXXX`` atomically and delete all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    built = folder / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir()
    for group, named in tensors.items():
        # .clone(): tied weights share storage, which safetensors refuses to write.
        save_file({k: v.detach().contiguous().clone() for k, v in named.items()}, built / f"{group}.safetensors")
    (built / STATE).write_text(json.dumps(state | {"step": step}, indent=1) + "\n")
    replace_folder(built, final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run folder, oldest first."""
    return sorted(folder.glob("step-*")) if folder.exists() else []


def verify(path: Path) -> None:
    """Raise CheckpointError unless every file has the hash in the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        wrong = [name for name, digest in manifest.items() if sha256_of(path / name) != digest]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if wrong:
        raise CheckpointError(f"{path}: contents of {', '.join(wrong)} differ from the manifest")


def load_checkpoint(path: Path) -> TrainState:
    """Verify and read one checkpoint."""
    verify(path)
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return TrainState(path=path, tensors=tensors, state=json.loads((path / STATE).read_text()))


def load_latest(folder: Path) -> TrainState | None:
    """The newest valid checkpoint; None if there is no checkpoint at all.

    A corrupt one is skipped with a warning. If checkpoints exist and all are corrupt this raises: starting again without
    a message would overwrite them.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    if found:
        raise CheckpointError(f"{folder}: all {len(found)} checkpoints are corrupt; move them away to start over")
    return None


def export_model(model: CausalLM, tokenizer, folder: Path) -> None:
    """Write a transformers folder (bfloat16 safetensors, configs, tokenizer) in place of ``folder``, atomically.

    tokenizer: None for a model whose tokens are no text."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    built = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(built, ignore_errors=True)
    write_model(model, tokenizer, built)
    replace_folder(built, folder)


def write_model(model: CausalLM, tokenizer, folder: Path) -> None:
    """Write the files of `export_model`."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = type(model)(model.config).to(torch.bfloat16)  # the caller's float32 weights are not touched
    copy.load_state_dict(weights)
    with quietly():
        copy.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which an installed package must not have
