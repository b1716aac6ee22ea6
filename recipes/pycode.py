"""Train the shipped demonstration pair ``pycode``: a 21-layer target and a small draft on Python's own library.

    python recipes/pycode.py all                                      # everything, from nothing
    python recipes/pycode.py all --grow-from SEED --draft-from DRAFT   # start from ready models
    python recipes/pycode.py target --steps 50                        # one stage

Stages: data -> tokenizer -> seed -> target -> draft-ce -> labels -> draft -> evaluate -> export. Each reads what the
one before it left in the work folder (``runs/pycode``), and each continues where it was stopped, so this file reads
top to bottom as the run itself.

Why these shapes: on a CPU a forward pass of a small model costs mostly a fixed amount per layer. A deep, narrow target
beside a draft of a layer or two therefore makes drafting cheap, a small fraction of a target forward. Why the target
is grown: seven layers learn the same number of tokens in a third of the time, and multiplying the layers keeps what they
learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycode_card
import torch
from pycode_models import Config, Shape, build_model, held_out_loss, load_stream, logits_of, next_token_loss, trained

from outrider.evaluate.measure import machine
from outrider.files import write_whole
from outrider.models.hf.fresh import train_tokenizer
from outrider.train import data, losses, measure
from outrider.train.checkpoint import export_model, load_latest
from outrider.train.grow import multiply_layers, project_embeddings
from outrider.train.labels import read_labels, write_labels
from outrider.train.loop import train

STAGES = ("data", "tokenizer", "seed", "target", "draft-ce", "labels", "draft", "evaluate", "export")


# --- 1. data ---------------------------------------------------------------------------------------------------------


def load_documents(config: Config) -> tuple[list[data.Document], list[data.Document]]:
    """(training, held-out) files of the standard library; each distinct text once."""
    return data.split(data.deduplicate(data.find_documents(config.source)))


def stage_data(config: Config) -> None:
    """Record which files are used, by path, size and hash."""
    training, held_out = load_documents(config)
    corpus = {
        "python": sys.version.split()[0],
        **{
            name: {"files": len(part), "bytes": sum(len(d.text.encode()) for d in part)}
            for name, part in (("training", training), ("held_out", held_out))
        },
        "digests": {d.path: d.digest for d in (*training, *held_out)},
    }
    config.work.mkdir(parents=True, exist_ok=True)
    (config.work / "corpus.json").write_text(json.dumps(corpus, indent=1) + "\n")
    print({k: v for k, v in corpus.items() if k != "digests"})


# --- 2. tokenizer ----------------------------------------------------------------------------------------------------


def stage_tokenizer(config: Config) -> None:
    """Train the tokenizer on the training files, encode both parts, check the round trip."""
    from transformers import AutoTokenizer

    training, held_out = load_documents(config)
    folder = config.work / "tokenizer"
    if config.grow_from is None:
        train_tokenizer([d.text for d in training], config.vocabulary).save_pretrained(folder)
    else:
        AutoTokenizer.from_pretrained(config.grow_from).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for document in held_out:
        ids = tokenizer.encode(document.text, add_special_tokens=False)
        if tokenizer.decode(ids) != document.text:
            raise ValueError(f"{document.path}: decode(encode(text)) differs from the text")
    for name, part in (("training", training), ("held_out", held_out)):
        stream = data.encode(part, tokenizer, tokenizer.eos_token_id)
        np.save(config.work / f"{name}.npy", stream, allow_pickle=False)
        size = sum(len(d.text.encode()) for d in part)
        print(f"{name}: {len(stream):,} tokens, {size / len(stream):.3f} bytes/token")


# --- 3. seed and target -----------------------------------------------------------------------------------------------


def training_batches(config: Config) -> data.Batches:
    """The training files as shuffled windows."""
    return data.Batches(load_stream(config, "training"), config.rows, config.length, config.seed)


def stage_seed(config: Config) -> None:
    """Train the shallow model that the target grows out of, unless one is given."""
    if config.grow_from is not None:
        print(f"skipped: growing from {config.grow_from.name}")
        return
    model = build_model(config.small, config)
    train(
        model, training_batches(config), next_token_loss, config.seed_loop, config.work / "seed", held_out_loss(config)
    )


def seed_model(config: Config) -> torch.nn.Module:
    """The trained seed, float32."""
    from transformers import AutoModelForCausalLM

    if config.grow_from is not None:
        return AutoModelForCausalLM.from_pretrained(config.grow_from, dtype=torch.float32)
    return trained(config.small, "seed", config)


def stage_target(config: Config) -> None:
    """Grow the seed to its full depth and continue training."""
    model = multiply_layers(seed_model(config), config.growth)
    print(f"target: {sum(p.numel() for p in model.parameters()):,} parameters")
    evaluate = held_out_loss(config)
    with torch.no_grad():
        print("before the first step", evaluate(model.eval()))
    train(model, training_batches(config), next_token_loss, config.target_loop, config.work / "target", evaluate)


# --- 4. draft --------------------------------------------------------------------------------------------------------


def draft_batches(config: Config, seed: int) -> data.Batches:
    """Training windows for the draft: a larger batch, and another order than the target saw."""
    return data.Batches(load_stream(config, "training"), config.draft_rows, config.length, seed)


def stage_draft_ce(config: Config) -> None:
    """Next-token training of the draft: cheap, since the target is not asked. Skipped if a draft is given."""
    if config.draft_from is not None:
        print(f"skipped: distilling {config.draft_from.name}")
        return
    model = build_model(config.draft, config)
    project_embeddings(seed_model(config), model)
    print(f"draft: {sum(p.numel() for p in model.parameters()):,} parameters")
    train(
        model,
        draft_batches(config, config.seed + 1),
        next_token_loss,
        config.draft_ce_loop,
        config.work / "draft-ce",
        held_out_loss(config),
    )


def draft_model(config: Config) -> torch.nn.Module:
    """The draft before distillation: the one given, or the one that ``draft-ce`` trained."""
    if config.draft_from is not None:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(config.draft_from, dtype=torch.float32)
    return trained(config.draft, "draft-ce", config)


def target_shape(config: Config) -> Shape:
    """The seed's shape with ``growth`` times its layers."""
    return replace(config.small, layers=config.growth * config.small.layers)


