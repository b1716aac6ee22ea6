"""Chooses how a Hugging Face model is driven: the first path that gives the plain model's logits on a short text, in the engine's
way of calling it, with a wrong draft token in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from outrider.errors import CapabilityError
from outrider.models.admit import not_a_decoder
from outrider.models.hf.attention_interface import AttentionInterfacePath
from outrider.models.hf.cache import BentPath, CachePath, RecomputePath, RecurrentPath, SnapshotPath, find_growing
from outrider.models.hf.hooks import HiddenStateHooks
from outrider.models.hf.probe import AttentionInterfaceUnsupported, Bend, find_bend
from outrider.models.hf.state import Handover, brief, croppable, find_handover
from outrider.protocols import KVCache
from outrider.types import Draft, Rows

Plan = tuple[tuple[tuple[int, int, bool], ...], list[int]]
"""Steps of a rehearsal, and the rows of the text whose logits they give."""


@runtime_checkable
class Drive(Protocol):
    """A way of driving a model. trees: rows may be siblings. rewinds: rows may be forgotten again."""

    name: str
    trees: bool
    rewinds: bool

    def new_kv(self, slots: int, length: int) -> KVCache: ...

    def run(self, rows: Rows, kv: KVCache, taps: HiddenStateHooks) -> tuple[Tensor, tuple[Tensor, ...]]: ...


# A rehearsal: per step how many tokens go in as prefix, how many as drafts, and whether one wrong draft follows them.
DRAFTED: Plan = ((4, 1, True), (1, 2, False)), [3, 4, 5, 6, 7]
REJECTED: Plan = ((3, 0, False), (1, 0, True), (1, 1, True), (1, 1, False)), [2, 3, 4, 5, 6, 7]
"""Most of its rows come after the first rejection: the typical row shows it if that was not undone."""
FOLLOWED: Plan = ((4, 3, True),), [3, 4, 5, 6]
"""Every row is followed by a token that is not the text's: it must not show."""
PLAIN: Plan = ((4, 0, False), (3, 0, False), (1, 0, False)), [3, 6, 7]


def choose(
    model: PreTrainedModel, token: Sequence[int], reference: Float[Tensor, "P V"], length: int
) -> tuple[Drive, dict[str, str]]:
    """The best path for texts of up to `length` tokens (0: not known), and the reason against each better one.

    reference: logits of `token`.
    """
    why: dict[str, str] = {}
    limit = tolerance(model.dtype)
    bend = _bend(model, token, length)

    def handover(*makers: Callable[[], Any]) -> Handover:
        return find_handover(model, token, _agrees(reference, limit), makers)

    def cache() -> CachePath:
        way = handover(croppable)
        return BentPath(model, way, bend.limit) if bend and bend.once else CachePath(model, way)

    drafting: tuple[tuple[str, Callable[[], Drive]], ...] = (
        ("seam", lambda: AttentionInterfacePath(model, token, bend)),
        ("cache", cache),
    )
    for name, make in drafting:
        trial = rehearse(make, token, reference, DRAFTED, limit)
        if trial.path is not None:
            return trial.path, why
        why[name] = trial.fault
    # token by token is correct for every state; pieces are faster, but some models lose their state with them
    try:
        way = handover(lambda: None, lambda: DynamicCache(config=model.config))
    except CapabilityError as failure:
        return _recompute(model, token, reference, limit), why | {"recurrent": str(failure)}
    careful = rehearse(lambda: RecurrentPath(model, way, True), token, reference, PLAIN, limit)
    quick = rehearse(lambda: RecurrentPath(model, way, False), token, reference, PLAIN, limit)
    if careful.path is None:
        return _recompute(model, token, reference, limit), why | {"recurrent": careful.fault}
    alike = quick.path is not None and quick.error <= 2 * careful.error + 1e-4
    plain = quick.path if quick.path is not None and alike else careful.path

    def snapshots() -> Drive:
        inputs = torch.tensor(list(token), device=model.device)
        return SnapshotPath(model, way, plain is careful.path, find_growing(model, way, inputs))

    for plan in (DRAFTED, REJECTED):
        trial = rehearse(snapshots, token, reference, plan, limit)
        if trial.path is None:
            return plain, why | {"snapshots": trial.fault}
    return trial.path, why


def _recompute(model: PreTrainedModel, token: Sequence[int], reference: Float[Tensor, "P V"], limit: float) -> Drive:
    """The path that is correct for every model whose rows do not see what follows them."""
    for plan in (PLAIN, FOLLOWED):  # nor what follows them, nor how much
        trial = rehearse(lambda: RecomputePath(model), token, reference, plan, limit)
        if trial.path is None:
            raise not_a_decoder(type(model).__name__)
    return trial.path


