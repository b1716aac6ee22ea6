"""Published speed-ups of speculative decoding beside what the cost model predicts for them. Measures nothing: seconds to run.

    python benchmarks/published.py

Each row takes from its source what decides acceptance (the published tokens per step at that draft length) and, where it is given,
the published plain speed, which sets the one free number of the model: the share of the data sheet's rates that the software
reaches. Everything else is from data sheets, and the size of a head from its shape. What is compared is the speed-up, that is the
cost of drafting and verifying. Where a source does not name the GPU, the one that is assumed is named in brackets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from outrider.theory.hardware import HARDWARE, MODELS, Model
from outrider.theory.links import LINKS
from outrider.theory.roofline import Setting, draft_forward, forward


def eagle(target: Model, vocabulary: int, name: str, features: int = 3) -> Model:
    """An EAGLE head: a layer of the target's shape, its input projection, and the output head over `vocabulary` tokens."""
    hidden = target.heads * target.head_dim
    layer = (target.parameters - 2 * 128_256 * hidden) / target.layers
    size = layer + features * hidden * hidden + vocabulary * hidden
    return replace(target, name=name, parameters=size, layers=1, source=f"one layer and the head of {target.source}")


@dataclass(frozen=True, slots=True)
class Published:
    """length: draft steps; rows: of a verification. As published: tokens a step, plain tokens a second (0: not given), speedup."""

    what: str
    source: str
    target: Model
    draft: Model
    hardware: str
    devices: int
    length: int
    rows: int
    tokens: float
    plain: float
    speedup: float


E1 = eagle(MODELS["8b"], 128_256, "eagle", features=2)
E3 = eagle(MODELS["8b"], 32_000, "eagle3")
E70 = eagle(MODELS["70b"], 32_000, "eagle3-70b")
ISSUE, PULL = "vllm-project/vllm issue 20780", "sgl-project/sglang pull request 4716"
_EAGLE1 = {2: (2.10, 4.37), 3: (2.29, 4.29), 4: (2.39, 4.48), 5: (2.43, 4.71), 6: (2.45, 4.94), 7: (2.47, 5.20)}
_EAGLE3 = {2: (2.36, 4.32), 3: (2.79, 4.09), 4: (3.08, 4.05), 5: (3.32, 4.13), 6: (3.46, 4.20), 7: (3.54, 4.29)}
"""Draft length -> tokens per step and milliseconds per token; plain 7.07 ms."""
ROWS = [
    *(
        Published(
            f"vLLM, Llama 3.1 8B [H100], {name}, K={k}", ISSUE, MODELS["8b"], head, "h100", 1, k, k + 1, tokens, 1000 / 7.07,
            7.07 / ms,
        )
        for name, head, table in (("EAGLE", E1, _EAGLE1), ("EAGLE-3", E3, _EAGLE3))
        for k, (tokens, ms) in table.items()
    ),
    Published(
        "SGLang, Llama 3.3 70B, 8 H100, EAGLE-3, tree of 64", PULL, MODELS["70b"], E70, "h100", 8, 8, 64, 5.88,
        88.61, 234.54 / 88.61,
    ),
    Published(
        "EAGLE-3 paper, Llama 3.1 8B [A100], tree [of 60]", "arXiv 2503.01840", MODELS["8b"], E3, "a100", 1, 8, 60, 6.23, 0.0,
        4.44,
    ),
    Published(
        "EAGLE-3 paper, Llama 3.3 70B [4 A100], tree [of 60]", "arXiv 2503.01840", MODELS["70b"], E70, "a100", 4, 8, 60, 5.88,
        0.0, 4.12,
    ),
]  # fmt: skip


def calibrated(row: Published) -> Setting:
    """The setting whose plain decoding has the published speed; without one, 70% of the rates."""
    link = LINKS["nvlink3" if row.hardware == "a100" else "nvlink4"] if row.devices > 1 else None
    setting = Setting(HARDWARE[row.hardware], 1, 500, row.devices, link=link, efficiency=0.7)
    if not row.plain:
        return setting
    full = forward(row.target, replace(setting, efficiency=1.0))
    return replace(setting, efficiency=(full.seconds - full.communication) / (1 / row.plain - full.communication))


def predicted(row: Published, setting: Setting, each: float = 0.0) -> float:
    """Speed-up at the published tokens per step. each: seconds that every draft step takes besides."""
    drafting = min(draft_forward(row.draft, replace(setting, draft_devices=n)).seconds for n in {1, row.devices})
    call = forward(row.target, setting, row.rows).seconds + row.length * (drafting + each)
    return row.tokens * forward(row.target, setting).seconds / call


def main() -> None:
    print(
        "| published | source | rates reached | tokens per step | published | predicted | with 0.6 ms more a draft step |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in ROWS:
        setting = calibrated(row)
        reached = f"{setting.efficiency:.0%}" + ("" if row.plain else " (assumed)")
        bare, slower = predicted(row, setting), predicted(row, setting, 0.6e-3)
        cells = [row.what, row.source, reached, f"{row.tokens:.2f}", f"{row.speedup:.2f}"]
        cells += [f"{x:.2f} ({x / row.speedup - 1:+.0%})" for x in (bare, slower)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
