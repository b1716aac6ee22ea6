"""Whether a target reads images, and what reads them for it: the processor of its checkpoint, or one that is given."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outrider.errors import CapabilityError, ConfigError
from outrider.files import read_json
from outrider.models.admit import brief
from outrider.models.config import CONFIG_BYTES
from outrider.models.folder import resolve_folder
from outrider.models.packages import broken_torchvision
from outrider.protocols import ImageReader, Target

INSTALL = 'pip install "outrider[images]"'
_FILES = ("preprocessor_config.json", "processor_config.json")


def is_processor(thing: object) -> bool:
    """Whether this is a processor of transformers, with a tokenizer inside, rather than a tokenizer."""
    return hasattr(thing, "image_processor") and hasattr(thing, "tokenizer")


def images_of(target: Target, source: str | Path | Any | None) -> ImageReader | None:
    """What reads images for a target; None if it takes text only. source: its folder or Hub name, or a processor; None: neither.

    Nothing is loaded before the first image.
    """
    if source is None or not getattr(target, "pictured", False):
        return None
    from outrider.models.hf.images import HFImages
    from outrider.models.hf.target import HFTarget

    assert isinstance(target, HFTarget)
    make: Callable[[], Any] = (
        (lambda: processor_of(resolve_folder(source))) if isinstance(source, str | Path) else lambda: source
    )
    return HFImages(target, make)


def processor_of(folder: Path) -> Any:
    """The processor of a checkpoint; runs no code of it. Raises CapabilityError if it cannot be had here."""
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise CapabilityError(
            f"{folder} has no {_FILES[0]}, which says how it reads images: fetch the whole checkpoint"
        )
    for file in found:
        if read_json(file, CONFIG_BYTES).get("auto_map"):
            raise CapabilityError(
                f"{file} names code of its own (auto_map), which Outrider never runs: choose another model"
            )
    if find_spec("PIL") is None:
        raise ConfigError(f"images need Pillow: {INSTALL}")
    try:
        from transformers import AutoProcessor

        made = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # missing packages and damaged files end in errors of many kinds
        missing = find_spec("torchvision") is None
        why = f"torchvision is not installed, and it may need it: {INSTALL}" if missing else broken_torchvision()
        said = f"the processor of {folder} cannot be loaded ({brief(error)})"
        raise CapabilityError(f"{said}; {why}" if why else said) from None
    if not is_processor(made):
        raise CapabilityError(f"{folder} has no processor for images: choose an image-text-to-text model")
    return made
