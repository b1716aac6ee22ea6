"""vLLM's rejection samplers with their Triton kernels, alone, on distributions that are known: is what they emit the target's?

    python benchmarks/audit_vllm_gpu.py PACKAGE      # the folder `vllm` of an installed or unpacked wheel; needs a GPU

Only the modules of PACKAGE that hold the samplers are loaded; what else they import stands for nothing, so that no more of vLLM
needs to be installed. Every request has LENGTH drafts, drawn as vLLM draws them (with its own noise, of the same seed and
places), and the target's distributions depend on the place alone. So the emitted tokens, completed with draws from the target
behind them, must be LENGTH + 1 independent draws from known distributions: Pearson's statistic over all VOCAB^(LENGTH + 1) texts
says whether they are, to one in a billion. `control` is the same with a target of a temperature 2% off, which must fail. The wide
rows count the first token of a vocabulary that takes several blocks of the kernels.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from scipy import stats

VOCAB, LENGTH = 6, 3
WIDE = 20_000
ALARM = 1e-9
REAL = {
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils",
    "vllm.v1.worker.gpu.sample.gumbel",
    "vllm.v1.worker.gpu.sample.watermark",
    "vllm.v1.watermarking.prfs.philox",
    "vllm.v1.watermarking.prfs.base",
    "vllm.v1.sample.rejection_sampler",
}
"""The modules that are loaded; all others under `vllm` are Nothing."""


class Nothing(types.ModuleType):
    """A module in which every name stands for nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds REAL below a folder, and Nothing elsewhere under `vllm`."""

    def __init__(self, package: Path) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "vllm":
            return None
        if name in REAL:
            file = self.package.joinpath(*name.split(".")[1:]).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing but what the samplers call while they are imported."""
        import triton
        import triton.language as tl
        import triton.language.extra.libdevice as tldevice

        if module.__name__ == "vllm.triton_utils":
            vars(module).update(triton=triton, tl=tl, tldevice=tldevice, HAS_TRITON=True)
        elif module.__name__ == "vllm.logger":
            vars(module).update(init_logger=lambda name: SimpleNamespace(warning=print, info=print))
        elif module.__name__ == "vllm.config.model":
            vars(module).update(PROCESSED_LOGPROBS_MODES=frozenset())
        elif module.__name__.endswith("jit_warmup_triton_helper"):
            vars(module).update(triton_kernel_dispatcher_with_warmup=launcher)


def launcher(kernel: Any, **_: Any) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """vLLM's decorator without its warming up: the function gives the grid and the constants, its arguments go to the kernel."""

    def decorate(of: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **named: Any) -> None:
            grid, constants = of(*args, **named)
            given = inspect.signature(of).bind(*args, **named).arguments
            held = inspect.signature(kernel.fn).parameters
            names = {n.removesuffix("_ptr"): n for n in held}
            kernel[grid](**{names[n]: v for n, v in given.items() if n in names}, **constants)

        return call

    return decorate


