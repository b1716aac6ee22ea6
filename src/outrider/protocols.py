"""The interfaces of a target, a KV cache, a rule, a drafter, a controller and a sink. No code.

They are runtime-checkable only for the type checks in the tests; the engine never checks the class of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, device, dtype

from outrider.noise import Noise
from outrider.pictured import ImageInput, ImagePrompt, ImageRows
from outrider.records import CacheNeed, StepRecord
from outrider.types import Draft, Evidence, Rows, Scores, SequenceView, Verdict


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids. For decoding, streams of text use `engine.text.Decoder`."""

    def get_vocab(self) -> Mapping[str, int]:
        """String -> id."""
        ...

    def encode(self, text: str) -> Sequence[int]: ...


@runtime_checkable
class KVCache(Protocol):
    """Keys and values of `slots` sequences of up to `capacity` tokens, drafts included. Lengths are host data."""

    length: list[int]
    slots: int
    capacity: int

    def reserve(self, rows: Rows) -> None:
        """Check that the rows fit at the places given by `rows`; raise CapacityError before anything is computed."""
        ...

    def commit(self, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Keep each segment's prefix and, for its nodes, the offsets (0 = its first node) of `paths`; drop the other rows.

        One entry of `paths` per segment. This call is the rollback: kept rows are moved down to be contiguous.
        """
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Drop all but the first `length` tokens of a slot."""
        ...

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        ...

    def erase(self, slot: int) -> None:
        """Overwrite the entries of a broken sequence in its slot."""
        ...


class PagedCache(KVCache, Protocol):
    """A cache in pages, which has room for the tokens that it holds rather than for every slot's whole context."""

    @property
    def spare(self) -> int:
        """Pages that slots can still get."""
        ...

    def lacking(self, slot: int, tokens: int) -> int:
        """Pages that a slot must get before it can hold so many tokens."""
        ...

    def needed(self, tokens: Sequence[int], more: int, root: Hashable = None) -> int:
        """Pages that a sequence of these tokens and `more` others would take."""
        ...


class SharingCache(PagedCache, Protocol):
    """A cache whose sequences use each other's pages where they begin with the same tokens, within one root."""

    def share(self, slot: int, tokens: Sequence[int], root: Hashable = None, step: int = 1) -> int:
        """Give a slot what is known of its next tokens, all but the last of `tokens` at most, to a multiple of `step`; the tokens
        that it has then."""
        ...

    def publish(self, slot: int, tokens: Sequence[int], root: Hashable = None) -> None:
        """Make the full pages of a slot known by their tokens."""
        ...


@runtime_checkable
class Target(Protocol):
    """A causal language model that scores flat rows.

    trees: rows may be siblings. views (if it has the attribute): segments may see a part of the cache (`types.Segment.view`).
    rewinds: rows may be dropped again (False for states that can neither be cut nor copied: plain decoding only).
    notices: sentences for users about how it was loaded (why it is not faster, and the remedy).
    A target may say that forwards of up to `uniform_rows` rows per segment give every row the same bits whatever is fed with it;
    then sequences share their beginnings to the token, else by whole prompt chunks. One whose weights may be written to while it is
    used has `weights`, a number that differs afterwards: beginnings are shared between texts of one number only.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    max_length: int
    trees: bool
    rewinds: bool
    notices: tuple[str, ...]
    dtype: dtype
    device: device

    def new_kv(self, slots: int, length: int) -> KVCache:
        """A cache for `slots` sequences of `length` tokens each."""
        ...

    def forward(self, rows: Rows, kv: KVCache, *, layers: tuple[int, ...] = ()) -> Scores:
        """Score `rows`: write their keys and values after the cached tokens (without committing them) and return logits of
        `rows.scored` in float32 (float64 if the model is), and the hidden states of all rows after each of `layers`
        (0 = the embeddings, i = after block i)."""
        ...

    def embed(self, token: Int[Tensor, "n"]) -> Float[Tensor, "n H"]:
        """Input embeddings."""
        ...

    def unembed(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """Final norm and output head."""
        ...


@runtime_checkable
class ImageReader(Protocol):
    """Images in prompts, for targets that read them."""

    def mark(self) -> str:
        """What stands in a text for an image."""
        ...

    def read(self, text: str, images: Sequence[Any], special: bool | None = None) -> ImagePrompt:
        """A prompt, by the model's own processor: `text` has one mark for each of `images` (pictures of Pillow, paths, or bytes of
        files). special: let the tokenizer add its special tokens; None: unless the text begins with one. Any thread may call it.
        Raises RequestError for what is no image, or does not fit the text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ImagePrompt:
        """A prompt of a conversation, by the model's own template; parts {"type": "image", "image": ...} are images."""
        ...

    def prove(self) -> None:
        """Try a small image, once, before the first prompt does. Raises CapabilityError if the target would not read it exactly."""
        ...

    def rows(self, image: ImageInput) -> ImageRows:
        """What the target has for an image. It runs the model where the image is new, so only between two steps."""
        ...


