"""A small image, read by the model alone and by rows in chunks: a target that does not read images exactly is found before it is
used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from outrider.errors import CapabilityError
from outrider.models.hf.choice import disagreement, tolerance
from outrider.models.hf.entry import failing_as
from outrider.models.hf.target import HFTarget
from outrider.pictured import ImagePrompt, Pictured
from outrider.pictured_rows import with_images
from outrider.types import Draft, Rows

DRAFTED = 3
"""The last tokens of the trial: fed as drafts, after two chunks."""


@torch.no_grad()
def try_image(target: HFTarget, prompt: ImagePrompt, pictured: Pictured, tensors: Mapping[str, Any]) -> None:
    """Raise CapabilityError unless rows of `prompt` have the logits that the model gives the same prompt as its processor makes it,
    `tensors`."""
    kind = type(target.model).__name__
    with failing_as(f"{kind} fails on a small image", "choose another model for images"):
        reference = target.model(**tensors, use_cache=False).logits[0].float()
    end = len(prompt) - DRAFTED
    middle = min(pictured.whole(max(1, pictured.starts[0] + 2)), end - 1)
    kv, found, rows_of = target.new_kv(1, len(prompt) + 1), list[Tensor](), list[int]()
    for first, last in ((0, middle), (middle, end)):
        drafted = prompt[end:] if last == end else []
        draft = Draft.join([(drafted, tuple(range(-1, len(drafted) - 1)))], device=target.device)
        rows = with_images(Rows.assemble([0], [prompt[first:last]], [first], draft), [pictured])
        kv.reserve(rows)
        found.append(target.forward(rows, kv).logits)
        rows_of += range(last - 1, last + len(drafted))
        kv.commit(rows, [range(len(drafted))])
    far = disagreement(torch.cat(found), reference[rows_of])
    if far > tolerance(target.dtype):
        raise CapabilityError(
            f"{kind} reads an image differently in chunks than at once (its logits differ by {far:.1e} of their spread), which is "
            "not supported: choose another model for images"
        )