def target_logits(vocab: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the target and of the drafts at LENGTH + 1 places."""
    noise = torch.Generator().manual_seed(vocab)
    target = 1.5 * torch.randn(LENGTH + 1, vocab, generator=noise)
    return target.to(device), (target + torch.randn(LENGTH + 1, vocab, generator=noise)).to(device)


def newer(
    requests: int, vocab: int, seed: int, device: str, temperature: float, off: float = 1.0, **how: Any
) -> torch.Tensor:
    """Tokens [requests, LENGTH + 1] of the newer runner's sampler, -1 behind the end. how: `block`; `given`, if it knows q."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    target, draft = target_logits(vocab, device)
    rows, each = requests * (LENGTH + 1), torch.arange(requests, device=device)
    request = each.repeat_interleave(LENGTH + 1)
    place = torch.arange(LENGTH + 1, device=device).repeat(requests)
    # every request stands elsewhere in its text and has its own seed, as in an engine
    pos = 100 + 7 * (request % 50) + place
    seeds = seed * requests + each
    heat = torch.full((requests,), temperature, device=device)
    logits = draft.repeat(requests, 1)
    drawn = gumbel_sample(logits, request, heat, seeds, pos, True, True)
    if not how["given"]:
        drawn = draft.argmax(-1).repeat(requests)
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    drafted = place < LENGTH
    tokens[1:][drafted[:-1]] = drawn[:-1][drafted[:-1]]  # the draft of a place is the input of the next
    sampled, count = rejection_sample(
        (target / (temperature * off)).repeat(requests, 1),
        draft[:LENGTH].expand(requests, LENGTH, vocab).contiguous() if how["given"] else None,
        tokens,
        torch.arange(requests + 1, dtype=torch.int32, device=device) * (LENGTH + 1),
        pos,
        each.to(torch.int32),
        request.to(torch.int32),
        place.to(torch.int32),
        heat,
        seeds,
        LENGTH,
        use_block_verification=how["block"],
    )
    behind = torch.arange(LENGTH + 1, device=device) >= count[:, None]
    return sampled.masked_fill(behind, -1)


def older(
    requests: int, vocab: int, seed: int, device: str, temperature: float, off: float = 1.0, **how: Any
) -> torch.Tensor:
    """The same of the first runner's sampler, its bonus token included."""
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens, rejection_sample

    torch.manual_seed(seed)
    target, draft = target_logits(vocab, device)
    q = (draft / temperature).softmax(-1)[:LENGTH].contiguous()
    sampled = torch.multinomial(q, requests, replacement=True).T.reshape(-1)
    tokens = sampled if how["given"] else q.argmax(-1).repeat(requests)
    ends = torch.arange(1, requests + 1, dtype=torch.int32, device=device) * LENGTH
    heat = torch.full((requests,), temperature * off, device=device)
    each = expand_batch_to_tokens(heat, ends, requests * LENGTH)
    bonus = torch.multinomial((target[LENGTH] / (temperature * off)).softmax(-1), requests, replacement=True)
    return rejection_sample(
        tokens.to(torch.int32),
        [LENGTH] * requests,
        LENGTH,
        ends,
        q.repeat(requests, 1) if how["given"] else None,
        target[:LENGTH].repeat(requests, 1) / each[:, None],
        bonus.to(torch.int32)[:, None],
        SimpleNamespace(all_greedy=False, all_random=True, temperature=heat, generators={}),
    ).long()


def evidence(
    sampler: Callable[..., torch.Tensor], vocab: int, options: argparse.Namespace, temperature: float, **how: Any
) -> str:
    """Tokens a step, Pearson's statistic of all texts (of the first tokens, for a wide vocabulary), and the verdict."""
    target, _ = target_logits(vocab, options.device)
    p = (target / temperature).softmax(-1)
    wide = vocab > VOCAB
    cells = vocab if wide else vocab ** (LENGTH + 1)
    seen, emitted = torch.zeros(cells, dtype=torch.float64), 0
    for turn in range(options.rounds):
        tokens = sampler(options.requests, vocab, turn + 1, options.device, temperature, **how)
        emitted += int((tokens >= 0).sum())
        if wide:
            code = tokens[:, 0]
        else:
            torch.manual_seed(10_000 + turn)
            rest = torch.stack([torch.multinomial(x, options.requests, replacement=True) for x in p], 1)
            text = torch.where(tokens >= 0, tokens, rest)
            code = (text * vocab ** torch.arange(LENGTH, -1, -1, device=text.device)).sum(1)
        seen += torch.bincount(code, minlength=cells).double().cpu()
    expected = p[0].double().cpu()
    for x in p[1:] if not wide else ():
        expected = (expected[:, None] * x.double().cpu()).flatten()
    draws = options.requests * options.rounds
    rare = draws * expected < 5  # pooled, as the statistic's distribution is known for many draws alone
    pool = lambda x: torch.cat([x[~rare], x[rare].sum()[None]]) if rare.any() else x  # noqa: E731
    found, wanted = pool(seen), pool(draws * expected)
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    log10 = stats.chi2.logsf(statistic, len(wanted) - 1) / 2.302585
    verdict = "NOT the target's distribution" if log10 < math.log10(ALARM) else "exact so far"
    return (
        f"{emitted / draws:.2f} tokens a step, chi2 {statistic:,.0f} of {len(wanted) - 1:,} degrees, "
        f"p = 10^{log10:.1f}, {verdict}"
    )


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    sys.meta_path.insert(0, Finder(options.package))
    print(f"{options.requests * options.rounds:,} steps of {LENGTH} drafts each; alarm below p = {ALARM:g}", flush=True)
    kinds: dict[str, dict[str, Any]] = {
        "drafts sampled": {"given": True, "block": False},
        "drafts greedy": {"given": False, "block": False},
        "drafts sampled, block": {"given": True, "block": True},
        "drafts greedy, block": {"given": False, "block": True},
    }
    for runner, sampler in (("newer runner", newer), ("first runner", older)):
        for kind, how in kinds.items():
            if how["block"] and sampler is older:
                continue
            for temperature in (1.0, 0.6):
                said = evidence(sampler, VOCAB, options, temperature, **how)
                print(f"{runner}, {kind}, temperature {temperature:g}: {said}", flush=True)
            print(
                f"{runner}, {kind}, vocabulary {WIDE}: {evidence(sampler, WIDE, narrow(options), 0.6, **how)}",
                flush=True,
            )
        print(
            f"{runner}, control: {evidence(sampler, VOCAB, options, 1.0, off=1.02, **kinds['drafts sampled'])}",
            flush=True,
        )


def narrow(options: argparse.Namespace) -> argparse.Namespace:
    """Fewer requests at a time for wide vocabularies, and more rounds: their logits take much memory."""
    requests = min(options.requests, 4096)
    return argparse.Namespace(**{**vars(options), "requests": requests, "rounds": max(1, options.rounds // 2)})


if __name__ == "__main__":
    main()
