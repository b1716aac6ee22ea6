"""Sequential heads (Hydra: Ankner et al. 2024, arXiv 2402.05109): Medusa's, but each sees the tokens above its own.

The first reads hidden states of the target and the token that was decided behind them; each further one reads what the one before
made, and the token that was drafted from that. All are one network, as in vLLM's MLP speculators (arXiv 2404.19124), so a draft may
be deeper than the levels of the training. There is no attention and no cache: a level is a few products with one row.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.checkpoint import check_fits, fill, read_folder, write_folder
from outrider.drafters.medusa.format import SequentialConfig, read_sequential
from outrider.drafters.target_tables import embeddings
from outrider.errors import ConfigError
from outrider.nn.layers import Mlp
from outrider.protocols import Target

TABLE = "embed_tokens.weight"
"""The target's own embeddings: taken from the target and never written."""


class Block(nn.Module):
    """x + mlp(norm(x)): the second half of a decoder layer."""

    def __init__(self, c: SequentialConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(c.width, c.eps)
        self.mlp = Mlp(c.width, c.inner)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return x + self.mlp(self.norm(x))


class SequentialNetwork(nn.Module):
    """s_0 = fc(h), s_l = r(s_(l-1) + token(e)), logits_l = lm_head(norm(s_l)).

    h: hidden states of the blocks `config.taps` at the last kept row, side by side. e: the target's embedding of the token of level
    l - 1 (level 0: the one decided behind that row), divided by its size. r: residual blocks.
    """

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.embed_tokens.requires_grad_(False)
        self.fc = nn.Linear(len(c.taps) * c.hidden, c.width, bias=False)
        self.token = nn.Linear(c.hidden, c.width, bias=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.eps)
        self.lm_head = nn.Linear(c.width, c.vocab_size, bias=False)

    def read(self, taps: Float[Tensor, "*n K H"]) -> Float[Tensor, "*n D"]:
        """What the first head reads of the target's hidden states."""
        return self.fc(taps.flatten(-2))

    def rows(self, token: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """What a head reads of a token; it depends on the token alone, so serving keeps it for the whole vocabulary."""
        return self.token(F.rms_norm(self.embed_tokens(token), (self.config.hidden,), eps=self.config.eps))

    def level(self, row: Float[Tensor, "*n D"], state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        """The state of a level from its token's row and the state before."""
        x = state + row
        for block in self.layers:
            x = block(x)
        return x

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n V"]:
        """Logits behind a level's token."""
        return self.lm_head(self.norm(state))

    def states(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r t K H"], steps: int
    ) -> list[Float[Tensor, "r t D"]]:
        """States of `steps` levels at every position, t <= L - steps; each level reads the text's own token."""
        rows, state, length = self.rows(tokens), self.read(taps), taps.shape[1]
        out = []
        for s in range(1, steps + 1):
            state = self.level(rows[:, s : s + length], state)
            out.append(state)
        return out

    def unroll(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r t K H"], steps: int
    ) -> list[Float[Tensor, "r t V"]]:
        """Logits of `states`: entry s, column i is the draft distribution of token i + s + 2 after tokens 0 .. i + s + 1, with
        hidden states at i alone."""
        return [self.logits(state) for state in self.states(tokens, taps, steps)]

    def unrolled(
        self, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r t K H"], steps: int
    ) -> tuple[list[Float[Tensor, "r t D"]], Float[Tensor, "V D"]]:
        """What `unroll`'s logits are made of: rows, and the matrix they meet."""
        return [self.norm(state) for state in self.states(tokens, taps, steps)], self.lm_head.weight

    # ------------------------------------------------------------------ folders
    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (bfloat16), without the target's table."""
        c = self.config
        write_folder(
            folder,
            {
                "architectures": ["SequentialMedusaModel"],
                "model_type": "medusa",
                "sequential": True,
                "hidden_size": c.hidden,
                "vocab_size": c.vocab_size,
                "width": c.width,
                "intermediate_size": c.inner,
                "num_hidden_layers": c.layers,
                "hidden_act": "silu",
                "rms_norm_eps": c.eps,
                "target_layers": list(c.taps),
            },
            {name: value.bfloat16() for name, value in self.state_dict().items() if name != TABLE},
        )

    @classmethod
    def load(cls, folder: Path, target: Target) -> SequentialNetwork:
        """The heads in a folder, for `target`.

        Raises ConfigError for another kind of folder and for one with a table of its own, CapabilityError for heads of a target
        of other sizes.
        """
        config, tensors = read_folder(folder, "medusa")
        made = read_sequential(config, folder)
        check_fits(folder, target, hidden=made.hidden, vocab_size=made.vocab_size, layers=made.taps)
        if TABLE in tensors:
            raise ConfigError(
                f"{folder} holds {TABLE}, and sequential heads read their target's own: they were made for another reader, or "
                "trained with a table of their own"
            )
        with torch.device("meta"):
            model = cls(made)
        return fill(model, tensors | {TABLE: embeddings(target).cpu()}, folder)