@runtime_checkable
class OpenTarget(Target, Protocol):
    """A target whose parts can be used separately, for drafters made from the target itself."""

    def first_layers(self, layers: int) -> Target:
        """The first `layers` blocks (1 .. all) with the same final norm and head: a model that shares every weight and has its
        own caches. Raises CapabilityError if that is not possible."""
        ...

    def norm(self, hidden: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
        """Final norm: from hidden states after the last block to the head's input."""
        ...

    def head(self, normed: Float[Tensor, "n H"]) -> Float[Tensor, "n V"]:
        """The output head alone: unembed(x) = head(norm(x))."""
        ...


Attend = Callable[[Float[Tensor, "n h d"], Float[Tensor, "n g d"], Float[Tensor, "n g d"], float], Float[Tensor, "n A"]]
"""What rows see, for a layer that does not know it: rotated queries and keys, values, scale -> all heads, side by side."""


@runtime_checkable
class DecoderBlock(Protocol):
    """A decoder layer. kv_heads, head_dim: of the keys and values that it hands to its attention. dtype: of what it takes and
    gives."""

    kv_heads: int
    head_dim: int
    dtype: dtype

    def __call__(self, x: Float[Tensor, "n H"], position: Int[Tensor, "n"], attend: Attend) -> Float[Tensor, "n H"]: ...


@runtime_checkable
class BlockTarget(Target, Protocol):
    """A target that can run a further decoder layer of its own kind, such as that of an MTP head."""

    def block_of(self, tensors: Mapping[str, Tensor]) -> DecoderBlock:
        """The layer with these tensors, named as behind `model.layers.0.` in checkpoints of its family. Raises ConfigError for
        tensors that are not those of such a layer, CapabilityError if it cannot be run alone."""
        ...


@runtime_checkable
class Rule(Protocol):
    """Accepts or rejects drafts. A pure function: no rows, no cache, no model.

    lossless: whether it keeps the target distribution. trees: whether it can verify trees. lane: the noise a coupled drafter draws
    with. tv_limit: total variation it may spend on a sequence in all, 0 for a lossless rule.
    A rule whose decision about a node looks at the drafts below it says so: `reads_below = True`. Drafters that draw with noise
    keyed by absolute place (`keyed = True`) do not fit it, for they draw a place again that such a decision has looked at.
    """

    name: str
    lossless: bool
    trees: bool
    lane: str
    tv_limit: float

    def __call__(
        self, p: Float[Tensor, "M V"], draft: Draft, noise: Noise, allowance: Sequence[float] | None = None
    ) -> Verdict:
        """p: target distributions, B anchor rows then K node rows. allowance: what each sequence may still spend of `tv_limit`."""
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes draft tokens: a deterministic function of the evidence since a slot was last released, and of noise."""

    name: str
    layers: tuple[int, ...]
    max_nodes: int
    max_depth: int
    trees: bool

    def bind(self, slots: int, length: int) -> None:
        """Allocate memory for `slots` sequences of `length` tokens; called once, when the engine is built."""
        ...

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        """One tree per sequence of the evidence, with at most `budget[i]` levels; with budget 0 the drafter only catches up."""
        ...

    def release(self, slots: Sequence[int]) -> None:
        """Clear these slots."""
        ...


@runtime_checkable
class Borrower(Protocol):
    """A drafter that looks into the target's own cache. It may write behind a sequence's committed tokens while it drafts, and
    leaves their number as it was."""

    def borrow(self, kv: KVCache) -> None:
        """Called once, when the engine is built, before the first draft."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """A drafter with a cache of its own, which counts against the engine's memory for keys and values."""

    def cache_need(self, slots: int, length: int) -> CacheNeed:
        """What caches for `slots` sequences of `length` tokens take."""
        ...

    def keep_within(self, tokens: int) -> None:
        """Called before `bind`, if memory is limited: its pages may hold so many tokens, whatever sequences they are of."""
        ...


@runtime_checkable
class Controller(Protocol):
    """Sets the draft length of each sequence for the next step. Sees counters, never tokens."""

    def budget(self, sequences: Sequence[SequenceView]) -> list[int]: ...

    def observe(self, record: StepRecord) -> None: ...


@runtime_checkable
class Sink(Protocol):
    """Receives one record per step."""

    def __call__(self, record: StepRecord) -> None: ...
