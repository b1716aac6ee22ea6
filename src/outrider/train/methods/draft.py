"""Training a draft model: a small language model over the target's tokens, which reads only the text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from outrider.drafters.target_tables import embeddings
from outrider.models.tokenizer import whole_tokenizer
from outrider.protocols import Target
from outrider.train.causal_lm import CausalLM
from outrider.train.checkpoint import write_model
from outrider.train.distill import HeadRows, Logits, Teacher, loss_of
from outrider.train.features import Features
from outrider.train.loop import Batch, LossOf
from outrider.train.methods.base import Method, MethodOptions
from outrider.train.methods.tables import narrow


class DraftModel(Method):
    """A separate language model; `blocks` are its layers."""

    name, reads = "draft", frozenset({"blocks", "width", "loss"})

    def new_model(self, options: MethodOptions, target: Target, seen: Float[Tensor, "n T H"]) -> CausalLM:
        """A fresh language model over the target's tokens; its context is the target's."""
        # transformers' classes take seconds to import, and the other methods do not need them
        from outrider.models.hf.fresh import small_llama

        tokenizer = whole_tokenizer(options.target)
        ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in ("pad", "bos", "eos")}
        width = options.width or max(32, target.hidden_size // 64 * 32)
        length = min(target.max_length, 1 << 17)
        model = small_llama(target.vocab_size, width, options.blocks, length, seed=options.loop.seed, **ids)
        return new_draft(model, target)

    def predict(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> list[Logits]:
        """It reads the accepted tokens, so its distribution at a position is the same at every level."""
        logits = model(input_ids=tokens, use_cache=False).logits
        return [logits[:, d + 1 :] for d in range(levels)]

    def scored(
        self, model: Any, tokens: Int[Tensor, "r L"], taps: Float[Tensor, "r L T H"], levels: int
    ) -> HeadRows | None:
        """The last hidden states."""
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return HeadRows([states[:, d + 1 :] for d in range(levels)], model.get_output_embeddings().weight)

    def fit_inputs(
        self, options: MethodOptions, judge: Teacher, model: nn.Module, training: Features
    ) -> tuple[Callable[[int], Batch], LossOf]:
        """One level: all levels of a language model are its next-token distribution."""
        return training, loss_of(judge, self.predictor(1), options.loss, partial(self.scored, levels=1))

    def save(self, model: Any, options: MethodOptions, folder: Path) -> None:
        """A transformers folder with the target's tokenizer."""
        write_model(model, whole_tokenizer(options.target), folder)


@torch.no_grad()
def new_draft(model: CausalLM, target: Target) -> CausalLM:
    """`model` with the target's token table, projected to its width: the similarity of tokens need not be learned."""
    model.get_input_embeddings().weight.copy_(narrow(embeddings(target), model.config.hidden_size))
    return model
