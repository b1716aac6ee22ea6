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


def loss_columns(config) -> list[str]:
    """Names of the columns of ``loss_rows``."""
    short, long = config.evaluated_length, config.length
    return [f"held out, {short}", f"outside, {short}", f"training, {short}", f"held out, {long}", f"outside, {long}"]


def loss_rows(report: dict) -> list[list[str]]:
    """Nats per token / bits per byte, a row per pair and model: three texts in short windows, two in long ones."""
    rows = []
    for pair, measured in report.items():
        places = [measured[text] for text in ("held_out", "outside", "training")]
        places += [measured["long"][text] for text in ("held_out", "outside")]
        for role in ("target", "draft"):
            cells = [f"{p[role]['nats_per_token']:.3f} / {p[role]['bits_per_byte']:.3f}" for p in places]
            rows.append([f"{pair} {role}", *cells])
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
        " `pycode-v0` (a target of 6 layers and a draft of 2, trained on 7.8M and 16.1M tokens of the same library in"
        " windows of 256); this recipe trains such models itself when none is given, but the shipped ones were not"
        " made that way. **Caveat:** the earlier pair also held out one file in forty, by a rule that is not recorded,"
        " so it has probably seen most of our held-out files. Held-out numbers are therefore optimistic; *outside* is"
        " text that neither pair was trained on."
    )


def against_baseline(config, report: dict) -> str:
    """One sentence: how much better or worse the target predicts than the baseline's, by text and window length.

    In bits per byte, since the two may have different vocabularies.
    """
    if "baseline" not in report:
        return ""
    changes = []
    for text, label in TEXTS[:2]:
        for key, length in ((None, config.evaluated_length), ("long", config.length)):
            ours, theirs = (report[pair] if key is None else report[pair][key] for pair in ("pycode", "baseline"))
            change = ours[text]["target"]["bits_per_byte"] - theirs[text]["target"]["bits_per_byte"]
            changes.append(f"{change:+.3f} on {label} at {length}")
    return (
        f"Against the baseline's, the target's loss changes by {', '.join(changes)} (bits per byte; below zero is better)."
        " Windows are counted in each pair's own tokens.\n"
    )


def command(facts: dict) -> str:
    """What makes a pair like this one: from nothing, or from ready models."""
    options = {"seed": " --grow-from pycode-v0/target", "draft-ce": " --draft-from pycode-v0/draft"}
    return "python recipes/pycode.py all" + "".join(o for name, o in options.items() if facts[name] is None)


def model_card(config, facts: dict) -> str:
    """The whole README of the assets folder."""
    corpus, report, tokens = facts["corpus"], facts["report"], facts["tokens"]
    train, held = corpus["training"], corpus["held_out"]
    small, draft, size = config.small, config.draft, report["pycode"]["parameters"]
    stages = table(
        ["stage", "steps", "tokens", "minutes", "peak learning rate"],
        [run_row(label, facts[name]) for name, label in STAGES],
    )
    return f"""\
# pycode: a target and its draft

Two small Llama models of Python text that share a byte-level BPE tokenizer of {config.vocabulary:,} entries.

- target, {size["target"]:,} parameters: {shape_line(small, small.layers * config.growth)}; \
grown from {counted(small.layers, "layer")} by adding silent copies
- draft, {size["draft"]:,} parameters: {shape_line(draft, draft.layers)}; \
distilled from the target (KL, then total variation)

Made by `{command(facts)}`.

## Data

The `.py` files of the standard library of Python {corpus["python"]}, tests included, each distinct text once:
{train["files"]:,} files, {train["bytes"]:,} bytes, {tokens["training"]:,} tokens for training;
{held["files"]} files, {held["bytes"]:,} bytes, {tokens["held_out"]:,} tokens held out: one file
in forty, chosen by a hash of its path.

## Training

{stages}
On {facts["machine"]}, AdamW, {facts["precision"]}; minutes are wall time beside other work. {origin(facts)}

## Measured

After rounding to bfloat16, computed in float32, on {report["pycode"]["held_out"]["tokens"]:,} tokens of each text.
*Outside* is the `generation` package of transformers; *training* is there to show the gap; the number is the length of
the windows that a text is cut into. Nats per token / bits per byte:

{table(["model", *loss_columns(config)], loss_rows(report))}
{against_baseline(config, report)}
Acceptance, the mean over positions of sum min(p, q), with its standard deviation from context to context
(windows of {config.evaluated_length}):

{table(["pair", "text", "T = 1", "T = 0.7", "T = 0.5", "same argmax"], acceptance_rows(report))}
{LIMITS}"""