def stage_labels(config: Config) -> None:
    """Ask the target once about the text that the draft will be distilled on."""
    stream = load_stream(config, "training")
    tokens = data.windows(stream, config.length, config.label_windows)
    write_labels(trained(target_shape(config), "target", config), tokens, config.work / "labels")


def distillation_loss(draft: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], progress: float):
    """KL(p || q) first, then mostly TV(p, q), which is one minus acceptance."""
    tokens, wanted = batch
    tv, kl = (0.0, 1.0) if progress < 2 / 3 else (1.0, 0.1)
    return losses.distillation(wanted, logits_of(draft, tokens[:, :-1]), tv, kl)


def stage_draft(config: Config) -> None:
    """Distil the target into the draft."""
    target = trained(target_shape(config), "target", config)
    model = draft_model(config)
    labels = read_labels(config.work / "labels", config.draft_rows, config.seed + 2)
    windows = data.windows(load_stream(config, "held_out"), config.length, 12)

    def evaluate(draft: torch.nn.Module) -> dict[str, float]:
        found = measure.compare(target, draft, windows, (1.0,))
        return {"acceptance": found.acceptance[0].mean, "greedy_agreement": found.greedy_agreement}

    train(model, labels, distillation_loss, config.draft_loop, config.work / "draft", evaluate)


# --- 5. evaluate -----------------------------------------------------------------------------------------------------


def outside_documents() -> list[data.Document]:
    """Python that no model here was trained on: the ``generation`` package of transformers."""
    import transformers

    return data.find_documents(Path(transformers.__file__).parent / "generation")


def load_pair(folder: Path) -> dict[str, torch.nn.Module]:
    """{"target": ..., "draft": ...} of a folder that holds both, float32."""
    from transformers import AutoModelForCausalLM

    names = ("target", "draft")
    return {n: AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32).eval() for n in names}


