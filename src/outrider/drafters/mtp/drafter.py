"""From a folder with an MTP head to a drafter: EAGLE's, with the head as its network."""

from __future__ import annotations

from pathlib import Path

from outrider.config_keys import real
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.mtp.format import LAYER, Carried, carried
from outrider.drafters.mtp.forward import BlockForward
from outrider.drafters.mtp.network import MtpConfig, MtpHead, MtpNetwork
from outrider.drafters.spec import DraftSpec
from outrider.protocols import BlockTarget, DecoderBlock, Drafter, Target


def load(folder: Path, target: Target, spec: DraftSpec, target_path: str | None) -> Drafter:
    """The drafter of a folder for `target`, see `registry.LearnedDrafter`: of a model that carries a head, or of a trained one.

    Levels beyond the first come from the same head, which then reads its own output. Raises ConfigError for a folder without a
    head, or with one that cannot be run, CapabilityError for one of another target.
    """
    growth, head = spec.growth(target.vocab_size), carried(folder)
    if head is None or not isinstance(target, BlockTarget):
        return EagleDrafter(MtpNetwork.load(folder, target).to(target.device), growth, name="mtp")
    model, block = _of_target(head, target)
    return EagleDrafter(model, growth, name="mtp", forward=lambda network, _: BlockForward(block, network))


def _of_target(head: Carried, target: BlockTarget) -> tuple[MtpHead, DecoderBlock]:
    """A head whose layer the target runs, as one of its own kind."""
    tensors, wide = head.tensors(), target.hidden_size
    block = target.block_of({n.removeprefix(LAYER): t for n, t in tensors.items() if n.startswith(LAYER)})
    made = MtpConfig(
        hidden=wide, target_hidden=wide, taps=(target.layers,), vocab_size=target.vocab_size, heads=block.kv_heads,
        kv_heads=block.kv_heads, head_dim=block.head_dim, inner=1, eps=real(head.config, "rms_norm_eps", head.folder, 1e-6),
    )  # fmt: skip
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    return MtpHead.filled(made, rest, head.folder, target).to(target.device), block
