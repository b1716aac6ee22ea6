"""Every family of the installed transformers that can continue text: does it run here, how, how fast, and is its text the same?

    python benchmarks/model_table.py [llama mamba ...] --out rows.jsonl [--tokens 48] [--rounds 3] [--seconds 240]

Each family is built small and random (seeded, a few layers of 64), saved as a checkpoint, loaded as any checkpoint is, and
decoded greedily: by transformers' own `generate`, plainly, with n-gram drafts, and with drafts of its own text in which every
fifth token is wrong. A family takes a process of its own, and its row is written when it is done: a run that was stopped goes
on where it was. `benchmarks/model_page.py` makes the page of the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from outrider import Engine, SamplingParams
from outrider.build import companion
from outrider.drafters.tree.forest import chains
from outrider.errors import OutriderError
from outrider.models.admit import model_class
from outrider.models.load import inspect_checkpoint
from outrider.types import Draft, Evidence

VOCAB, WIDTH, LAYERS, POSITIONS = 512, 64, 4, 512
PROMPT = [7 * i % 90 + 5 for i in range(24)]
PICTURED = (
    "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "llava_next", "internvl", "smolvlm", "idefics3",
    "paligemma", "aya_vision", "glm4v", "glm4v_moe", "cohere2_vision", "lfm2_vl",
)  # fmt: skip
"""Families that read pictures besides; those of them that transformers also has as causal models are among the others."""
FAMILIES = tuple(sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *PICTURED}))


def each(names: str, value: Any) -> dict[str, Any]:
    """The same value for every name."""
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **each("hidden_size n_embd d_model dim word_embed_proj_dim attention_hidden_size embedding_dim lru_width", WIDTH),
    **each("num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers", LAYERS),
    **each("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **each("intermediate_size ffn_dim ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim d_ff", 2 * WIDTH),
    **each("intermediate_size_mlp shared_intermediate_size dense_intermediate_size block_ff_dim", 2 * WIDTH),
    **each("max_position_embeddings n_positions n_ctx max_seq_len context_length seq_length", POSITIONS),
    **each("head_dim global_head_dim swa_head_dim v_head_dim qk_nope_head_dim attention_head_dim", 16),
    **each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **each("num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts", 2),
    **each("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", WIDTH // 2),
    **each("state_size ssm_state_size mamba_d_state", 8),
    **each("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **each("mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim linear_head_dim", 16),
    **each("n_group topk_group mamba_n_groups mamba_ngroups n_groups n_shared_experts", 1),
    **each("vocab_size vocab_size_per_layer_input", VOCAB),
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 4,
    "mamba_chunk_size": 16, "chunk_size": 16,
    "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_head_dim": 24, "first_k_dense_replace": 1,
    "sliding_window": 16, "attention_window_size": 16, "attention_chunk_size": 16, "hidden_size_per_layer_input": 16,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "use_cache": True,
    "initializer_range": 0.1,
}  # fmt: skip
"""What a configuration is given of the names that it knows."""
KINDS = {kind: [kind, "full_attention"] * (LAYERS // 2) for kind in ("linear_attention", "sliding_attention", "conv")}
ALWAYS = ("num_key_value_heads", "head_dim", "num_experts_per_tok", "n_group", "topk_group")
"""Given even where the configuration has no value for them."""
OWN: dict[str, dict[str, Any]] = {
    **each("qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text olmo_hybrid minimax",
        {"layer_types": KINDS["linear_attention"]}),
    **each("gemma2 gemma3_text gemma3 gemma4_text gemma4 olmo3 gpt_oss ministral cohere2 exaone4",
        {"layer_types": KINDS["sliding_attention"]}),
    **each("lfm2 lfm2_moe lfm2_vl", {"layer_types": KINDS["conv"], "num_dense_layers": 1}),
    "glm4v": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    **each("bailing_hybrid kimi_linear", {"layer_types": KINDS["linear_attention"]}),
    **each("gemma3n_text gemma3n",
        {"layer_types": KINDS["sliding_attention"], "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2,
         "activation_sparsity_pattern": [0.0] * LAYERS}),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "num_local_experts": 0, "num_experts_per_tok": 0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "moe_layers": [0, 1, 2, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "attention_head_dim": 32,
        "attention_hidden_size": 2 * WIDTH, "mamba_expand": 2, "adapter_rank": 8},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "attention_hidden_size": 2 * WIDTH,
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    **each("qwen2_vl qwen2_5_vl", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}),
    "falcon": {"alibi": False},
    "moshi": {"sliding_window": POSITIONS},  # all of its positions, as the default: its masks know no window
    "doge": {"is_moe": False},
    "opt": {"init_std": 0.1},
}  # fmt: skip
"""What a family needs besides."""


def shrink(config: Any, own: dict[str, Any]) -> Any:
    """The configuration of a small model: the same class made again, with what it knows of `SMALL`, its parts as well."""
    held, kind = config.to_dict(), type(config)
    renamed = {v: k for k, v in getattr(kind, "attribute_map", {}).items()}
    given = {k: v for k, v in SMALL.items() if k in held and held[k] is not None and renamed.get(k) not in held}
    given |= {k: SMALL[k] for k in ALWAYS if k in held}
    if "qk_rope_head_dim" in held:  # latent attention: its rotary part is a head of its own
        given |= {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": 4}
    parts = {k: getattr(config, k) for k in getattr(kind, "sub_configs", {}) if getattr(config, k, None) is not None}
    smaller = {k: shrink(c, own if "text" in k else {}) for k, c in parts.items()}
    spoken = any("vocab_size" in c.to_dict() for c in parts.values())
    if spoken and "num_hidden_layers" not in held:  # the language model is one of them
        given = {k: v for k, v in given.items() if k.endswith("token_id")}
        return kind(**given, **smaller)
    return kind(**{**given, **own, **smaller})


def build(family: str) -> Any:
    """A small random model of a family, the same every time, with larger weights than usual, so that its text wanders."""
    torch.manual_seed(0)
    config = shrink(AutoConfig.for_model(family), OWN.get(family, {}))
    model = model_class(config).from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # some families start at one or zero what should differ
            p += 0.02 * torch.randn_like(p)
    return model


class Told:
    """Drafts a known text in which every fifth token is wrong: drafts are accepted, and rejected, whatever the model."""

    name, layers, trees = "told", (), False

    def __init__(self, text: Sequence[int], depth: int) -> None:
        self.text = [t if i % 5 else (t + 1) % VOCAB for i, t in enumerate(text)]
        self.max_depth = self.max_nodes = depth

    def bind(self, slots: int, length: int) -> None: ...

    def release(self, slots: Sequence[int]) -> None: ...

    def draft(self, evidence: Evidence, budget: Sequence[int]) -> Draft:
        found = []
        for view, most in zip(evidence.sequences, budget, strict=True):
            at = len(view.tokens) - view.prompt
            found.append(self.text[at : at + min(most, self.max_depth)])
        return chains(found, evidence.scores.logits.device)


def decode(engine: Engine, tokens: int, **how: Any) -> list[int]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, **{"temperature": 0.0, **how})
    return list(engine.generate([PROMPT], params)[0].outputs[0].token_ids)


@torch.no_grad()
def reference(model: Any, tokens: int) -> list[int]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


def row_of(family: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Everything about one family; `made` says why there was nothing to try, `refused` why it does not run."""
    row: dict[str, Any] = {"family": family, "transformers": transformers.__version__}
    try:
        model = build(family)
    except Exception as error:  # a class of transformers may fail in any way on sizes that it does not like
        return row | {"made": said(error)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return row | {"made": said(error)}
        row["type"] = json.loads((Path(folder) / "config.json").read_text())["model_type"]
        try:
            row["doctor"] = inspect_checkpoint(folder, dtype="float32").runtime
        except OutriderError as error:
            row["doctor"] = f"refused: {plainly(error, folder)}"
        try:
            engine = Engine.build(target=folder, draft="none", length=0, slots=1, dtype="float32", max_length=256)
        except OutriderError as error:
            return row | {"refused": plainly(error, folder), **own_fault(model)}
        row |= compare(model, engine, tokens, rounds)
    return row


def own_fault(model: Any) -> dict[str, str]:
    """Whether transformers itself fails on it."""
    try:
        reference(model, 2)
    except Exception as error:
        return {"theirs_fails": said(error)}
    return {}


def compare(model: Any, engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    target = engine.parts.target
    path = getattr(target, "path", "native" if getattr(target, "native", None) is not None else "lean")
    drafts = "none" if not target.rewinds else "trees" if target.trees else "chains"
    one = bool(getattr(getattr(target, "serving_path", None), "by_token", False))
    out: dict[str, Any] = {"path": path, "drafts": drafts, "by_token": one}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    plain = decode(engine, tokens)
    try:
        theirs: list[int] | None = reference(model, tokens)
    except Exception as error:
        theirs, out["theirs_fails"] = None, said(error)
    if theirs is not None:
        out["equal"] = plain == theirs
        if plain != theirs:
            out["first_difference"] = next(i for i, (a, b) in enumerate(zip(plain, theirs, strict=False)) if a != b)
        out |= speeds(model, engine, tokens, rounds)
    out["distinct"] = len(set(plain))
    if not target.rewinds:
        return out
    for name, drafter, length in (("ngram", "ngram", 4), ("told", Told(plain, 6), 6)):
        greedy = companion(engine, drafter, length=length)
        out[name] = decode(greedy, tokens) == plain
        sampled = companion(engine, drafter, length=length, rule="match")
        base = companion(engine, "none", length=0, rule="match")
        how = {"temperature": 1.0, "seed": 7}
        out[f"{name}_match"] = decode(sampled, tokens, **how) == decode(base, tokens, **how)
        out[f"{name}_accepted"], out[f"{name}_rejected"] = greedy.counts.accepted, greedy.counts.rejected
    return out


def speeds(model: Any, engine: Engine, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of the processor of both, by turns, and the median of their ratios. Nothing for no rounds."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for r in range(rounds):
        for name in ("ours", "theirs")[:: 1 if r % 2 else -1]:
            start = time.process_time()
            decode(engine, tokens) if name == "ours" else reference(model, tokens)
            seconds[name].append(time.process_time() - start)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    if not ratios:
        return {}
    return {n: round(statistics.median(s), 4) for n, s in seconds.items()} | {
        "speed": round(statistics.median(ratios), 3)
    }


def again(row: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """A row with its speed measured anew."""
    model = build(row["family"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = Engine.build(target=folder, draft="none", length=0, slots=1, dtype="float32", max_length=256)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        decode(engine, tokens)  # both once, unmeasured
        reference(model, tokens)
        return row | speeds(model, engine, tokens, rounds)


def plainly(error: Exception, folder: str) -> str:
    return str(error).replace(folder, "the checkpoint").replace(Path(folder).name, "the checkpoint")


def said(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def _child(pipe: Any, family: str, tokens: int, rounds: int) -> None:
    try:
        pipe.send(row_of(family, tokens, rounds))
    except BaseException as error:
        pipe.send({"family": family, "transformers": transformers.__version__, "crash": said(error)})
    finally:
        pipe.close()


def alone(family: str, tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The row of a family, made in a process that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(its, family, tokens, rounds))
    process.start()
    its.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return {
            "family": family,
            "transformers": transformers.__version__,
            "crash": f"not done in {seconds:.0f} seconds",
        }
    except EOFError:
        return {"family": family, "transformers": transformers.__version__, "crash": "its process died"}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument(
        "--out", type=Path, required=True, help="rows, one JSON object a line; families in it are not run again"
    )
    for name, default in (("tokens", 48), ("rounds", 3), ("seconds", 240)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--again", type=float, default=0.0, help="measure anew the speed of rows below this, and nothing else"
    )
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if wanted.again:
        rows = [json.loads(line) for line in wanted.out.read_text().splitlines()]
        for i, row in enumerate(rows):
            if row.get("speed", 9.0) < wanted.again and row["family"] in wanted.families and not row.get("cpu"):
                rows[i] = again(row, wanted.tokens, wanted.rounds) | {"cpu": True}
                print(json.dumps(rows[i]), flush=True)
                wanted.out.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return
    done = (
        {json.loads(line)["family"] for line in wanted.out.read_text().splitlines()} if wanted.out.exists() else set()
    )
    for family in (f for f in wanted.families if f not in done):
        row = alone(family, wanted.tokens, wanted.rounds, wanted.seconds)
        with wanted.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
