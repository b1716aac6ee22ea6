"""From a folder or a name to a target and a tokenizer, and binding threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from outrider import isa
from outrider.errors import CapacityError, ConfigError
from outrider.models import dtypes
from outrider.models.hf.target import HFTarget
from outrider.models.lean import LeanTarget
from outrider.models.load import (
    inspect_checkpoint,
    load_target,
    load_tokenizer,
    stop_ids,
    vocab_fingerprint,
)
from outrider.nn import memory
from outrider.types import Draft, Rows
from outrider.vocabulary import first_difference
from tests.checkpoints import edit_config, make_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=True, hidden_size=64)


@pytest.fixture
def copy(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def score(target, tokens: list[int]) -> torch.Tensor:
    rows = Rows.assemble([0], [tokens], [0], Draft.empty(1))
    return target.forward(rows, target.new_kv(1, 64)).logits[0]


def test_twins_agree(model):
    """The lean runtime and transformers on the same folder; 2e-4 in float32 on logits of standard deviation above 1."""
    lean, hf = load_target(model, dtype="float32"), load_target(model, dtype="float32", implementation="hf")
    assert isinstance(lean, LeanTarget)
    assert isinstance(hf, HFTarget)
    assert not any("transformers" in n for n in lean.notices)
    text = list(range(5, 45))
    ours, theirs = score(lean, text), score(hf, text)
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("quantize", "distance"),
    [("int8", 0.05), ("q8_0", 0.05), ("q6_k", 0.05), ("q5_0", 0.25), ("int4", 0.5), ("q4_k", 0.5)],
)
def test_quantized_draft_has_nearly_the_same_distribution(model, quantize, distance):
    plain, small = load_target(model, dtype="float32"), load_target(model, dtype="float32", quantize=quantize)
    p, q = (torch.softmax(score(t, [9, 8, 7]), -1) for t in (plain, small))
    assert 0 < (p - q).abs().sum().item() / 2 < distance


def test_unsupported_models_fall_back_to_transformers_and_say_so(gpt2):
    target = load_target(gpt2, dtype="float32")
    assert isinstance(target, HFTarget)
    assert any("gpt2" in n and "runs on transformers" in n for n in target.notices)
    with pytest.raises(ConfigError, match="implementation 'hf'"):
        load_target(gpt2, implementation="lean")
    with pytest.raises(ConfigError, match="leave quantize out"):
        load_target(gpt2, quantize="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat17"}, "did you mean 'bfloat16'"),
        ({"device": "gpu"}, "unknown device"),
        ({"implementation": "leen"}, "did you mean 'lean'"),
        ({"quantize": "int9"}, "quantize"),
        ({"max_length": 10**6}, "choose 1 to 256"),
    ],
)
def test_wrong_options_are_named(model, options, message):
    with pytest.raises(ConfigError, match=message):
        load_target(model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model):
    with pytest.raises(ConfigError, match="sees no GPU"):
        load_target(model, device="cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./not/there", "there is no folder"),
        ("../../not-there", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("nobody/no-such-model", "download the model and give its folder"),
    ],
)
def test_unknown_names_are_refused_offline(name, message):
    with pytest.raises(ConfigError, match=message):
        load_target(name)


def test_a_file_is_not_a_folder(model):
    with pytest.raises(ConfigError, match="is a file"):
        load_target(model / "config.json")


def test_dtype_auto_follows_processor_and_checkpoint(monkeypatch):
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(isa, "multiplies_bfloat16", lambda able=able: able)
        for lean in (True, False):
            assert dtypes.choose_dtype("auto", "float16", torch.device("cpu"), lean=lean) is dtype
    monkeypatch.setattr(dtypes, "load_library", lambda: object())  # the native decoder multiplies any CPU's bfloat16
    assert dtypes.choose_dtype("auto", "bfloat16", torch.device("cpu"), lean=True) is torch.bfloat16
    assert dtypes.choose_dtype("auto", "bfloat16", torch.device("cpu"), lean=False) is torch.float32
    assert dtypes.choose_dtype("auto", "float16", torch.device("cuda"), lean=True) is torch.float16
    assert dtypes.choose_dtype("auto", None, torch.device("cuda"), lean=True) is torch.bfloat16


def test_too_little_memory(model, monkeypatch):
    monkeypatch.setattr(memory, "meminfo", lambda: 10_000)
    for implementation in ("lean", "hf"):
        with pytest.raises(CapacityError, match="weights"):
            load_target(model, implementation=implementation)


def test_facts(model, gpt2):
    facts = inspect_checkpoint(model, dtype="float32")
    assert (facts.runtime, facts.reason, facts.vocab_size, facts.max_length) == ("lean", "", 260, 256)
    assert facts.kv_bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert facts.weights_bytes == 4 * facts.parameters
    other = inspect_checkpoint(gpt2, dtype="bfloat16")
    assert (other.runtime, other.architecture, other.max_length) == ("transformers", "GPT2LMHeadModel", 64)
    assert "gpt2" in other.reason
    assert other.kv_bytes_per_token == 2 * 2 * 32 * 2


# ------------------------------------------------------------------------------------------------------------- tokenizers


def test_tokenizer_and_stop_tokens(model):
    tokenizer = load_tokenizer(model)
    assert tokenizer.decode(tokenizer("def f(x):\n")["input_ids"]) == "def f(x):\n"
    assert stop_ids(model, tokenizer) == (2,)


def test_vocabularies_are_compared_string_by_string(copy, model):
    ours = load_tokenizer(model)
    assert first_difference(ours.get_vocab(), load_tokenizer(copy).get_vocab()) is None
    file = copy / "tokenizer.json"
    core = json.loads(file.read_text())
    vocab = core["model"]["vocab"]
    a, b = [text for text, token in vocab.items() if token in (40, 41)]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(core))
    theirs = load_tokenizer(copy)
    assert first_difference(ours.get_vocab(), theirs.get_vocab()) == (40, a, b)
    assert vocab_fingerprint(ours) == vocab_fingerprint(load_tokenizer(model)) != vocab_fingerprint(theirs)
    theirs.add_tokens(["<more>"])
    assert first_difference(theirs.get_vocab(), theirs.get_vocab()) is None


def _huge(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(10 << 30)


def _own_code(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
        (_huge, "larger than 128 MiB"),
        (_own_code, "auto_map"),
    ],
)
def test_a_damaged_or_hostile_tokenizer_is_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(copy)


def test_own_code_is_refused_on_the_way_to_transformers_too(copy):
    edit_config(copy, (), auto_map={"AutoConfig": "x.Y"}, model_type="strange")
    with pytest.raises(ConfigError, match="auto_map"):
        load_target(copy)


# ---------------------------------------------------------------------------------------------------------------- threads

_SET = """
import os, sys
from outrider.threads import set_threads
names = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES")
print(set_threads({threads}), *map(os.environ.get, names), "torch" in sys.modules)
"""


def set_in_a_new_process(threads: str = "", **environment: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    run = subprocess.run(
        [sys.executable, "-c", _SET.format(threads=threads)],
        env=clean | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted on Linux only")
def test_threads_are_counted_before_torch_never_bound_and_never_against_the_user():
    done, threads, how, places, torch_imported = set_in_a_new_process()
    assert (done, how, places, torch_imported) == ("True", "None", "None", "False")
    assert 1 <= int(threads) <= len(os.sched_getaffinity(0))
    assert set_in_a_new_process("3")[1] == "3"
    assert set_in_a_new_process(OMP_PROC_BIND="close")[:4] == ["False", "None", "close", "None"]
    assert set_in_a_new_process(OMP_NUM_THREADS="1")[:4] == ["False", "1", "None", "None"]


def test_threads_are_left_alone_once_torch_is_there():
    from outrider.threads import set_threads

    assert not set_threads()
