"""Model folders with something left over or missing: the right text, or one sentence that says what is wrong and what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from outrider.build import build_engine
from outrider.cli.chat import Conversation
from outrider.cli.closing import Closing
from outrider.config_keys import COMMON, OPTIONS
from outrider.errors import ConfigError, RequestError
from outrider.models.config import Unsupported, read_layout
from outrider.models.load import load_target, load_tokenizer, stop_ids
from outrider.models.tokenizer import PlainTokenizer
from outrider.nn.attention import AttentionPlan
from outrider.nn.kv import PagedKV
from outrider.params import SamplingParams
from outrider.sampling.cpu import distribution_of
from outrider.types import Draft, Rows
from tests.checkpoints import edit_config, make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, hidden_size=32)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def logits(folder: Path, implementation: str = "auto") -> torch.Tensor:
    target = load_target(folder, dtype="float32", implementation=implementation)
    return target.forward(Rows.assemble([0], [[5, 9, 2]], [0], Draft.empty(1)), target.new_kv(1, 8)).logits


def rewrite(folder: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Change tensors (dots are written as double underscores) and return what was there."""
    file = folder / "model.safetensors"
    old = load_file(file)
    save_file(old | {name.replace("__", "."): t for name, t in changes.items()}, file, metadata={"format": "pt"})
    return old


EXTRA = {
    "model.layers.1.mlp.down_proj.weight_scale": torch.ones(1),
    "model.layers.0.self_attn.k_proj.lora_B.default.weight": torch.ones(4, 2),
    "model.layers.2.mlp.up_proj.bias": torch.ones(88),
    "model.layers.7.input_layernorm.weight": torch.ones(32),
    "model.steering": torch.ones(32),
    "lm_head.bias": torch.ones(260),
}


@pytest.mark.parametrize("implementation", ["auto", "hf", "lean"])
@pytest.mark.parametrize("name", EXTRA)
def test_tensors_without_a_place_are_refused_by_name(copy, name: str, implementation: str) -> None:
    rewrite(copy, **{name: EXTRA[name]})
    with pytest.raises(ConfigError, match=name):
        load_target(copy, dtype="float32", implementation=implementation)


@pytest.mark.parametrize("implementation", ["lean", "hf"])
def test_buffers_and_parts_that_are_no_text_are_left_out(model, copy, implementation: str) -> None:
    harmless = ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.weight", "visual.patch_embed.weight")
    rewrite(copy, **{name: torch.ones(4) for name in harmless})
    # weights lie elsewhere in the other file, and on some CPUs products round by where they lie
    torch.testing.assert_close(logits(copy, implementation), logits(model, implementation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_codes_without_a_key_to_them_are_refused(copy, implementation: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(copy, **{name: load_file(copy / "model.safetensors")[name].to(torch.int8)})
    with pytest.raises(ConfigError, match=name):
        load_target(copy, implementation=implementation)
    edit_config(copy, quantization={"bits": 4, "group_size": 64}, quantization_config={"bits": 4, "group_size": 64})
    with pytest.raises(ConfigError, match="unquantized checkpoint"):
        load_target(copy, implementation=implementation)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["auto", "hf"])
def test_weights_that_are_numbers_are_no_codes(model, copy, kind: torch.dtype, implementation: str) -> None:
    want = logits(model, implementation)
    rewrite(copy, **{name.replace(".", "__"): t.to(kind) for name, t in load_file(copy / "model.safetensors").items()})
    assert torch.allclose(logits(copy, implementation), want, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "nonsense"])
def test_quantized_checkpoints_name_the_unquantized_one(copy, method: str) -> None:
    edit_config(copy, quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4})
    with pytest.raises(ConfigError, match=f"quantized .{method}.*use the unquantized checkpoint"):
        load_target(copy)


def test_a_head_that_differs_from_a_tied_embedding_is_used_as_transformers_uses_it(copy) -> None:
    edit_config(copy, tie_word_embeddings=True)
    assert (logits(copy, "lean") - logits(copy, "hf")).abs().max() < 2e-4


