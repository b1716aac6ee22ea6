"""Training an MTP head on the target's last hidden state, through its own outputs (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from outrider.drafters.mtp.network import MtpConfig, MtpNetwork
from outrider.drafters.target_tables import target_tables
from outrider.errors import ConfigError
from outrider.protocols import Target
from outrider.train.methods.base import MethodOptions, Unrolled
from outrider.train.methods.tables import heads_of, init_decoder, inner_of


class Mtp(Unrolled):
    """A head of one layer, trained at every level that it will be chained to: it reads its own outputs already in training."""

    name, reads = "mtp", frozenset({"loss"})

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> nn.Module:
        """One layer of the target's width."""
        return new_head(head_config(options, target), target, options.loop.seed)


def head_config(options: MethodOptions, target: Target) -> MtpConfig:
    """Shapes of a head: as wide as its target, with heads of 32 if that divides it."""
    wide = target.hidden_size
    each = heads_of(wide, (32, 16, 8, 4))
    if not each:
        raise ConfigError(f"the target's width must be a multiple of 4 (the heads of an MTP head), got {wide}")
    heads = wide // each
    return MtpConfig(wide, wide, (target.layers,), target.vocab_size, heads, heads, each, inner_of(wide))


@torch.no_grad()
def new_head(config: MtpConfig, target: Target, seed: int = 0) -> MtpNetwork:
    """A head with the target's tables that begins with the target's own prediction at the position that it reads."""
    torch.manual_seed(seed)
    model = MtpNetwork(config)
    init_decoder(model)
    tables = target_tables(target, "the head")
    tables["target_norm.weight"] = tables.pop("norm.weight")
    model.load_state_dict(tables, strict=False)
    model.fc.weight[:, config.hidden :].copy_(torch.eye(config.hidden))
    model.norm.weight.fill_(float(tables["target_norm.weight"].square().mean().sqrt()))
    return model
