"""The forward of a head whose decoder layer is of its target's own kind and is run by the target (latent attention, experts)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from outrider.drafters.eagle.forward import attend_rows, tapped
from outrider.drafters.mtp.network import MtpHead
from outrider.nn.drafts import Rows
from outrider.nn.row_cache import RowCache
from outrider.protocols import DecoderBlock


class BlockForward:
    """Implements `eagle.forward.Forward`. block: the layer; the rest of the head is computed in the model's type."""

    def __init__(self, block: DecoderBlock, model: MtpHead) -> None:
        self.model, self.block, self.dtype, self.logits = model, block, block.dtype, model.logits

    def forward(
        self,
        rows: Rows,
        cache: RowCache,
        *,
        taps: Sequence[Tensor] = (),
        tap_rows: Sequence[int] = (),
        feature: Float[Tensor, "n D"] | None = None,
    ) -> tuple[Float[Tensor, "n D"], Float[Tensor, "m V"]]:
        model, wide = self.model, self.model.fc.weight
        if feature is None:
            feature = model.read(tapped(taps, tap_rows).to(wide.dtype))
        token, position = (torch.tensor(part, device=wide.device) for part in (rows.token, rows.position))
        x, _ = model.join(model.rows(token), feature)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return attend_rows(rows, cache, q, k, v, scale)

        state = self.block(x.to(self.dtype), position, attend).to(wide.dtype)
        return state, model.logits(state[list(rows.scored)])