def test_a_tensor_in_two_files_and_an_adapter_beside_the_weights_are_refused(copy) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    first, name = dict(list(tensors.items())[:3]), next(iter(tensors))
    save_file(first, copy / "a.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in first} | {name: tensors[name] + 1}, copy / "b.safetensors")
    placed = {n: "a.safetensors" if n in first else "b.safetensors" for n in tensors}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(ConfigError, match="a.safetensors and in b.safetensors"):
        load_target(copy)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge"):
        load_target(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [("suppress_tokens", [4, 9]), ("bad_words_ids", [[3]]), ("forced_eos_token_id", 2), ("no_repeat_ngram_size", 3),
     ("encoder_repetition_penalty", 1.5), ("encoder_no_repeat_ngram_size", 2), ("force_words_ids", [[5]])],
)  # fmt: skip
def test_constraints_on_every_text_are_refused_and_defaults_of_sampling_are_not(copy, key: str, value: object) -> None:
    file = copy / "generation_config.json"
    file.write_text(
        json.dumps(
            {
                "temperature": 0.6,
                "top_p": 0.9,
                "eos_token_id": [2, 5],
                "no_repeat_ngram_size": 0,
                "encoder_repetition_penalty": 1.0,
                "encoder_no_repeat_ngram_size": 0,
            }
        )
    )
    assert stop_ids(copy) == (2, 5)
    file.write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=key):
        stop_ids(copy)


@pytest.mark.parametrize("inside", [None, "text_config", "decoder"])
def test_constraints_of_older_folders_stand_in_config_json(copy, inside: str | None) -> None:
    """transformers takes them from there where no generation_config.json is: `generate` then writes another text."""
    raw = json.loads((copy / "config.json").read_text()) | {
        "no_repeat_ngram_size": 0,
        "repetition_penalty": 1.3,
        "eos_token_id": 2,
    }
    constraint = {"bad_words_ids": [[5]]}
    (copy / "config.json").write_text(json.dumps(raw | (constraint if inside is None else {inside: constraint})))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert stop_ids(copy) == (2, 5)  # where the file is, it alone counts
    (copy / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json sets bad_words_ids, which is not applied here"):
        stop_ids(copy)
    (copy / "config.json").write_text(json.dumps(raw))
    assert stop_ids(copy) == (2,)


@pytest.mark.parametrize("named", ["2", 2.0, True, [[2]], [2, None], [2, "</s>"], {"id": 2}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_of_text_that_is_no_token_is_refused(copy, file: str, named: object) -> None:
    (copy / "generation_config.json").unlink(missing_ok=True)
    raw = json.loads((copy / "config.json").read_text()) if file == "config.json" else {}
    (copy / file).write_text(json.dumps(raw | {"eos_token_id": named}))
    with pytest.raises(ConfigError, match=f"{file}: eos_token_id must be a token id or a list of them"):
        stop_ids(copy)


@pytest.mark.parametrize("value", [[], ["llama"], {}, {"a": 1}, 3, True, float("nan"), "x", ""], ids=repr)
def test_no_key_of_a_configuration_breaks_reading_by_its_type(copy, value: object) -> None:
    raw = json.loads((copy / "config.json").read_text())
    for key in sorted({*raw, *COMMON, *OPTIONS, "quantization_config"}):
        (copy / "config.json").write_text(json.dumps(raw | {key: value}))
        with contextlib.suppress(ConfigError, Unsupported):
            read_layout(copy)


def test_a_folder_without_a_tokenizer_works_on_ids(model, copy) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    params = SamplingParams(temperature=0, max_tokens=5)
    bare = build_engine(copy, "ngram", dtype="float32", max_length=64)
    whole = build_engine(model, "none", length=0, dtype="float32", max_length=64)
    ids = [7, 8, 9, 7, 8]
    assert bare.generate([ids], params)[0].outputs[0].token_ids == whole.generate([ids], params)[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="needs a tokenizer"):
        bare.generate(["a text"], params)
    with pytest.raises(RequestError, match="needs? a tokenizer"):
        bare.generate([ids], SamplingParams(stop=("x",)))
    assert (
        build_engine(model, str(copy), dtype="float32", max_length=64).generate([ids], params)[0].outputs[0].token_ids
    )


@pytest.mark.parametrize("changes", [{"text_config": {"hidden_size": 7}}, {"is_encoder_decoder": True}])
def test_a_configuration_that_transformers_half_reads_is_refused_in_a_sentence(copy, changes) -> None:
    edit_config(copy, (), **changes)
    with pytest.raises(ConfigError, match="text_config|encoder-decoder|as a causal language model"):
        load_target(copy, dtype="float32")


def test_settings_of_a_tokenizer_that_change_its_ids_are_read(model, copy) -> None:
    """A token that only the settings mark as special is one token in a text and none in its decoding, as in transformers."""
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "</s>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert isinstance(load_tokenizer(copy), PlainTokenizer)
    for more in ({"pad_token": "<new>"}, {"additional_special_tokens": ["<tool>"]}, {"add_bos_token": True}):
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | more))
        ours, theirs = load_tokenizer(copy), AutoTokenizer.from_pretrained(copy)
        assert not isinstance(ours, PlainTokenizer)
        for text in ("a<new>b", "<tool>x", "</s>"):
            assert ours.encode(text) == theirs.encode(text)


def test_more_positions_than_the_model_has_and_ends_behind_the_embedding_are_refused(copy) -> None:
    with pytest.raises(ConfigError, match="257 is more than the 256 positions"):
        build_engine(copy, "none", max_length=257)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300]}))
    with pytest.raises(ConfigError, match=r"end-of-text token 300.*260 rows.*eos_token_id"):
        build_engine(copy, "none")