def stage_evaluate(config: Config) -> None:
    """Measure the pair as it will be shipped (after rounding to bfloat16), and a baseline with its own tokenizer."""
    from transformers import AutoTokenizer

    export_pair(config, config.work / "pair")
    training, held_out = load_documents(config)
    documents = {
        "held_out": held_out,
        "outside": outside_documents(),
        "training": training[: len(training) // 8],  # for the gap between seen and unseen text only
    }

    def measured(folder: Path) -> dict:
        pair, tokenizer = load_pair(folder), AutoTokenizer.from_pretrained(folder / "target")
        texts = {name: data.encode(part, tokenizer, tokenizer.eos_token_id) for name, part in documents.items()}
        short = measure.pair_report(pair, tokenizer, texts, config.evaluated_length, config.evaluated_windows)
        unseen = {name: texts[name] for name in ("held_out", "outside")}
        long = measure.pair_report(pair, tokenizer, unseen, config.length, config.evaluated_windows // 2)
        parameters = {role: sum(p.numel() for p in model.parameters()) for role, model in pair.items()}
        return short | {"long": long, "parameters": parameters}

    report = {"pycode": measured(config.work / "pair")}
    if config.baseline is not None:
        report["baseline"] = measured(config.baseline)
    (config.work / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


# --- 6. export -------------------------------------------------------------------------------------------------------


def export_pair(config: Config, folder: Path) -> None:
    """Both models and the tokenizer as transformers folders, bfloat16."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.work / "tokenizer")
    export_model(trained(target_shape(config), "target", config), tokenizer, folder / "target")
    export_model(trained(config.draft, "draft", config), tokenizer, folder / "draft")


def stage_export(config: Config) -> None:
    """Replace the shipped pair, its prompts and its model card."""
    from transformers import AutoTokenizer

    export_pair(config, config.assets)
    tokenizer = AutoTokenizer.from_pretrained(config.assets / "target")
    _, held_out = load_documents(config)
    rows = data.excerpts(held_out, tokenizer, count=64, seed=config.seed)
    write_whole(config.assets / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_whole(config.assets / "README.md", pycode_card.model_card(config, gather_facts(config)).encode())


def processor() -> str:
    """The name of this machine's processor and its vector units, as far as it tells."""
    return f"{machine()['cpu']} ({torch.backends.cpu.get_cpu_capability()})"


def gather_facts(config: Config) -> dict:
    """What the stages left behind, for the model card."""
    facts = {name: json.loads((config.work / f"{name}.json").read_text()) for name in ("corpus", "report")}
    for name in ("seed", "target", "draft-ce", "draft"):
        checkpoint = load_latest(config.work / name)
        facts[name] = checkpoint.state if checkpoint else None
    # What a given model replaces may still lie in the work folder, but it is not part of this pair.
    facts |= {"seed": None} if config.grow_from else {}
    facts |= {"draft-ce": None} if config.draft_from else {}
    autocast = facts["target"]["config"]["autocast"]
    facts["precision"] = "bfloat16 products, float32 weights" if autocast else "float32"
    facts["machine"] = f"{torch.get_num_threads()} threads of a shared {processor()}"
    facts["tokens"] = {name: len(load_stream(config, name)) for name in ("training", "held_out")}
    return facts


# --- the command line ------------------------------------------------------------------------------------------------


def main(config: Config, stages: tuple[str, ...]) -> None:
    """Run ``stages`` in order."""
    functions = (
        stage_data,
        stage_tokenizer,
        stage_seed,
        stage_target,
        stage_draft_ce,
        stage_labels,
        stage_draft,
        stage_evaluate,
        stage_export,
    )
    run = dict(zip(STAGES, functions, strict=True))
    for stage in stages:
        print(f"--- {stage}", flush=True)
        run[stage](config)


def parse(arguments: list[str] | None = None) -> tuple[Config, tuple[str, ...]]:
    """Command line -> configuration and stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--work", type=Path, help="folder for everything intermediate (default runs/pycode)")
    parser.add_argument("--steps", type=int, help="steps of the training stage that runs")
    parser.add_argument("--lr", type=float, help="peak learning rate of the training stage that runs")
    parser.add_argument("--draft-from", type=Path, help="a trained draft of the same tokenizer to distil into")
    parser.add_argument("--grow-from", type=Path, help="a trained seed (model and tokenizer) to grow from")
    parser.add_argument("--baseline", type=Path, help="an older pair (target/, draft/) to measure beside this one")
    parser.add_argument("--rows", type=int, help="windows per batch")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 products (AVX512_BF16 or AMX): 2.5x faster")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    given = parser.parse_args(arguments)
    set_loop = {k: getattr(given, k) for k in ("steps", "lr") if getattr(given, k) is not None}
    set_loop |= {k: True for k in ("autocast", "compile") if getattr(given, k)}
    loops = ("seed_loop", "target_loop", "draft_ce_loop", "draft_loop")
    set_here = {
        k: getattr(given, k)
        for k in ("work", "rows", "grow_from", "draft_from", "baseline")
        if getattr(given, k) is not None
    }
    config = Config()
    config = replace(config, **set_here, **{k: replace(getattr(config, k), **set_loop) for k in loops})
    return config, STAGES if given.stage == "all" else (given.stage,)


if __name__ == "__main__":
    main(*parse())
