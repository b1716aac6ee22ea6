"""How much faster than the transformers path is our own runtime for each of its families, with the same greedy text?

    python benchmarks/dense.py [gemma2 olmo2 ...] [--tokens 200] [--rounds 5] [--hidden 512] [--layers 8] [--dtype float32]

Random models, saved as folders and loaded twice, as Outrider loads them and with `implementation="hf"`. Every round decodes the
same tokens plainly with both, in turn; printed are tokens per second (medians), the median of the ratios of a round with their
range, and whether the texts are equal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from outrider import Engine, SamplingParams
from outrider.models.families import FAMILIES
from outrider.models.load import load_target

PROMPT = [7 * i % 90 + 5 for i in range(24)]


def save(family: str, folder: Path, hidden: int, layers: int, dtype: torch.dtype) -> None:
    """A random model, the same every time, whose greedy text wanders."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, max_position_embeddings=2048,
        initializer_range=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)


def measure(family: str, *, tokens: int, rounds: int, hidden: int, layers: int, dtype: str) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory() as place:
        save(family, Path(place), hidden, layers, getattr(torch, dtype))
        targets = {
            kind: load_target(place, implementation=kind, max_length=1024, dtype=dtype) for kind in ("lean", "hf")
        }
        engines = {k: Engine.build(target=t, draft="none", length=0, slots=1) for k, t in targets.items()}
        rate: dict[str, list[float]] = {kind: [] for kind in engines}
        texts = {}
        for r in range(rounds + 1):
            for kind in sorted(engines, reverse=bool(r % 2)):
                start = time.perf_counter()
                texts[kind] = engines[kind].generate([PROMPT], params)[0].outputs[0].token_ids
                rate[kind] += [tokens / (time.perf_counter() - start)] if r else []  # the first round warms up
    ratios = [a / b for a, b in zip(rate["lean"], rate["hf"], strict=True)]
    ours, theirs = (statistics.median(rate[kind]) for kind in ("lean", "hf"))
    text = "equal" if texts["lean"] == texts["hf"] else "differs"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {family} | {ours:.0f} | {theirs:.0f} | {statistics.median(ratios):.2f} | {spread} | {text} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    for name, default in (("tokens", 200), ("rounds", 5), ("hidden", 512), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    wanted = vars(parser.parse_args())
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, threads {torch.get_num_threads()}\n")
    print(
        "| family | own runtime, tokens/s | transformers path, tokens/s | ratio | range | text |\n|---|---|---|---|---|---|"
    )
    for family in wanted.pop("families"):
        print(measure(family, **wanted), flush=True)


if __name__ == "__main__":
    main()
