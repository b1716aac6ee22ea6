"""Any Hugging Face causal language model as a target, unmodified.

How a model is driven is determined by running it when it is loaded, never by the name of its family:

    path       needs                                          drafts         calls of the model per step
    seam       all attention through transformers' interface  chains, trees  one
    cache      a cache that can be cropped                    chains         one per sequence
    snapshots  a state that it returns and that can be copied chains         one per sequence, or token of later chunks
    recurrent  a state that it returns and takes back         none           one per sequence, or token of later chunks
    recompute  nothing                                        chains         one per sequence, of its whole length

The first path is used whose logits agree with the plain model's on a short sequence, fed in pieces with a wrong draft
token in between (`models.hf.choice`). With transformers 5.16 to 5.24 the result is:

    seam       Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma 2 and 3, Phi, Cohere, OLMo, GPT-2, GPT-BigCode, OPT,
               GPT-NeoX, Qwen-MoE, gpt-oss, DeepSeek-V3, and GPT-J if it attends through the interface
    cache      BLOOM, MPT, Falcon, GPT-Neo, StableLM, Nemotron, Llama 4, Phi-3 beyond its native length
    snapshots  Mamba, Mamba 2, Jamba, LFM2, Qwen3-Next, RWKV, DeepSeek-V4, RecurrentGemma
    recompute  the first GPT
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from outrider.errors import CapabilityError, ConfigError
from outrider.models.admit import fails_to_run, model_class, require_layers
from outrider.models.folder import resolve_folder
from outrider.models.hf.attention_interface import AttentionInterfacePath
from outrider.models.hf.block import HFBlock
from outrider.models.hf.choice import choose, costs, disagreement, tolerance
from outrider.models.hf.direct import call_directly
from outrider.models.hf.entry import given_to
from outrider.models.hf.hooks import HiddenStateHooks, find_blocks, head_only_model, steps_after
from outrider.models.hf.prefix import HFPrefix
from outrider.models.hf.probe import attention_of
from outrider.models.hf.quiet import quietly
from outrider.models.hf.state import brief
from outrider.models.hf.view import View
from outrider.models.places import refuse_extra
from outrider.models.states import SlotCaches
from outrider.mtp_names import head_tensors
from outrider.nn.row_parts import check_prefix
from outrider.protocols import KVCache
from outrider.types import Rows, Scores

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "context_length")
_UNBOUNDED = 1 << 20
_PROBE = 8


def _context(config: Any) -> int | None:
    """The longest sequence a model was built for, in tokens; None if its configuration does not say."""
    found = [int(n) for n in (getattr(config, name, None) for name in _LENGTHS) if isinstance(n, int) and n > 0]
    return found[0] if found else None


class HFTarget:
    """Implements `protocols.Target` over a transformers model, which stays as it was found: mode, gradients, configuration, hooks.

    It is read through a `view.View`: weights that are written later (an optimizer, `load_state_dict`) are used from the next
    forward on; a model that was moved or converted is refused then; modules that are added later (adapters) are not seen.

    path:    how the model is driven (see the module). why: the reason against each path before it, by name.
    trees:   whether forests may be scored. rewinds: whether drafts may be rejected; False: plain decoding only.
    notices: sentences for the user: why it is not faster (the cost of the chosen path), and the remedy.
    text_part: the module that holds the blocks, where they were found.
    layers:  blocks; hidden states are taken before the final norm (0 = what enters the first block).

    weights: a number that changes when the model's weights are written to; caches of others' beginnings hold for one number.

    Raises ConfigError if the model is not a decoder, cannot hold `max_length` tokens, or fails when it is run.
    """

    notices: tuple[str, ...] = ()

    def __init__(self, model: PreTrainedModel, *, max_length: int | None = None, ours: bool = False) -> None:
        """ours: nobody else has the model, so that it need not be left as it is."""
        self._view = None if ours else View(model)
        model = model.eval().requires_grad_(False) if self._view is None else self._view.model
        call_directly(model)
        config = require_layers(model.config, type(model).__name__)
        model.config.return_dict = True  # if it were false, its outputs would be tuples
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{type(model).__name__} is an encoder-decoder: only decoders can be targets")
        named = _context(config)
        context = _UNBOUNDED if named is None else named
        if max_length is not None and not 0 < max_length <= context:
            raise ConfigError(f"max_length {max_length} is outside the model's 1 to {context} positions")
        self.model = model
        self.max_length = context if max_length is None else max_length
        self.dtype, self.device = model.dtype, model.device
        self.layers, self.hidden_size = int(config.num_hidden_layers), int(config.hidden_size)
        self._blocks: nn.ModuleList | None = None
        token = [(7 * i + 3) % int(config.vocab_size) for i in range(_PROBE)]
        try:
            reference = self._watch(token)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise fails_to_run(type(model), _PROBE, error) from error
        self.vocab_size = reference.shape[-1]
        self.serving_path, self.why = choose(self.model, token, reference, 0 if named is None else self.max_length)
        self.path, self.trees, self.rewinds = self.serving_path.name, self.serving_path.trees, self.serving_path.rewinds
        self.notices = costs(type(model).__name__, self.serving_path, self.why)

    @staticmethod
    def load(
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        pictured: bool = False,
    ) -> HFTarget:
        """Load a checkpoint folder or Hub name: safetensors only, no code from the checkpoint.

        dtype: of weights and cache, None for the checkpoint's own. pictured: the whole of a model with a part for images, also
        where transformers has a class for its text alone. Raises ConfigError in one sentence if the checkpoint
        is absent, incomplete, corrupt, pickled, or of a model that transformers does not know.
        """
        name = str(resolve_folder(path))
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"{name} has no config.json: give a folder in Hugging Face format")
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            auto: Any = AutoModelForImageTextToText if pictured else model_class(config)
            with quietly():
                model, info = auto.from_pretrained(
                    name, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
                )
        except Exception as error:  # a wrong configuration may raise any error of its class
            raise ConfigError(
                f"cannot load {name!r} as a causal language model in safetensors: {brief(error)}"
            ) from error
        absent = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
        if absent:
            raise ConfigError(
                f"checkpoint {name!r} lacks {len(absent)} of the model's weights, {absent[0]} first: fetch it again"
            )
        extra, text = set(info["unexpected_keys"]), config.get_text_config(decoder=True)
        refuse_extra(extra - head_tensors(extra, int(getattr(text, "num_hidden_layers", 0))), name)
        return HFTarget(model.to(device), max_length=max_length, ours=True)  # type: ignore[arg-type]

    @property
    def pictured(self) -> bool:
        """Whether the model has a part that reads images."""
        return getattr(self.model.config, "vision_config", None) is not None

    @property
    def weights(self) -> int:
        """Raises CapabilityError for a model that was moved or converted since."""
        return 0 if self._view is None else self._view.weights()

    @property
    def token_bytes(self) -> int:
        """Bytes of a cached token's keys and values; 0 where transformers keeps the cache."""
        path = self.serving_path
        return path.token_bytes(path.layers) if isinstance(path, AttentionInterfacePath) else 0

    def new_kv(self, slots: int, length: int, *, memory: int | None = None) -> KVCache:
        """A cache of `length` tokens a slot; it may exceed `max_length`, which bounds positions: siblings share one.

        memory: bytes that it may take; ConfigError where transformers keeps the cache, which cannot be limited.
        """
        if isinstance(self.serving_path, AttentionInterfacePath):
            return self.serving_path.new_kv(slots, length, memory=memory)
        if memory is not None:
            raise ConfigError(
                f"kv_memory was given, and transformers keeps the cache of {type(self.model).__name__}: leave it out, and lower "
                "max_length or slots"
            )
        return self.serving_path.new_kv(slots, length)

    @torch.no_grad()
    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """See `protocols.Target`. Raises CapabilityError for rows that the model's path cannot score."""
        wrong = [i for i in layers if not 0 <= i <= self.layers]
        if wrong:
            raise CapabilityError(
                f"layer {wrong[0]} was asked for, this model has blocks 1 to {self.layers} (0: embeddings)"
            )
        taps = HiddenStateHooks(self._blocks, layers)
        if rows.given is None:
            logits, hidden = self.serving_path.run(rows, kv, taps)
        else:
            with given_to(self.text_part, rows.given):
                logits, hidden = self.serving_path.run(rows, kv, taps)
        return Scores(_wide(logits), hidden, kv.replayed if isinstance(kv, SlotCaches) else 0)

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        return self.model.get_input_embeddings()(token)

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """Final norm and head, with the family's own scaling of logits; gradients flow to `hidden`."""
        if self._tail is None:
            raise CapabilityError(
                f"the layers after the blocks of {type(self.model).__name__} were not found: use a drafter with its own head"
            )
        return _wide(self._tail(inputs_embeds=hidden[None], use_cache=False).logits[0])

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """The family's layers between its last block and its head."""
        for step in self._steps:
            hidden = step(hidden[None])[0]
        return hidden

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """The head alone, with the family's own scaling of logits."""
        if self._tail is None or self._owner is None:
            raise CapabilityError(f"the head of {type(self.model).__name__} was not found: use another drafter")
        behind = head_only_model(self.model, self._owner, [])
        return _wide(behind(inputs_embeds=normed[None], use_cache=False).logits[0])

    def first_layers(self, layers: int) -> HFPrefix:
        """See `protocols.OpenTarget`. Raises CapabilityError on other paths than `seam`: their caches cannot be partly filled."""
        check_prefix(layers, self.layers)
        if not isinstance(self.serving_path, AttentionInterfacePath) or self._blocks is None or self._tail is None:
            raise CapabilityError(
                f"{type(self.model).__name__} cannot be run in part: use a separate draft model, or 'ngram'"
            )
        return HFPrefix(self, self.serving_path, self._blocks, layers)

    def block_of(self, tensors: Mapping[str, Tensor]) -> HFBlock:
        """See `protocols.BlockTarget`."""
        return HFBlock(self.model, tensors)

    # ----------------------------------------------------------------------------------- determining how to drive it
    @torch.no_grad()
    def _watch(self, token: list[int]) -> Float[Tensor, "P V"]:
        """Logits of the plain model; the same call shows where its hidden states are and what follows its blocks."""
        inputs = torch.tensor([token], device=self.device)
        # some releases of transformers ignore the cap on attention scores in their fused attention
        capped = getattr(self.model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
        faithful = attention_of(self.model, "eager") if capped else nullcontext()
        self._tail: nn.Module | None = None
        self.text_part: nn.Module | None = None
        self._owner: nn.Module | None = None
        self._steps: list[nn.Module] = []
        found = find_blocks(self.model, self.layers, inputs)
        if found is None:
            with faithful:
                return self.model(input_ids=inputs).logits[0]
        owner, blocks = found
        self.text_part = owner
        steps, hooks = steps_after(owner, blocks)
        with faithful, hooks, HiddenStateHooks(blocks, (self.layers,)).listen() as heard:
            reference = self.model(input_ids=inputs).logits[0]
        self._blocks = blocks
        tail = head_only_model(self.model, owner, steps)
        try:
            again = tail(inputs_embeds=heard.states()[0][None], use_cache=False).logits[0]
        except (
            Exception
        ):  # a head that needs other inputs: there is no unembedding, which is reported when it is requested
            return reference
        if again.shape == reference.shape and disagreement(again, reference) <= tolerance(self.dtype):
            self._tail, self._owner, self._steps = tail, owner, steps
        return reference


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
