"""The model class in lm-eval's own harness: its numbers are those of lm-eval's class for transformers on the same checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from outrider.assets import shipped
from outrider.errors import ConfigError, RequestError
from outrider.integrations.lm_eval import OutriderLM

TARGET = str(shipped("target"))
PAIRS = [
    ("def main(", "argv):\n"),
    ("import os\nimport ", "sys\n"),
    ("class A:\n    ", "def __init__(self):"),
    ("", "import os"),
]


def instances(kind: str, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


@pytest.fixture(scope="module")
def ours() -> OutriderLM:
    return OutriderLM(target=TARGET, dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    return HFLM(pretrained=TARGET, dtype="float32", device="cpu", batch_size=4)


def test_the_command_knows_the_model() -> None:
    assert get_model("outrider") is OutriderLM


def test_log_likelihoods_are_those_of_transformers(ours: OutriderLM, theirs: HFLM) -> None:
    wanted = instances("loglikelihood", PAIRS)
    for (mine, greedy), (value, same) in zip(ours.loglikelihood(wanted), theirs.loglikelihood(wanted), strict=True):
        assert mine == pytest.approx(value, abs=2e-3) and greedy == same
    text = instances("loglikelihood_rolling", [("def area(r):\n    return 3 * r\n" * 4,)])
    assert ours.loglikelihood_rolling(text) == pytest.approx(theirs.loglikelihood_rolling(text), rel=1e-3)


def test_begins_of_texts_are_those_of_transformers(tmp_path: Path) -> None:
    """A tokenizer that puts one before every text, as most do: it counts, and is not put before one that is there."""
    for file in Path(TARGET).iterdir():
        shutil.copy(file, tmp_path)
    core = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = core.id_to_token(1)
    core.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])
    core.save(str(tmp_path / "tokenizer.json"))
    mine = OutriderLM(target=str(tmp_path), dtype="float32", device="cpu", batch_size="auto")
    other = HFLM(pretrained=str(tmp_path), dtype="float32", device="cpu", batch_size=4)
    for text in ("import os", f"{begin}import os"):
        assert mine.tok_encode(text) == other.tok_encode(text) == [1, *mine.tok_encode("import os", False)]
    wanted = instances("loglikelihood", PAIRS)
    for (value, _), (due, _) in zip(mine.loglikelihood(wanted), other.loglikelihood(wanted), strict=True):
        assert value == pytest.approx(due, abs=2e-3)
    with pytest.raises(ConfigError, match="batch_size is a number"):
        OutriderLM(target=TARGET, batch_size="many")


def test_generation_is_that_of_transformers(ours: OutriderLM, theirs: HFLM) -> None:
    asked = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    wanted = instances("generate_until", [(context, asked) for context, _ in PAIRS[:3]])
    assert ours.generate_until(wanted) == theirs.generate_until(wanted)
    assert ours.engine.counts.proposed > 0
    with pytest.raises(RequestError, match="the task sets num_beams"):
        ours.generate_until(instances("generate_until", [("x", asked | {"num_beams": 4})]))


def test_a_whole_evaluation_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, on a task of a file, without a network."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "import os\\nimport ", "a": "sys"}\n{"q": "def main(", "a": "argv"}\n')
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{[a, \"zzz\"]}}'\ndoc_to_target: 0\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "outrider", model_args=f"target={TARGET}", tasks=["tiny"], task_manager=TaskManager(include_path=str(tmp_path))
    )
    assert found["results"]["tiny"]["acc,none"] == 1.0