def test_a_template_that_refuses_a_conversation_says_so(copy) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    picky = (
        "{% for m in messages %}{% if m.role == 'system' or 'bad' in m.content %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": picky}))
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    engine = build_engine(copy, "none", length=0, slots=1, max_length=64)
    with pytest.raises(ConfigError, match=r"not that.*--system"):
        Conversation(engine, "be brief", Closing(), SamplingParams(max_tokens=2))
    talk = Conversation(engine, None, Closing(), SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="not that"):
        talk.turn("bad word")
    assert talk.messages == []
    talk.turn("fine")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"min_p": 0.2}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.5}, {}])
def test_a_distribution_does_not_depend_on_how_logits_lie_in_memory(cut: dict[str, float]) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 3
    params = [SamplingParams(temperature=0.8, **cut)] * 5  # type: ignore[arg-type]
    columns = x.t().contiguous().t()
    wide = torch.zeros(5, 600)
    wide[:, ::2] = x
    for other in (columns, wide[:, ::2]):
        assert torch.allclose(distribution_of(other, params), distribution_of(x.clone(), params), atol=1e-6)


def test_what_an_aborted_sequence_left_never_reaches_the_next_owner() -> None:
    """Two slots share a call; places behind the shorter one's end hold NaN of an earlier owner."""
    heads, size = 2, 4

    def attend(dirty: bool) -> torch.Tensor:
        kv = PagedKV(1, 2, heads, 32, size, torch.float32, torch.device("cpu"))
        if dirty:
            rows = Rows.assemble([0], [list(range(30))], [0], Draft.empty(1))
            kv.reserve(rows)
            kv.k[:] = kv.v[:] = float("nan")
            kv.release([0])
        noise = torch.Generator().manual_seed(1)
        for slot, count in ((0, 12), (1, 14)):
            rows = Rows.assemble([slot], [list(range(count))], [0], Draft.empty(1))
            kv.reserve(rows)
            kv.write(0, slot, 0, *torch.randn(2, count, heads, size, generator=noise))
            kv.commit(rows, [[]])
        rows = Rows.assemble([0, 1], [[1], [2]], [12, 14], Draft.empty(2))
        kv.reserve(rows)
        q, k, v = torch.randn(3, 2, heads, size, generator=noise)
        return AttentionPlan(rows, kv, heads, (0,))(0, q, k, v)

    assert torch.equal(attend(dirty=True), attend(dirty=False))
