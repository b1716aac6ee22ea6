"""What a GPU may not change: run there by `make test-gpu` (a GPU, and a CUDA build of PyTorch), with the shipped pair.

In float64 the texts of the GPU, of drafts and of batches are those of plain decoding on the processor, token for token. In bfloat16
rounding differs with the shape of a batch, as everywhere off the native decoder: there the ledger is what must agree (level 1 in a
million).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider.assets import shipped, shipped_prompts
from outrider.build import Engine, build_engine
from outrider.models.load import load_target
from outrider.params import SamplingParams
from outrider.telemetry.ledger import ledger
from outrider.train.job import Job
from outrider.train.loop import LoopConfig
from outrider.train.methods.registry import METHODS
from outrider.train.pipeline import run
from outrider.verify import LOSSLESS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: make test-gpu is for machines that have one"
)
DRAFTS = (
    "model", "eagle", "medusa", "dflash", "tree:3x2:model", "tree:3x2:eagle", "dynamic:12:eagle", "tree:3x2:medusa", "ngram",
    "suffix", "recycle", "jacobi:4", "early:6", "sparse:window:4+32", "ngram+model", "ahead:2:model",
)  # fmt: skip
LEVEL = 1e-6
TOKENS = 32


def draft_of(name: str) -> str:
    """The name with the shipped draft model's folder."""
    return name.replace("model", str(shipped("draft")))


def built(name: str, *, device: str = "cuda", dtype: str = "float64", **options) -> Engine:
    return build_engine(
        shipped("target"), draft_of(name), device=device, dtype=dtype, slots=4, max_length=256, **options
    )


def texts(engine: Engine, temperature: float = 0.0, count: int = 6, tokens: int = TOKENS) -> list[tuple[int, ...]]:
    prompts = [engine.encode(p)[:40] for p in shipped_prompts()[:count]]
    params = [SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=i) for i in range(count)]
    return [r.outputs[0].token_ids for r in engine.generate(prompts, params)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[int, ...]]:
    """Plain decoding on the processor."""
    return texts(built("none", device="cpu"))


def test_plain_text_is_that_of_the_processor(plain: list[tuple[int, ...]]) -> None:
    assert texts(built("none")) == plain


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_text_is_that_of_plain_decoding(name: str, plain: list[tuple[int, ...]]) -> None:
    engine = built(name, length=4)
    assert texts(engine) == plain
    assert engine.defects == 0
    if name not in ("ngram", "suffix"):
        assert engine.counts.accepted > 0


def test_the_other_runtime_gives_the_same_text(plain: list[tuple[int, ...]]) -> None:
    assert texts(built("ngram", implementation="hf", length=4)) == plain


@pytest.mark.parametrize("rule", sorted(LOSSLESS))
def test_rules_agree_with_their_own_predictions(rule: str) -> None:
    engine = built("model", dtype="auto", rule=rule, length=4)
    texts(engine, temperature=1.0, count=24, tokens=96)
    assert ledger(engine.counts, LEVEL).agrees, ledger(engine.counts, LEVEL)
    assert engine.counts.rejected > 50 or rule == "match"


@pytest.mark.parametrize("name", ["eagle", "medusa", "dflash", "tree:3x2:model", "dynamic:12:eagle"])
def test_drafters_agree_with_the_ledger(name: str) -> None:
    engine = built(name, dtype="auto", length=4)
    texts(engine, temperature=1.0, count=24, tokens=96)
    assert ledger(engine.counts, LEVEL).agrees, ledger(engine.counts, LEVEL)


def test_match_gives_the_text_of_plain_decoding_when_sampled() -> None:
    assert texts(built("model", rule="match", length=4), 1.0) == texts(built("none", rule="match"), 1.0)


def test_cached_prefixes_change_no_text(plain: list[tuple[int, ...]]) -> None:
    engine = built("model", length=4)
    assert texts(engine) == plain
    assert texts(engine) == plain


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_trainings_run_here_and_their_drafters_serve(kind: str, tmp_path: Path, plain: list[tuple[int, ...]]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(shipped_prompts()))
    job = Job(
        kind=kind, target=shipped("target"), data=(text,), work=tmp_path / "work", out=tmp_path / "out", rows=8, held_out=4,
        prompt=16, length=48, batch=4, levels=3, device="cuda", loop=LoopConfig(steps=6, lr=1e-3, warmup=2),
    )  # fmt: skip
    report = run(job, lambda _: None)
    assert report["steps"] == 6 and all(v == v for v in report.values() if isinstance(v, float))
    assert report == run(job, lambda _: None) | {"seconds": report["seconds"], "computing": report["computing"]}
    name = {"dflash": "dflash:", "medusa": "medusa:", "hydra": "medusa:", "mtp": "mtp:", "draft": ""}.get(
        kind, "eagle:"
    )
    served = build_engine(
        shipped("target"),
        f"{name}{tmp_path / 'out'}",
        device="cuda",
        dtype="float64",
        slots=4,
        max_length=256,
        length=3,
    )
    assert texts(served) == plain


def test_memory_of_the_device_is_what_is_asked() -> None:
    target = load_target(shipped("target"), device="cuda")
    assert target.device.type == "cuda"
    assert target.dtype is torch.bfloat16
