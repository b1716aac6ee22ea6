"""The training loop: one function that can be killed at any moment and continued to bit-identical weights (on CPU).

A step depends on the step number, the weights, the optimizer's moments and the random state; all four are in a
checkpoint. Batches and the learning rate are functions of the step number alone.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from outrider.errors import ConfigError, unknown_name
from outrider.train.checkpoint import TrainState, load_latest, save_checkpoint
from outrider.train.metrics import Log

Batch = torch.Tensor | tuple[torch.Tensor, ...]  # token ids [rows, length + 1], or a tuple that begins with them
Evaluate = Callable[[torch.nn.Module], dict[str, float]]
Report = Callable[[str], None]
LossOf = Callable[[torch.nn.Module, Batch, float], torch.Tensor]  # (model, batch, progress in [0, 1)) -> scalar


def tokens_in(batch: Batch) -> int:
    """Predicted tokens of a batch."""
    tokens = batch[0] if isinstance(batch, tuple) else batch
    return tokens[:, 1:].numel()


BOOKKEEPING = frozenset({"save_every_s", "log_every", "compile"})
"""Settings of a loop that do not change the result."""


class DivergedError(RuntimeError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """One training run. Times are in seconds, sizes in steps unless stated otherwise."""

    steps: int
    lr: float
    warmup: int = 100
    final_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0
    seed: int = 0
    save_every_s: float = 300.0
    log_every: int = 20
    autocast: bool = False  # bfloat16 products; AVX2 emulates them 9 times slower, see `job.products_of`
    compile: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps of training are 1 or more, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"the learning rate must be above 0 and finite, got {self.lr:g}")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ConfigError(f"final_lr_ratio must be from 0 to 1, got {self.final_lr_ratio:g}")
        if not 0 <= self.save_every_s < math.inf:
            raise ConfigError(f"seconds between checkpoints are 0 or more, got {self.save_every_s:g}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopConfig:
        """Build from plain values. An unknown key is an error that names the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown_name("training option", key, known))
        return cls(**values)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``final_lr_ratio * lr`` at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def build_optimizer(model: torch.nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay towards zero, gains of normalisations do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer moments as named tensors ``<parameter number>.<name>``, so that safetensors can hold them."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(v) for i, moments in state.items() for name, v in moments.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: dict[str, torch.Tensor]) -> None:
    """Restore moments saved by ``pack_optimizer``; hyperparameters come from the configuration."""
    state: dict[int, dict] = {}
    for key, value in packed.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: TrainState) -> dict:
    """Load weights, moments and random state; return the plain state."""
    model.load_state_dict(checkpoint.tensors["model"])
    unpack_optimizer(optimizer, checkpoint.tensors["optimizer"])
    torch.set_rng_state(checkpoint.tensors["random"]["torch"])
    return checkpoint.state


def _check_same_run(saved: dict, config: LoopConfig) -> None:
    """Refuse to continue a run under settings that change its trajectory."""
    now = asdict(config) | {"betas": list(config.betas)}
    changed = [k for k, v in saved.items() if k not in BOOKKEEPING and now.get(k) != v and not _grows(k, v, config)]
    if changed:
        raise ConfigError(f"the checkpoint was made with other settings of {', '.join(changed)}; use a new folder")


def _grows(name: str, before: Any, config: LoopConfig) -> bool:
    """Whether this is a number of steps that has grown, or the warm-up, which lies behind a run that was longer than it."""
    return (name == "steps" and before < config.steps) or (name == "warmup" and before <= config.warmup)


