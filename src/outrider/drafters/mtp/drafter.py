"""From a folder with an MTP head to a drafter: EAGLE's, with the head as its network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from outrider.config_keys import real
from outrider.drafters.eagle.drafter import EagleDrafter, ForwardOf
from outrider.drafters.eagle.forward import forward_of
from outrider.drafters.mtp.format import LAYER, Carried, carried
from outrider.drafters.mtp.forward import BlockForward
from outrider.drafters.mtp.network import MtpConfig, MtpHead, MtpNetwork
from outrider.drafters.mtp.stack import HeadStack
from outrider.drafters.spec import DraftSpec
from outrider.protocols import BlockTarget, DecoderBlock, Drafter, Target


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`: of a model that carries heads, or of a trained one.

    Of several heads each drafts its level; levels beyond the last come from that one, which then reads its own output. Raises
    ConfigError for a folder without a head, or with one that cannot be run, CapabilityError for one of another target.
    """
    growth, found = spec.growth(target.vocab_size), carried(folder)
    depth = 1 if found is None else min(found.depth, growth.depth)
    heads = [_head(folder, found, target, n, spec) for n in range(max(1, depth))]
    if len(heads) > 1:
        return HeadStack(heads, growth)
    return EagleDrafter(heads[0][0], growth, name="mtp", forward=heads[0][1])


def _head(
    folder: Path, found: Carried | None, target: Target, number: int, spec: DraftSpec
) -> tuple[MtpHead, ForwardOf]:
    """A head, and what makes its forward."""
    if found is None or not isinstance(target, BlockTarget):
        made = MtpNetwork.load(folder, target, number).to(target.device)
        return made, partial(forward_of, rounding=spec.rounding_for(made.fc.weight, fits=made.shape.fits))
    model, block = _of_target(found, target, number)
    return model, lambda network, _: BlockForward(block, network)


def _of_target(found: Carried, target: BlockTarget, number: int) -> tuple[MtpHead, DecoderBlock]:
    """A head whose layer the target runs, as one of its own kind."""
    tensors, wide = found.tensors(number), target.hidden_size
    block = target.block_of({n.removeprefix(LAYER): t for n, t in tensors.items() if n.startswith(LAYER)})
    made = MtpConfig(
        hidden=wide, target_hidden=wide, taps=(target.layers,), vocab_size=target.vocab_size, heads=block.kv_heads,
        kv_heads=block.kv_heads, head_dim=block.head_dim, inner=1, eps=real(found.config, "rms_norm_eps", found.folder, 1e-6),
    )  # fmt: skip
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    return MtpHead.filled(made, rest, found.folder, target).to(target.device), block
