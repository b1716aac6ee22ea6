"""Are families that leave our own runtime as fast here as in transformers' own `generate`, with the same greedy text?

    python benchmarks/families.py [bloom mamba ...] [--tokens 500] [--rounds 3] [--hidden 256] [--layers 4]

Random models of families without a place in the fast paths, made here from their configurations. Every round decodes the same
tokens with both, in turn; printed are seconds (medians), the median of the ratios of a round with their range, and whether
the texts are equal.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outrider import Engine, SamplingParams
from outrider.models.hf.target import HFTarget

PROMPT = [7 * i % 90 + 5 for i in range(24)]
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def sizes(family: str, hidden: int, layers: int, positions: int) -> dict[str, Any]:
    """What the configuration of `family` is given, with heads of 16 numbers (`layers` even)."""
    heads = hidden // 16
    new = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 16,
        "max_position_embeddings": positions,
    }
    table = attending(hidden, layers, heads, positions, new) | with_states(hidden, layers, heads, positions, new)
    return {"vocab_size": 512, "initializer_range": 0.1, "init_std": 0.1, "use_cache": True, **_IDS, **table[family]}


def attending(hidden: int, layers: int, heads: int, positions: int, new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Families of attention alone. new: the sizes under the names that newer families share."""
    old = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions}
    long = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": positions // 2,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [3.0 + i for i in range(8)],
    }
    return {
        "bloom": {"hidden_size": hidden, "n_layer": layers, "n_head": heads},
        "mpt": {"d_model": hidden, "n_layers": layers, "n_heads": heads, "max_seq_len": positions},
        "falcon": {k: v for k, v in new.items() if k != "head_dim"} | {"alibi": False},
        "stablelm": new,
        "nemotron": new,
        "gptj": {**old, "rotary_dim": 8},
        "gpt_neo": {
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "attention_types": [[["global", "local"], layers // 2]],
            "window_size": 16,
            "max_position_embeddings": positions,
        },
        "llama4_text": {
            **new,
            "intermediate_size_mlp": 2 * hidden,
            "num_local_experts": 2,
            "attention_chunk_size": 4 * positions,
        },
        "phi3": {**new, "rope_parameters": long, "original_max_position_embeddings": positions // 2},
    }


def with_states(hidden: int, layers: int, heads: int, positions: int, new: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Families with a recurrent or convolutional state, in all of their layers or in some."""
    inner = {"hidden_size": hidden, "num_hidden_layers": layers, "state_size": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    half = layers // 2
    linear = {
        "linear_num_key_heads": heads // 2,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"] * half,
    }
    mamba2 = {"mamba_n_heads": 2 * heads, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
    return {
        "mamba": inner,
        "mamba2": {**inner, "num_heads": 2 * heads, "head_dim": 16, "n_groups": 1},
        "falcon_mamba": inner,
        "rwkv": {"hidden_size": hidden, "num_hidden_layers": layers, "context_length": positions},
        "jamba": {
            **new,
            **experts,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "bamba": {**new, **mamba2, "attn_layer_indices": list(range(1, layers, 2))},
        "lfm2": {**new, "layer_types": ["conv", "full_attention"] * half},
        "qwen3_next": {**new, **experts, **linear, "shared_expert_intermediate_size": hidden},
        "olmo_hybrid": {**new, **linear},
    }


FAMILIES = tuple(
    """bloom mpt falcon stablelm nemotron gptj gpt_neo llama4_text phi3 mamba mamba2 falcon_mamba rwkv jamba bamba lfm2
    qwen3_next olmo_hybrid""".split()  # noqa: SIM905
)


def known(family: str) -> bool:
    """Whether this release of transformers has it."""
    try:
        AutoConfig.for_model(family)
    except ValueError:
        return False
    return True


def build(family: str, *, hidden: int = 32, layers: int = 2, positions: int = 64) -> PreTrainedModel:
    """A random model, the same every time, whose greedy text wanders and ends at no token."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family, **sizes(family, hidden, layers, positions))
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # some families start at one or zero what should differ
        parameter.data += 0.02 * torch.randn_like(parameter)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def engine_of(model: PreTrainedModel, positions: int) -> Engine:
    """Plain decoding of one sequence."""
    return Engine.build(target=HFTarget(model), draft="none", length=0, slots=1, max_length=positions)


def ours(engine: Engine, tokens: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return list(engine.generate([PROMPT], params)[0].outputs[0].token_ids)


@torch.no_grad()
def theirs(model: PreTrainedModel, tokens: int, **options: Any) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, do_sample=False, **options)  # type: ignore[operator]
    return out[0, len(PROMPT) :].tolist()


def measure(family: str, *, tokens: int, rounds: int, hidden: int, layers: int) -> dict[str, Any]:
    """Interleaved rounds of both, after one short round of each that is not counted."""
    positions = 2 * (len(PROMPT) + tokens)
    model = build(family, hidden=hidden, layers=layers, positions=positions)
    engine = engine_of(model, len(PROMPT) + tokens)
    ours(engine, 8), theirs(model, 8)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    texts: dict[str, list[int]] = {}
    arms = {"ours": lambda: ours(engine, tokens), "theirs": lambda: theirs(model, tokens)}
    for r in range(rounds):
        for name in sorted(arms, reverse=bool(r % 2)):
            start = time.perf_counter()
            texts[name] = arms[name]()
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "family": family,
        "path": engine.parts.target.path,  # type: ignore[attr-defined]
        "ours": statistics.median(seconds["ours"]),
        "theirs": statistics.median(seconds["theirs"]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "equal": texts["ours"] == texts["theirs"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    for name, default in (("tokens", 500), ("rounds", 3), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = vars(parser.parse_args())
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, threads {torch.get_num_threads()}\n")
    print("| family | path | ours, s | transformers, s | ratio | range | text |\n|---|---|---|---|---|---|---|")
    for family in filter(known, wanted.pop("families")):
        m = measure(family, **wanted)
        text = "equal" if m["equal"] else "differs"
        print(
            f"| {family} | {m['path']} | {m['ours']:.2f} | {m['theirs']:.2f} | {m['ratio']:.2f} "
            f"| {m['low']:.2f} to {m['high']:.2f} | {text} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