def _update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int, config: LoopConfig
) -> float:
    """One optimizer step for ``loss``; returns its value, raises DivergedError before any weight is changed."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    value = loss.item()
    if not math.isfinite(value) or not math.isfinite(norm.item()):
        raise DivergedError(f"step {step}: loss {value}, gradient norm {norm.item()}; lower lr or lengthen warmup")
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def train(
    model: torch.nn.Module,
    batch_of: Callable[[int], Batch],
    loss_of: LossOf,
    config: LoopConfig,
    folder: Path,
    evaluate: Evaluate | None = None,
    report: Report = print,
    logs: Sequence[Log] = (),
) -> dict:
    """Train ``model`` in place, on its device, from the newest valid checkpoint in ``folder`` if there is one; return the state.

    ``batch_of(step)`` gives token ids ``[rows, length + 1]``, alone or first in a tuple. ``evaluate`` runs at checkpoints, within
    a tenth of the time, and at the end. ``logs`` get the figures of every printed line, and every measurement.

    A checkpoint of a run with fewer ``steps`` and the same other settings is continued to the new number: with the learning
    rate of the longer run from there on, so that its weights are not those of a long run from the start.
    """
    torch.manual_seed(config.seed)
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, config)
    state: dict = {"step": 0, "tokens": 0, "seconds": 0.0, "history": []} | dict.fromkeys(SPENT, 0.0)
    checkpoint = load_latest(folder)
    if checkpoint is not None:
        _check_same_run(checkpoint.state["config"], config)
        state |= _restore(model, optimizer, checkpoint)
        report(f"continuing from {checkpoint.path.name}")
        before = checkpoint.state["config"]["steps"]
        if before != config.steps:
            report(
                f"the run of {before} steps grows to {config.steps}: the learning rate is that of the longer run from here on"
            )
    compute = torch.compile(loss_of, dynamic=False) if config.compile else loss_of
    progress, measure = _Progress(config, report, logs), _Measure(evaluate)
    progress.seen = state["history"][-1] if state["history"] else {}
    saved_at = time.monotonic()
    model.train()
    while state["step"] < config.steps:
        began, step = time.monotonic(), state["step"]
        batch = batch_of(step)
        ready = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.autocast):
            loss = compute(model, batch, step / config.steps)
        value = _update(model, optimizer, loss, step, config)
        now = time.monotonic()
        state["step"] = step + 1
        state["tokens"] += tokens_in(batch)
        state["seconds"] += now - began
        state["computing"] += now - ready
        progress.add(state["step"], value, tokens_in(batch))
        if now - saved_at >= config.save_every_s or state["step"] == config.steps:
            _save(model, optimizer, state, config, folder, measure, progress)
            saved_at = time.monotonic()
            if state["step"] < config.steps:  # the last one is not in what it wrote
                state["saving"] += saved_at - now
    report(
        f"time: {share_computing(state):.0%} in model computation, {state['saving']:.1f} s measuring and saving, "
        f"{state['seconds'] - state['computing']:.1f} s reading data"
    )
    return state


@contextmanager
def slower_norms_unsaid() -> Iterator[None]:
    """Autocast makes rows for which PyTorch has a slower norm, and it warns of that: nobody who trains can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


SPENT = ("computing", "saving")
"""Seconds of a run: forward, backward and optimizer; measuring and checkpoints. `seconds` is all steps, including data."""


def share_computing(state: dict) -> float:
    """Share of a run's time in model computation, without the final measurement."""
    return state["computing"] / max(1e-9, state["seconds"] + state["saving"])


class _Measure:
    """Calls ``evaluate``, unless its last call was less than PAUSE times its duration ago. It must not draw random
    numbers: they belong to the training."""

    PAUSE = 9.0

    def __init__(self, evaluate: Evaluate | None) -> None:
        self.evaluate = evaluate
        self.cost, self.ended = 0.0, time.monotonic()

    def __call__(self, model: torch.nn.Module, *, in_any_case: bool) -> dict[str, float] | None:
        """The measurements, or None if it did not measure."""
        began = time.monotonic()
        if self.evaluate is None or not (in_any_case or began - self.ended >= self.PAUSE * self.cost):
            return None
        model.eval()
        with torch.no_grad():
            found = self.evaluate(model)
        model.train()
        self.ended = time.monotonic()
        self.cost = self.ended - began
        return found


class _Progress:
    """Logs one line every ``log_every`` steps: mean loss since the last line, speed, and the remaining time."""

    def __init__(self, config: LoopConfig, report: Report, logs: Sequence[Log] = ()) -> None:
        self.config, self.report, self.logs = config, report, logs
        self.seen: dict[str, float] = {}  # the latest measurement
        self.losses: list[float] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, step: int, loss: float, tokens: int) -> None:
        """Count one finished step."""
        self.losses.append(loss)
        self.tokens += tokens
        if step % self.config.log_every:
            return
        now = time.monotonic()
        rate = self.tokens / (now - self.since)
        left = (self.config.steps - step) * tokens / rate / 60
        loss, lr = sum(self.losses) / len(self.losses), learning_rate(step, self.config)
        at = " ".join(f"{v:.2f}" for k, v in self.seen.items() if k.startswith("accept_"))
        accepted = f"accept {at}  " if at else ""
        self.report(
            f"step {step}/{self.config.steps}  loss {loss:.4f}  {accepted}lr {lr:.2e}  {rate:,.0f} tokens/s  {left:.1f} min left"
        )
        self.log(step, {"loss": loss, "lr": lr, "tokens_per_second": rate, "minutes_left": left})
        self.losses, self.tokens, self.since = [], 0, now

    def measured(self, step: int, found: dict[str, float]) -> None:
        """Show a measurement, and keep it for the next lines."""
        self.seen = found
        self.report(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
        self.log(step, found)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Pass figures to all `logs`."""
        for log in self.logs:
            log(step, values)


def _save(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    config: LoopConfig,
    folder: Path,
    measure: _Measure,
    progress: _Progress,
) -> None:
    """Measure, then write a checkpoint."""
    measured = measure(model, in_any_case=state["step"] == config.steps)
    if measured is not None:
        state["history"].append({"step": state["step"], **measured})
        progress.measured(state["step"], measured)
    tensors = {
        "model": model.state_dict(),
        "optimizer": pack_optimizer(optimizer),
        "random": {"torch": torch.get_rng_state()},
    }
    save_checkpoint(folder, state["step"], tensors, state | {"config": asdict(config)})
