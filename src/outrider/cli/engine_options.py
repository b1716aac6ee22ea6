"""The options of an engine on the command line, and from them to an engine with its progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import paths, terminal
from outrider.cli.takes import Table, defaults_of
from outrider.options import EngineOptions

if TYPE_CHECKING:
    from outrider.build import Engine

ENGINE = Table(
    EngineOptions,
    {
        "target": Annotated[
            str | None,
            typer.Option(
                "--target",
                "-t",
                callback=paths.model,
                help="Target model: a folder, a GGUF file or a Hub name. Default: the shipped pair.",
                show_default=False,
            ),
        ],
        "draft": Annotated[
            str,
            typer.Option(
                "--draft",
                "-d",
                callback=paths.drafter,
                help="What proposes draft tokens: none, ngram, auto, a folder, a GGUF file or a Hub name, or several joined by "
                "'+' (the first that has a draft is used).",
            ),
        ],
        "length": Annotated[
            int,
            typer.Option(
                "--length", "-l", min=0, max=64, help="Draft length: tokens proposed per step; 0 is plain decoding."
            ),
        ],
        "lengths": Annotated[
            str,
            typer.Option(
                "--lengths",
                help="What sets draft lengths: fixed (--length), adaptive (one for all, by load), per_sequence (each its own), "
                "bass; 'per_sequence:12': at most 12. Default: adaptive in a server, else fixed.",
                show_default=False,
            ),
        ],
        "rule": Annotated[
            str,
            typer.Option(
                "--rule",
                callback=paths.rule,
                help="Verification rule. Exact: auto, speculative_sampling, block, k_seq, optimal_transport, spechub, "
                "traversal, match. Lossy, with --allow-lossy: tv_budget:per_token=0.05,per_sequence=2, over_acceptance, "
                "lenience, mentored, typical, top_k; of images also neighbours, cluster.",
            ),
        ],
        "allow_lossy": Annotated[
            bool,
            typer.Option(
                "--allow-lossy",
                help="Allow a rule that changes the distribution of the text; every output then says by how much.",
            ),
        ],
        "dtype": Annotated[
            str,
            typer.Option("--dtype", help="Number format of the weights: auto, bfloat16, float16, float32 or float64."),
        ],
        "device": Annotated[str, typer.Option("--device", help="Where the models run: auto, cpu or cuda.")],
        "target_quantize": Annotated[
            str | None,
            typer.Option(
                "--quantize-target",
                help="Round the target's weights to q8_0, q5_0, q4_0, ...: another, faster model; its distance is printed.",
                show_default=False,
            ),
        ],
        "draft_quantize": Annotated[
            str | None,
            typer.Option(
                "--quantize-draft",
                help="Round the weights of a draft model or a trained drafter to q8_0, q4_0, ...; an exact rule keeps the target's "
                "distribution.",
                show_default=False,
            ),
        ],
        "draft_vocabulary": Annotated[
            str | None,
            typer.Option(
                "--draft-vocabulary",
                metavar="N|auto",
                help="Keep only the N tokens in the draft model's head that the target uses most, as in --draft-vocabulary 16384: "
                "a shorter pass, fewer accepted tokens; both are predicted. auto: as many as pay, all where no fewer do.",
                show_default=False,
            ),
        ],
        "implementation": Annotated[
            str,
            typer.Option(
                "--implementation",
                help="Runtime of the models: auto, lean (ours) or hf (the unmodified Hugging Face model).",
            ),
        ],
        "slots": Annotated[int, typer.Option("--slots", min=1, max=1024, help="Sequences decoded at the same time.")],
        "max_length": Annotated[
            int | None,
            typer.Option(
                "--max-length",
                help="Context to reserve in the KV cache, for prompt and output, in tokens. Default: the model's.",
                show_default=False,
            ),
        ],
        "prefix_cache": Annotated[
            bool,
            typer.Option(
                "--prefix-cache/--no-prefix-cache",
                help="Keep what was computed for the beginnings of prompts, so that a chat's next turn reads only what is new.",
            ),
        ],
        "kv_memory": Annotated[
            float | None,
            typer.Option(
                "--kv-memory",
                help="GB of memory for the keys and values of target and drafter, as in --kv-memory 2. Sequences that do not fit "
                "wait. Default: what all slots could fill, at most 90% of what is free.",
                show_default=False,
            ),
        ],
        "kv_dtype": Annotated[
            str,
            typer.Option(
                "--kv-dtype",
                help="How the target's keys and values are stored: auto (as its weights), float32, bfloat16, or int8 (half the "
                "memory of bfloat16, another model; its distance is printed).",
            ),
        ],
        "input_bits": Annotated[
            int,
            typer.Option(
                "--input-bits",
                help="To how many bits products with quantised weights of the target round their inputs: 8, or 16 (nearer to the "
                "weights' own values, slower).",
            ),
        ],
    },
    defaults_of(EngineOptions),
)
"""Field of `EngineOptions` -> its option. `chunk` has none."""
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        help="vLLM's speculative_config as JSON, unchanged; replaces --draft and --length.",
        show_default=False,
    ),
]


def configured(options: EngineOptions, speculative_config: str | None) -> EngineOptions:
    """The options, with what vLLM's JSON says in their place where it is given. Raises ConfigError for what is not supported."""
    if speculative_config is None:
        return options
    from outrider.drafters.registry import parse_speculative_config

    return options.changed(**parse_speculative_config(speculative_config))


def load_engine(options: EngineOptions, *, texts: bool = True, **wiring: Any) -> Engine:
    """`build_engine` with a progress bar and with notices (fallbacks, choices) on stderr. texts: the engine is given texts, so that
    a target without a tokenizer is refused, before its weights are read. wiring: sinks and the like."""
    from dataclasses import asdict

    from outrider.build import build_engine

    with terminal.loading("loading") as progress:
        if texts and options.target is not None:
            wiring["tokenizer"] = tokenizer_of(options.target, options.dtype)
        engine = build_engine(progress=progress, **asdict(options), **wiring)
    tell(engine.notices)
    return engine


def tokenizer_of(target: str, dtype: str) -> Any:
    """The tokenizer of a target. Raises ConfigError as `doctor` says it; what keeps the model from running goes first."""
    from outrider.models.load import find_tokenizer, inspect_checkpoint, load_tokenizer

    found = find_tokenizer(target)
    if found is not None:
        return found
    inspect_checkpoint(target, dtype=dtype)
    return load_tokenizer(target)


def tell(notices: Iterable[str]) -> None:
    """Say on stderr what keeps an engine from being faster, each once."""
    for notice in dict.fromkeys(notices):
        terminal.say(notice)
