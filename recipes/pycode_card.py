"""The model card of the pair ``pycode``, written from what the recipe measured. Used by ``pycode.py export``."""

from __future__ import annotations

LIMITS = """\
## Intended use and limits

For demonstrations, tests and benchmarks of speculative decoding on a CPU, without a download. The text is babble in
the shape of Python: indentation, docstrings and common idioms are right, meaning is absent. Never run what it writes.
The training text is the standard library with its tests and their comments, unfiltered. Beyond 512 tokens of context
the models were not trained, though their configuration admits 1,024.

## Licence

Weights: Apache-2.0. Training text: the sources of CPython, under the PSF licence; `prompts.jsonl` holds short excerpts
of its held-out files, each with the path it is from.
"""


TEXTS = (("held_out", "held-out files"), ("outside", "outside text"), ("own_samples", "own samples"))
STAGES = (("seed", "seed"), ("target", "target, grown"), ("draft-ce", "draft, on text"), ("draft", "draft, distilled"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def run_row(name: str, state: dict | None) -> list[str]:
    """One training stage: steps, tokens, minutes and peak learning rate."""
    if state is None:
        return [name, "-", "-", "-", "-"]
    loop = state["config"]
    done = f"{state['step']:,}" + ("" if state["step"] == loop["steps"] else f" of {loop['steps']:,}")
    return [name, done, f"{state['tokens'] / 1e6:.2f}M", f"{state['seconds'] / 60:.0f}", f"{loop['lr']:g}"]


def loss_rows(report: dict) -> list[list[str]]:
    """Loss and bits per byte, a row per pair, model and text."""
    rows = []
    for pair, measured in report.items():
        for role in ("target", "draft"):
            cells = [f"{pair} {role}"]
            for text in ("held_out", "outside", "training"):
                value = measured[text][role]
                cells.append(f"{value['nats_per_token']:.3f} / {value['bits_per_byte']:.3f}")
            rows.append(cells)
    return rows


def acceptance_rows(report: dict) -> list[list[str]]:
    """Acceptance with its spread, a row per pair and text."""
    rows = []
    for pair, measured in report.items():
        for text, label in TEXTS:
            kept = [f"{a['mean']:.3f} ± {a['spread']:.2f}" for a in measured[text]["acceptance"]]
            greedy = measured[text].get("greedy_agreement")
            rows.append([pair, label, *kept, "-" if greedy is None else f"{greedy:.3f}"])
    return rows


def counted(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def shape_line(shape, layers: int) -> str:
    """Layers, width, heads and inner size of a model."""
    return (
        f"{counted(layers, 'layer')} of {shape.hidden}, {counted(shape.heads, 'head')} and "
        f"{counted(shape.kv_heads, 'key-value head')} of {shape.head_dim}, {shape.intermediate} inside"
    )


def origin(facts: dict) -> str:
    """Where the models started: trained by this recipe, or earlier models, which is then said with its caveat."""
    given = [label for name, label in (("seed", "target's seed"), ("draft-ce", "draft's start")) if facts[name] is None]
    if not given:
        return "Both models were trained from nothing by this recipe."
    return (
        f"For the shipped weights the {' and the '.join(given)} came, with the tokenizer, from an earlier pair,"
        " `pycode-v0` (targets of 6 layers and a draft of 2, trained on 7.8M and 16.1M tokens of the same library in"
        " windows of 256); this recipe trains such models itself when none is given, but the shipped ones were not"
        " made that way. **Caveat:** the earlier pair also held out one file in forty, by a rule that is not recorded,"
        " so it has probably seen most of our held-out files. Held-out numbers are therefore optimistic; *outside* is"
        " text that neither pair was trained on."
    )


def model_card(config, facts: dict) -> str:
    """The whole README of the assets folder."""
    corpus, report, tokens = facts["corpus"], facts["report"], facts["tokens"]
    train, held = corpus["training"], corpus["held_out"]
    small, draft = config.small, config.draft
    stages = table(
        ["stage", "steps", "tokens", "minutes", "peak learning rate"],
        [run_row(label, facts[name]) for name, label in STAGES],
    )
    return f"""\
# pycode: a target and its draft

Two small Llama models of Python text that share a byte-level BPE tokenizer of {config.vocabulary:,} entries.

- target: {shape_line(small, small.layers * config.growth)}; grown from {counted(small.layers, "layer")} \
by adding silent copies
- draft: {shape_line(draft, draft.layers)}; distilled from the target (KL, then total variation)

Rebuilt by `python recipes/pycode.py all`.

## Data

The `.py` files of the standard library of Python {corpus["python"]}, tests included, each distinct text once:
{train["files"]:,} files, {train["bytes"]:,} bytes, {tokens["training"]:,} tokens for training;
{held["files"]} files, {held["bytes"]:,} bytes, {tokens["held_out"]:,} tokens held out: one file
in forty, chosen by a hash of its path.

## Training

{stages}
On a shared 2-core x86 server processor (AVX2), one or two threads, float32, AdamW; minutes are wall time beside other
work. {origin(facts)}

## Measured

After rounding to bfloat16, computed in float32, on
{report["pycode"]["held_out"]["tokens"]:,} held-out tokens in windows of {config.evaluated_length}.
*Outside* is the `generation` package of transformers; *training* is there to show the gap.
Nats per token / bits per byte:

{table(["model", "held out", "outside", "training"], loss_rows(report))}
Acceptance, the mean over positions of sum min(p, q), with its standard deviation from context to context:

{table(["pair", "text", "T = 1", "T = 0.7", "T = 0.5", "same argmax"], acceptance_rows(report))}
{LIMITS}"""