def costs(model: str, path: Drive, why: dict[str, str]) -> tuple[str, ...]:
    """The cost of the path, its reason and the remedy, as sentences for the user; none for the fastest path."""
    if isinstance(path, RecomputePath):
        return (
            f"{model} runs on transformers by recomputing the whole text at every step, whose time grows with its length, because "
            f"{why['recurrent']}: keep texts short, or use a model with a cache",
        )
    if isinstance(path, SnapshotPath) and path.by_token:
        return (
            f"{model} reads one token a call once its text has begun, so that a draft saves no time, and prompts beyond the first "
            "chunk are slow: raise chunk, and for speculation use another model",
        )
    if isinstance(path, SnapshotPath):
        return (
            f"{model} is called once per sequence and step and takes chains of drafts only, because its state cannot be cut: after "
            "a rejection the accepted tokens are read again with the next draft, so use short drafts and few slots",
        )
    if isinstance(path, RecurrentPath):
        slow = ", and prompts beyond the first chunk token by token: raise chunk" if path.by_token else ""
        return (
            f"{model} is decoded without drafts, because its state cannot be rewound{slow}; "
            "for speculation use a model with a cache of keys and values",
        )
    if isinstance(path, CachePath):
        remedy = f"set max_length to at most {path.limit}" if isinstance(path, BentPath) else "use few slots"
        return (
            f"{model} is called once per sequence and step and takes chains of drafts only (many sequences at a time are slower), "
            f"because {why['seam']}: {remedy}",
        )
    return ()


def handover_of(model: PreTrainedModel) -> Handover:
    """How this model passes on a cache of any number of tokens; CapabilityError if it has none."""
    token = list(range(1, 9))
    with torch.no_grad():
        reference = model(input_ids=torch.tensor([token], device=model.device)).logits[0]
    return find_handover(model, token, _agrees(reference, tolerance(model.dtype)), [croppable])


def _agrees(reference: Float[Tensor, "P V"], limit: float) -> Callable[[Tensor, int], bool]:
    return lambda logits, at: disagreement(logits, reference[at : at + 1]) <= limit


def _bend(model: PreTrainedModel, token: Sequence[int], length: int) -> Bend | None:
    try:
        return find_bend(model, token, length)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # without the attention interface a model may raise anything: then it handles positions itself
        return None


@dataclass(frozen=True, slots=True)
class PathProbe:
    """A path and its deviation if the rehearsal succeeded; otherwise no path, and the reason in a few words."""

    path: Drive | None
    error: float
    fault: str


def rehearse(
    make: Callable[[], Drive],
    token: Sequence[int],
    reference: Float[Tensor, "P V"],
    plan: Plan,
    limit: float,
) -> PathProbe:
    """One trial of the path that `make` makes; a disagreement above `limit` is a fault."""
    steps, rows = plan
    try:
        path = make()
        error = disagreement(_play(path, token, steps, reference.device), reference[rows])
    except torch.OutOfMemoryError:
        raise
    except (AttentionInterfaceUnsupported, CapabilityError) as reason:
        return PathProbe(None, float("inf"), brief(reason))
    except Exception as failure:  # a model may raise anything for an unsupported kind of call: this path does not fit
        return PathProbe(None, float("inf"), f"it fails when driven that way ({brief(failure)})")
    if error > limit:
        return PathProbe(None, error, f"its logits differ by {error:.1e} of their spread")
    return PathProbe(path, error, "")


@torch.no_grad()
def _play(path: Drive, token: Sequence[int], plan: Sequence[tuple[int, int, bool]], device: torch.device) -> Tensor:
    """Logits of the right tokens. It runs in slot 1 of 2: a path that mixes up slots does not pass."""
    kv, at, out = path.new_kv(2, len(token) + 1), 0, []
    for prefix, drafted, wrong in plan:
        right = list(token[at : at + prefix + drafted])
        nodes = right[prefix:] + [token[0]] * wrong
        parents = tuple(range(-1, len(nodes) - 1))
        draft = Draft(torch.tensor(nodes, dtype=torch.int64, device=device), parents, (len(nodes),))
        rows = Rows.assemble([1], [right[:prefix]], [at], draft)
        kv.reserve(rows)
        out.append(path.run(rows, kv, HiddenStateHooks(None, ()))[0][: 1 + drafted])
        kv.commit(rows, [range(drafted)])
        at += prefix + drafted
    return torch.cat(out)


def disagreement(logits: Float[Tensor, "n V"], reference: Float[Tensor, "n V"]) -> float:
    """Largest difference in the typical row, as a share of the logits' spread.

    The median row, because in half precision a mixture of experts may route a single row elsewhere.
    """
    worst = (logits.double() - reference.double()).abs().amax(-1)
    return float(worst.median() / reference.double().std().clamp(min=1e-12))


def tolerance(dtype: torch.dtype) -> float:
    """Rounding through many layers of weights of this type (heads may upcast), with room."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.25
