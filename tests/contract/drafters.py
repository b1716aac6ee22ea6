"""The table of drafters: every row goes through the whole contract suite. A new drafter is a new row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from examples.linear_drafter import METHOD
from examples.linear_drafter.drafter import LinearDrafter
from examples.linear_drafter.network import LinearConfig, LinearNetwork
from outrider.drafters import counts
from outrider.drafters.ahead import Ahead
from outrider.drafters.apart import Apart, Host
from outrider.drafters.coded import CodedDrafter
from outrider.drafters.combine import first_of
from outrider.drafters.dflash import forward as block_forward
from outrider.drafters.dflash.drafter import DFlashDrafter
from outrider.drafters.dflash.format import DFlashConfig
from outrider.drafters.eagle.drafter import EagleDrafter
from outrider.drafters.eagle.forward import forward_of
from outrider.drafters.eagle.network import EagleConfig
from outrider.drafters.jacobi import Jacobi
from outrider.drafters.medusa import sequential_forward
from outrider.drafters.medusa.drafter import MedusaDrafter
from outrider.drafters.medusa.format import MedusaConfig, SequentialConfig
from outrider.drafters.medusa.sequential_drafter import SequentialDrafter
from outrider.drafters.model.drafter import ModelDrafter
from outrider.drafters.model.early_exit import early_exit
from outrider.drafters.mtp.network import MtpConfig
from outrider.drafters.mtp.stack import HeadStack
from outrider.drafters.ngram import NGram
from outrider.drafters.none import NoDraft
from outrider.drafters.prediction import PredictedOutput
from outrider.drafters.recycle import Recycle
from outrider.drafters.sparse import Sparse, SparseDrafter
from outrider.drafters.suffix import Suffix
from outrider.drafters.target_tables import output_of
from outrider.drafters.tree.gain import ByGain, Dynamic
from outrider.drafters.tree.growth import BestFirst, Growth, Levels
from outrider.drafters.tree.shapes import MergedDrafts, best_tree, levels
from outrider.models.quantised import rounding
from outrider.models.restricted import Restricted
from outrider.models.toy import TableTarget, TinyLM
from outrider.nn.held import library_for
from outrider.protocols import Drafter
from outrider.train.distill import Teacher, loss_of
from outrider.train.features import hidden_of
from outrider.train.methods.dflash import new_blocks
from outrider.train.methods.eagle import new_features, new_last_features
from outrider.train.methods.hydra import new_sequence
from outrider.train.methods.medusa import new_heads
from outrider.train.methods.mtp import new_head
from outrider.train.methods.registry import METHODS

Toy = TinyLM | TableTarget
Factory = Callable[[Toy, int], Drafter]
"""(the target, how many slots the engine will have) -> an unbound drafter; the engine binds it."""


def small(target: Toy) -> Toy:
    """A draft model that agrees with the target often and not always."""
    return target.perturbed(0.3, seed=7)


def part(model: Toy) -> Restricted:
    """The model with every second token in its head."""
    return Restricted(model, torch.arange(1, model.vocab_size, 2))


def other_vocabulary(target: Toy, more: int) -> TinyLM:
    """A draft model with `more` tokens than the target (fewer if negative): padding of its embedding table."""
    return TinyLM(target.vocab_size + more, 16, 1, seed=11, sharp=2.0)


@cache
def learned(kind: str, target: Toy, levels: int = 4, steps: int = 30) -> nn.Module:
    """A drafter trained for a moment on random text: right often enough for drafts to be accepted, and wrong often enough."""
    noise = torch.Generator().manual_seed(5)
    tokens = torch.randint(target.vocab_size, (24, 20), generator=noise)
    held = tuple(range(target.layers + 1))
    hidden = hidden_of(target, tokens, held).to(target.dtype)  # type: ignore[arg-type]
    wide, v = target.hidden_size, target.vocab_size
    if kind == "linear":
        read, model = (target.layers,), LinearNetwork(LinearConfig(wide, v, target.layers, levels), output_of(target))  # type: ignore[arg-type]
    elif kind == "medusa":
        read, model = (target.layers,), new_heads(MedusaConfig(wide, v, levels, target.layers), target)  # type: ignore[arg-type]
    elif kind == "hydra":
        read = (target.layers // 2, target.layers)
        config = SequentialConfig(wide, v, read, 16, 32)
        model = new_sequence(config, target, hidden[:, :, list(read)].flatten(0, 1))  # type: ignore[arg-type]
    elif kind == "dflash":
        read = (target.layers // 2, target.layers)
        shape = DFlashConfig(wide, read, v, heads=2, kv_heads=1, head_dim=8, inner=32, block=levels + 1, mask=v - 1)
        taps = hidden[:, :, list(read)].flatten(0, 1)
        model = new_blocks(shape, target, taps, output_of(target), torch.ones(wide))  # type: ignore[arg-type]
    elif kind == "eagle1":
        read = (target.layers,)
        model = new_last_features(EagleConfig(wide, wide, read, v, 2, 1, 8, 32), target)  # type: ignore[arg-type]
    elif kind == "mtp":
        read = (target.layers,)
        model = new_head(MtpConfig(wide, wide, read, v, 2, 1, 8, 32), target)  # type: ignore[arg-type]
    else:
        read = (target.layers // 2, target.layers)
        config = EagleConfig(16, wide, read, v, 2, 1, 8, 32)
        model = new_features(config, target, hidden[:, :, list(read)].flatten(0, 1))  # type: ignore[arg-type]
    model = model.double()
    judge = Teacher.of(target, held, read)  # type: ignore[arg-type]
    loss, adam = (
        loss_of(judge, {**METHODS, **METHOD}[kind].predictor(levels)),
        torch.optim.Adam(model.parameters(), lr=1e-2),
    )
    for _ in range(steps):
        adam.zero_grad()
        loss(model, (tokens, hidden), 0.0).backward()
        adam.step()
    return model.eval().requires_grad_(False)


def medusa(target: Toy, growth: Growth) -> MedusaDrafter:
    return MedusaDrafter(learned("medusa", target), growth)  # type: ignore[arg-type]


def hydra(target: Toy, growth: Growth) -> SequentialDrafter:
    return SequentialDrafter(learned("hydra", target), growth)  # type: ignore[arg-type]


def eagle(target: Toy, growth: Growth, kind: str = "eagle") -> EagleDrafter:
    return EagleDrafter(learned(kind, target), growth)  # type: ignore[arg-type]


def dflash(target: Toy, growth: Growth) -> DFlashDrafter:
    return DFlashDrafter(learned("dflash", target), growth)  # type: ignore[arg-type]


def compiled(kind: str, target: Toy, growth: Growth) -> Drafter:
    """The same in float32, which the compiled decoder runs."""
    return DRAFTER_OF.get(kind, EagleDrafter)(copy.deepcopy(learned(kind, target)).float(), growth)  # type: ignore[arg-type]


def rounded(kind: str, target: Toy, growth: Growth) -> Drafter:
    """The same with matrices in 8 bits, those whose rows fill whole blocks. (Of Medusa's none does, in targets this small.)"""
    model = copy.deepcopy(learned(kind, target)).float()
    assert any(p.dim() == 2 and p.shape[1] % 32 == 0 for p in model.parameters())
    forward = partial(FORWARDS[kind], rounding=rounding("q8_0"))
    return DRAFTER_OF.get(kind, EagleDrafter)(model, growth, forward=forward)  # type: ignore[arg-type]


FORWARDS: dict[str, Any] = {
    "eagle": forward_of, "hydra": sequential_forward.forward_of, "dflash": block_forward.forward_of
}  # fmt: skip
"""What makes the forwards of networks that can be rounded."""
DRAFTER_OF = {"medusa": MedusaDrafter, "hydra": SequentialDrafter, "dflash": DFlashDrafter}
"""The drafters of the networks that `learned` makes, where it is not EAGLE's."""


def counted(target: Toy, growth: Growth) -> counts.Counts:
    """Tables of random pictures of 5 x 4 tokens, some of the vocabulary's no colours."""
    noise = torch.Generator().manual_seed(6)
    tokens, prompts = (torch.randint(target.vocab_size - 2, size, generator=noise) for size in ((60, 20), (60,)))
    tables = counts.count(tokens, prompts, target.vocab_size - 2, (3, 5, 9), 4)
    return counts.Counts(tables, growth, target.vocab_size)


@cache
def host() -> Host:
    """The process for all drafters that have one: it takes seconds to start."""
    return Host()


def apart(make: Callable[[], Drafter], target: Toy) -> Apart:
    """What drafts here if the process fails is told by `engine.notices`; `tests/drafters/test_apart.py` looks at them."""
    return Apart(make, ModelDrafter(small(target), 4), host())


DRAFTERS: dict[str, Factory] = {
    "none": lambda target, slots: NoDraft(),
    "ngram": lambda target, slots: NGram(5, max_n=3, min_n=1),
    "jacobi": lambda target, slots: Jacobi(4, target.vocab_size),
    "jacobi-up": lambda target, slots: Jacobi(4, target.vocab_size, columns=3),
    "jacobi-fresh": lambda target, slots: Jacobi(3, target.vocab_size, keyed=False),
    "suffix": lambda target, slots: Suffix(5),
    "suffix-shared": lambda target, slots: Suffix(5, shared=400),
    "recycle": lambda target, slots: Recycle(levels((1,) * 4)),
    "recycle-tree": lambda target, slots: Recycle(levels((3, 2, 1))),
    "model": lambda target, slots: ModelDrafter(small(target), 4),
    "ahead": lambda target, slots: Ahead(ModelDrafter(small(target), 4), 3),
    "ahead-inline": lambda target, slots: Ahead(ModelDrafter(small(target), 5), 4, inline=True),
    "apart-ahead": lambda target, slots: apart(partial(Ahead, ModelDrafter(small(target), 5), 3), target),
    "model-coupled": lambda target, slots: ModelDrafter(small(target), 4, sample="coupled"),
    "model-short-context": lambda target, slots: ModelDrafter(small(target), 4, max_length=14),
    "model-padded": lambda target, slots: ModelDrafter(
        other_vocabulary(target, 3), 3, sample="greedy", vocab_size=target.vocab_size
    ),
    "model-smaller": lambda target, slots: ModelDrafter(other_vocabulary(target, -3), 3, vocab_size=target.vocab_size),
    "model-vocabulary": lambda target, slots: ModelDrafter(part(small(target)), 4),
    "tree-iid": lambda target, slots: ModelDrafter(small(target), 3, branching=(2, 2, 1)),
    "tree-coupled": lambda target, slots: ModelDrafter(small(target), 3, branching=(2, 1, 2), sample="coupled"),
    "batch": lambda target, slots: ModelDrafter(small(target), 3, branching=(3, 1, 1)),
    "shared": lambda target, slots: ModelDrafter(small(target), 3, shape=MergedDrafts(3, 3)),
    "shared-coupled": lambda target, slots: ModelDrafter(small(target), 3, shape=MergedDrafts(2, 3), sample="coupled"),
    "best-tree": lambda target, slots: ModelDrafter(
        small(target), 3, shape=best_tree((0.5, 0.2, 0.1), 7, 3), siblings="without_replacement"
    ),
    "ngram+tree": lambda target, slots: first_of(
        NGram(4), PredictedOutput(3), ModelDrafter(small(target), 2, branching=(3, 2), siblings="without_replacement")
    ),
    "model-dynamic": lambda target, slots: ModelDrafter(
        small(target), 3, growth=BestFirst(6, 3, target.vocab_size, width=2)
    ),
    "model-stop": lambda target, slots: ModelDrafter(
        small(target), 5, growth=ByGain(5, 5, target.vocab_size, least=0.3)
    ),
    "model-stop-coupled": lambda target, slots: ModelDrafter(
        small(target), 4, growth=ByGain(4, 4, target.vocab_size, least=0.3, sample="coupled")
    ),
    "model-by-gain": lambda target, slots: ModelDrafter(
        small(target), 3, growth=Dynamic(7, 3, target.vocab_size, width=3)
    ),
    "medusa-stop": lambda target, slots: medusa(target, ByGain(4, 4, target.vocab_size, least=0.2)),
    "eagle-by-gain": lambda target, slots: eagle(target, ByGain(6, 4, target.vocab_size, width=2, least=0.1)),
    "medusa": lambda target, slots: medusa(target, Levels(levels((1,) * 4), target.vocab_size)),
    "medusa-coupled": lambda target, slots: medusa(
        target, Levels(levels((1,) * 3), target.vocab_size, sample="coupled")
    ),
    "medusa-tree": lambda target, slots: medusa(
        target, Levels(best_tree((0.5, 0.2, 0.1), 9, 3), target.vocab_size, sample="greedy")
    ),
    "medusa-dynamic": lambda target, slots: medusa(target, BestFirst(8, 4, target.vocab_size, width=3)),
    "hydra": lambda target, slots: hydra(target, Levels(levels((1,) * 4), target.vocab_size)),
    "hydra-dynamic": lambda target, slots: hydra(target, Dynamic(7, 4, target.vocab_size, width=3)),
    "eagle": lambda target, slots: eagle(target, Levels(levels((1,) * 4), target.vocab_size)),
    "eagle-tree": lambda target, slots: eagle(
        target, Levels(levels((2, 2, 1)), target.vocab_size, siblings="without_replacement")
    ),
    "eagle-dynamic": lambda target, slots: eagle(target, BestFirst(7, 4, target.vocab_size, width=3)),
    "eagle1": lambda target, slots: eagle(target, Levels(levels((1,) * 4), target.vocab_size), "eagle1"),
    "eagle1-dynamic": lambda target, slots: eagle(target, BestFirst(7, 4, target.vocab_size, width=3), "eagle1"),
    "mtp": lambda target, slots: eagle(target, Levels(levels((1,) * 4), target.vocab_size), "mtp"),
    "mtp-heads": lambda target, slots: HeadStack(
        [(learned("mtp", target), forward_of)] * 2,  # type: ignore[list-item]
        Levels(levels((2, 2, 1)), target.vocab_size, siblings="without_replacement"),
    ),
    "counts": lambda target, slots: counted(target, Levels(levels((1,) * 4), target.vocab_size)),
    "early": lambda target, slots: early_exit(target, 1, Levels(levels((1,) * 4), target.vocab_size)),
    "early-dynamic": lambda target, slots: early_exit(target, 1, Dynamic(6, 3, target.vocab_size, width=2)),
    "early-stop": lambda target, slots: early_exit(target, 1, ByGain(4, 4, target.vocab_size, least=0.3)),
    "sparse-window": lambda target, slots: SparseDrafter(
        target, Sparse("window", 1, 2), Levels(levels((1,) * 4), target.vocab_size)
    ),
    "sparse-coupled": lambda target, slots: SparseDrafter(
        target, Sparse("window", 0, 3), Levels(levels((1,) * 3), target.vocab_size, sample="coupled")
    ),
    "sparse-snap": lambda target, slots: SparseDrafter(
        target, Sparse("snap", 1, 2, chosen=2, refresh=5), Levels(levels((1,) * 4), target.vocab_size)
    ),
    "ngram+sparse": lambda target, slots: first_of(
        NGram(4), SparseDrafter(target, Sparse("pillar", 1, 2, chosen=2), Levels(levels((1,) * 3), target.vocab_size))
    ),
    "sparse-int8": lambda target, slots: CodedDrafter(target, Levels(levels((1,) * 4), target.vocab_size)),
    "early+sparse": lambda target, slots: SparseDrafter(
        target.first_layers(1), Sparse("window", 1, 3), Levels(levels((1,) * 4), target.vocab_size)
    ),
    "dflash": lambda target, slots: dflash(target, Levels(levels((1,) * 4), target.vocab_size)),
    "dflash-greedy": lambda target, slots: dflash(target, Levels(levels((1,) * 3), target.vocab_size, sample="greedy")),
    "dflash-dynamic": lambda target, slots: dflash(target, Dynamic(8, 4, target.vocab_size, width=3)),
    "dflash-stop": lambda target, slots: dflash(target, ByGain(4, 4, target.vocab_size, least=0.2)),
    "linear": lambda target, slots: LinearDrafter(
        learned("linear", target),  # type: ignore[arg-type]
        Levels(levels((1,) * 4), target.vocab_size),
    ),
    "ngram+eagle": lambda target, slots: first_of(
        NGram(4), eagle(target, Levels(levels((1,) * 3), target.vocab_size, sample="greedy"))
    ),
}

if library_for(torch.ones(1)) is not None:
    DRAFTERS |= {
        "eagle-compiled": lambda target, slots: compiled(
            "eagle", target, Levels(levels((2, 2, 1)), target.vocab_size, siblings="without_replacement")
        ),
        "eagle1-compiled": lambda target, slots: compiled(
            "eagle1", target, BestFirst(7, 4, target.vocab_size, width=3)
        ),
        "mtp-compiled": lambda target, slots: compiled("mtp", target, BestFirst(7, 4, target.vocab_size, width=3)),
        "medusa-compiled": lambda target, slots: compiled(
            "medusa", target, Levels(levels((1,) * 4), target.vocab_size)
        ),
        "hydra-compiled": lambda target, slots: compiled(
            "hydra", target, Levels(levels((2, 2, 1)), target.vocab_size, siblings="without_replacement")
        ),
        "dflash-compiled": lambda target, slots: compiled(
            "dflash", target, Levels(levels((1,) * 4), target.vocab_size)
        ),
        "eagle-rounded": lambda target, slots: rounded("eagle", target, Levels(levels((1,) * 4), target.vocab_size)),
        "hydra-rounded": lambda target, slots: rounded("hydra", target, Levels(levels((1,) * 4), target.vocab_size)),
        "dflash-rounded": lambda target, slots: rounded("dflash", target, Levels(levels((1,) * 4), target.vocab_size)),
    }
