"""Is a generator's text distributed as the target's? The black-box audit: texts in, a verdict with its evidence out.

The generator may be anything that continues token ids. The target (and the draft, if it is known) scores what it emitted in one
teacher-forced pass, and every position becomes a bet against the target distribution (`eprocess`) in the direction of every known
mistake (`alternatives`). Two controls run along on the same positions: tokens drawn from the target distribution itself, which must
not be accused, and tokens drawn from a planted leak as large as the bias the audit promises to see, which must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from outrider.engine.prompts import as_ids
from outrider.errors import ConfigError
from outrider.evaluate.audit.alternatives import (
    QUANTILES,
    RANKS,
    RATIOS,
    Candidates,
    Scene,
    alternatives,
    point,
    quantile_cells,
    rank_cells,
    ratio_cells,
)
from outrider.evaluate.audit.findings import EXACT, INCONCLUSIVE, NOT_THE_TARGET, AuditOptions, AuditResult, Detectable
from outrider.evaluate.audit.sources import Emission, Source
from outrider.evaluate.scoring.score import Clock, logits_along, to_vocabulary
from outrider.evaluate.statistics.eprocess import (
    STRENGTHS,
    Cells,
    Component,
    EProcess,
    bet,
    clip_for,
    clipped,
    detectable,
    growth,
    log_factors,
)
from outrider.protocols import Target
from outrider.sampling.pipeline import LogitsPipeline

POWER_ROWS = 6
"""Positions of each text at which the growth under every alternative is computed: enough for the detectable bias."""


class Auditor:
    """Collects texts and keeps the evidence. Texts of one prompt must come one after another.

    seen: called with the distributions of every text that was judged, and its tokens.
    """

    def __init__(self, target: Target, draft: Target | None, options: AuditOptions, eos: Sequence[int] = ()) -> None:
        self.target, self.draft, self.options, self.eos = target, draft, options, tuple(eos)
        self.pipeline = LogitsPipeline(target.vocab_size, self.eos)
        self.known = alternatives(options.params, draft=draft is not None, eos=self.eos, repeats=True)
        learnt = [
            Component("shared noise", "by place in the cumulative distribution"),
            Component("unexplained", "by rank under the target"),
        ]
        if draft is not None:
            learnt.append(Component("unexplained", "by ratio of draft to target"))
        components = [*(a.component for a in self.known), *learnt]
        self.process, self.honest, self.planted = (EProcess(components, options.level) for _ in range(3))
        sizes = [QUANTILES, len(RANKS), *([len(RATIOS) + 1] if draft is not None else [])]
        self.cells = [[Cells(s, options.tolerance) for s in sizes] for _ in range(3)]
        self.sums = np.zeros((len(self.known), len(STRENGTHS), 3))
        self.tv = np.zeros(len(self.known))
        self.sampled = self.texts = self.failed = 0
        self.clip, self.clock = clip_for(options.tolerance), Clock()
        self.chance = np.random.default_rng(options.seed)
        self.violations: list[str] = []
        self.seen: Callable[[Candidates, list[int]], None] = lambda found, output: None
        self.gaps: list[float] = []

    @torch.inference_mode()
    def add(self, prompt: Sequence[int], emission: Emission, earlier: Sequence[Sequence[int]] = ()) -> None:
        """Score one text and update the evidence. A failed or empty emission is counted and enters nothing."""
        output = [int(t) for t in emission.tokens]
        if emission.error is not None or not output:
            self.failed += 1
            return
        if bad := [t for t in output if not 0 <= t < self.target.vocab_size]:
            self.violations.append(f"token {bad[0]} is outside the target's vocabulary")
            self.failed += 1
            return
        output = self._until_end(output, emission)
        scene = self._scene(list(prompt), output, [list(e) for e in earlier])
        found = Candidates(scene)
        tokens = self._tokens(found, output)
        factors = [np.zeros((len(output), len(self.process.components), len(STRENGTHS))) for _ in tokens]
        self._directions(found, tokens, factors)
        self._learnt(found, tokens, factors)
        for process, f in zip((self.process, self.honest, self.planted), factors, strict=True):
            process.update(f)
        self.texts += 1
        self._gap(found, emission, output)
        self.seen(found, output)

    def _until_end(self, output: list[int], emission: Emission) -> list[int]:
        """The text up to its end token; what a generator writes after it is a violation, not a draw from any distribution."""
        params = self.options.params
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos))
        at = next((i for i, t in enumerate(output) if t in ends and i + 1 > params.min_tokens), None)
        if at is not None and at + 1 < len(output):
            self.violations.append(f"text goes on for {len(output) - at - 1} tokens after its end token")
            return output[: at + 1]
        if len(output) > params.max_tokens:
            self.violations.append(f"a text has {len(output)} tokens where at most {params.max_tokens} were asked for")
            return output[: params.max_tokens]
        return output

    def _scene(self, prompt: list[int], output: list[int], earlier: list[list[int]]) -> Scene:
        whole = [*prompt, *output]
        if len(whole) > self.target.max_length:
            raise ConfigError(f"a text of {len(whole)} tokens is longer than the target's context: lower --max-tokens")
        first = len(prompt) - 1
        read = lambda model: torch.cat(list(logits_along(model, whole, first, self.clock)))  # noqa: E731
        logits = read(self.target)
        draft = (
            None if self.draft is None else to_vocabulary(read(self.draft), self.target.vocab_size).to(logits.device)
        )
        return Scene(logits, draft, prompt, output, self.options.params, self.pipeline, earlier, self.eos)

    def _tokens(self, found: Candidates, output: list[int]) -> list[torch.Tensor]:
        """The emitted tokens, and the two controls: drawn from p, and from a leak of the size to detect."""
        p = found.p
        wrong = found.q if self.draft is not None else point(p.argmax(1), p)
        far = float(0.5 * (p - wrong).abs().sum(1).mean())
        w = min(0.9, self.options.detect / far) if far > 0 else 0.9
        n = len(output)
        draw = lambda probs: torch.multinomial(probs.cpu(), 1, generator=self._generator())[:, 0].to(p.device)  # noqa: E731
        honest = draw(p)
        leaks = torch.from_numpy(self.chance.random(n) < w).to(p.device)
        return [torch.tensor(output, device=p.device), honest, torch.where(leaks, draw(wrong), draw(p))]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.chance.integers(2**62)))

    def _directions(self, found: Candidates, tokens: list[torch.Tensor], factors: list[NDArray[np.float64]]) -> None:
        p, n = found.p, len(tokens[0])
        rows = np.unique(np.linspace(0, n - 1, POWER_ROWS).astype(int))
        self.sampled += len(rows)
        for c, alternative in enumerate(self.known):
            a = alternative.distribution(found)
            ratio = clipped(p, a, self.clip)
            for token, f in zip(tokens, factors, strict=True):
                b = bet(p, ratio, a, token)
                f[:, c] = log_factors(b, self.options.tolerance)
            self.tv[c] += b.tv.sum()
            self.sums[c] += growth(p[rows], ratio[rows], a[rows], self.options.tolerance)

    def _learnt(self, found: Candidates, tokens: list[torch.Tensor], factors: list[NDArray[np.float64]]) -> None:
        kinds = [quantile_cells(found), rank_cells(found), *([ratio_cells(found)] if self.draft is not None else [])]
        for k, cells in enumerate(kinds):
            size = len(self.cells[0][k].seen)
            mass = torch.zeros(len(cells), size, dtype=torch.float64, device=cells.device)
            mass = mass.scatter_add_(1, cells, found.p).cpu().numpy()
            for which, (token, f) in enumerate(zip(tokens, factors, strict=True)):
                at = cells.gather(1, token[:, None])[:, 0].tolist()
                learner = self.cells[which][k]
                for i, cell in enumerate(at):
                    f[i, len(self.known) + k] = learner.factor(mass[i], cell)

    def _gap(self, found: Candidates, emission: Emission, output: list[int]) -> None:
        """Where the generator reports log-probabilities: half the mean of |1 - ours / theirs| estimates TV(ours, theirs)."""
        if not emission.logprobs:
            return
        ours = found.scene.logits.double().log_softmax(-1)
        ours = ours[torch.arange(len(output)), torch.tensor(output)].cpu().numpy()
        theirs = np.asarray(emission.logprobs[: len(output)])
        self.gaps += (0.5 * np.abs(1 - np.exp(np.minimum(ours[: len(theirs)] - theirs, 700.0)))).tolist()

    # ------------------------------------------------------------------ the answer
    def verdict(self) -> AuditResult:
        """The answer now; more texts may follow."""
        o, e = self.options, self.process
        found = self._detectable()
        wanted = [d for d in found if d.full >= o.detect]
        seen = all(d.tv is not None and d.tv <= max(o.detect, 0.0) for d in wanted)
        resolution = max((d.tv for d in wanted if d.tv is not None), default=None) if seen else None
        accused = e.alarm is not None or bool(self.violations)
        names = list(e.families().items())
        cause, label, strength, bias, odds = None, None, None, None, None
        if e.alarm is not None:
            cause = names[0][0]
            component, strength, _ = e.best(cause)
            label, odds = component.label, (names[0][1] - names[1][1]) / math.log(10)
            index = e.components.index(component)
            bias = strength * self.tv[index] / e.tokens if index < len(self.known) else None
        clean = self.honest.alarm is None and self.planted.alarm is not None
        outcome = NOT_THE_TARGET if accused else EXACT if seen and wanted and clean else INCONCLUSIVE
        ten = math.log(10)
        return AuditResult(
            outcome,
            e.tokens,
            self.texts,
            self.failed,
            o.level,
            o.tolerance,
            o.detect,
            e.value / ten,
            e.highest / ten,
            e.alarm,
            cause,
            label,
            strength,
            bias,
            odds,
            {k: v / ten for k, v in names},
            found,
            resolution,
            self.honest.highest / ten,
            self.planted.highest / ten,
            self.violations,
            float(np.mean(self.gaps)) if self.gaps else None,
        )

    def _detectable(self) -> list[Detectable]:
        if not self.sampled:
            return []
        tokens, out = self.process.tokens, []
        scale = tokens / self.sampled
        for c, alternative in enumerate(self.known):
            needed = self.process.needed - float(self.process.weight[c, 0])
            tv = detectable(self.sums[c] * scale, tokens, needed)
            part = alternative.component
            out.append(Detectable(part.family, part.label, tv, float(self.tv[c] / tokens)))
        return out


def audit(
    source: Source,
    prompts: Iterable[Sequence[int]],
    auditor: Auditor,
    *,
    samples: int = 2,
    budget: int | None = None,
    group: int = 8,
    progress: Callable[[float], None] = lambda _: None,
) -> AuditResult:
    """Ask `source` for `samples` continuations of every prompt and judge them; stops after `budget` tokens.

    group: prompts asked for together. Every continuation gets a seed of its own.
    """
    texts = as_ids(prompts)
    if samples < 1 or not texts:
        raise ConfigError("an audit needs at least one prompt and one sample")
    for low in range(0, len(texts), group):
        some = texts[low : low + group]
        jobs = [p for p in some for _ in range(samples)]
        seeds = [1 + (auditor.options.seed << 24) + low * samples + i for i in range(len(jobs))]
        emissions = source(jobs, seeds)
        if len(emissions) != len(jobs):
            raise ConfigError(f"the generator returned {len(emissions)} texts for {len(jobs)} prompts")
        for i, emission in enumerate(emissions):
            start = i - i % samples
            auditor.add(jobs[i], emission, [e.tokens for e in emissions[start:i]])
            if budget is not None and auditor.process.tokens >= budget:
                return auditor.verdict()
        progress(min(1.0, (low + group) / len(texts)))
    return auditor.verdict()
