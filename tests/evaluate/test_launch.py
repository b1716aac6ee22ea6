"""What a plan tells vLLM and Ray: only fields that the named release has, and the same configuration in both."""

from __future__ import annotations

import doctest
import json
import shlex
from pathlib import Path

import pytest
import yaml

from outrider.drafters import vllm_config, vllm_versions
from outrider.drafters.registry import parse_speculative_config
from outrider.drafters.vllm_versions import VERSIONS, version
from outrider.errors import ConfigError
from outrider.evaluate.planning import launch, vllm_draft
from outrider.evaluate.planning.plan import PlanEntry

SHIPPED = Path(vllm_config.__file__).parents[1] / "assets" / "pycode"
SPEEDS = {
    ("none", 0): {1: 100, 4: 300, 16: 800},
    ("eagle", 2): {1: 150, 4: 380, 16: 700},
    ("eagle", 4): {1: 180, 4: 350, 16: 500},
    ("medusa:/f", 3): {1: 250, 4: 500, 16: 850},
}


def entries(speeds: dict[tuple[str, int], dict[int, float]]) -> list[PlanEntry]:
    return [
        PlanEntry(d, n, b, float(v), v * 0.9, v * 1.1, 1.0, {"target": 1.0}, None, "target", float(v))
        for (d, n), row in speeds.items()
        for b, v in row.items()
    ]


def test_doctests() -> None:
    result = doctest.testmod(vllm_draft)
    assert result.attempted and not result.failed


def test_every_batch_size_has_the_length_planned_for_the_next_larger_one() -> None:
    target = str(SHIPPED / "target")
    config, said = launch.configuration(entries(SPEEDS), {}, target, "0.33")
    assert config is not None and config["method"] == "eagle3" and config["model"] == str(SHIPPED / "eagle")
    assert config["num_speculative_tokens"] == 4
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 1, 4], [2, 4, 2], [5, 16, 0]]
    assert "no medusa" in said  # the fastest drafter, which this release no longer has
    older, said = launch.configuration(entries(SPEEDS), {}, target, "0.32")
    assert older is not None and older["method"] == "medusa" and not said
    assert "num_speculative_tokens_per_batch_size" not in older  # one length everywhere
    shipped = {("medusa" if draft == "medusa:/f" else draft, n): row for (draft, n), row in SPEEDS.items()}
    other, said = launch.configuration(entries(shipped), {}, target, "0.32")
    assert other == config and "no medusa" in said  # the shipped heads follow one another, which vLLM's do not
    slow = {k: {b: v if k[0] == "none" else v / 3 for b, v in row.items()} for k, row in SPEEDS.items()}
    assert launch.configuration(entries(slow), {}, target, "0.33")[0] is None


def test_what_vllm_is_told_is_what_our_own_reader_takes() -> None:
    for draft, says in (
        ("ngram", "ngram:4-4"),
        ("ngram:2-5", "ngram:2-5"),
        ("dflash:/f", "dflash:/f"),
        ("greedy:dflash:/f", "greedy:dflash:/f"),
        ("auto", "some/model"),
    ):
        config = vllm_draft.drafter_config(draft, {"auto": "some/model"})
        assert config is not None
        version("0.33").check({**config, "num_speculative_tokens": 3})
        assert parse_speculative_config(json.dumps({**config, "num_speculative_tokens": 3}))["draft"] == says


def test_command_and_ray_file_say_the_same() -> None:
    config, _ = launch.configuration(entries(SPEEDS), {}, str(SHIPPED / "target"), "0.33")
    serving = launch.Serving("a folder/target", config, "0.33", tensor=4, pipeline=2, accelerator="H100", slots=16)
    words = shlex.split(launch.vllm_command(serving))
    assert words[:3] == ["vllm", "serve", "a folder/target"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert json.loads(options.pop("--speculative-config")) == config
    assert options == {"--tensor-parallel-size": "4", "--pipeline-parallel-size": "2", "--max-num-seqs": "16"}
    text = launch.ray_text(launch.ray_document(serving, "name", (1, 3)), "0.33")
    (app,) = yaml.safe_load(text)["applications"]
    (made,) = app["args"]["llm_configs"]
    assert made["engine_kwargs"]["speculative_config"] == config
    assert made["engine_kwargs"]["tensor_parallel_size"] == 4 and made["accelerator_type"] == "H100"
    assert made["deployment_config"]["autoscaling_config"]["max_replicas"] == 3
    cpu = launch.ray_document(launch.Serving("t", None, "0.32"), "name")
    (made,) = cpu["applications"][0]["args"]["llm_configs"]
    assert "accelerator_type" not in made and "GPU" not in str(made["placement_group_config"])


def test_a_field_that_ray_does_not_have_is_refused() -> None:
    good = launch.ray_document(launch.Serving("t", None, "0.33"), "name")
    launch.check_ray(good)
    good["applications"][0]["args"]["llm_configs"][0]["deployment_config"]["num_replica"] = 2
    with pytest.raises(ConfigError, match="did you mean 'num_replicas'"):
        launch.check_ray(good)
    with pytest.raises(ConfigError, match="fewest"):
        launch.ray_document(launch.Serving("t", None, "0.33"), "name", (3, 2))


@pytest.mark.parametrize(
    ("release", "config", "says"),
    [
        ("0.33", {"method": "medusa"}, "no method 'medusa': it is one of vLLM 0.32"),
        ("0.33", {"method": "mlp_speculator"}, "vLLM 0.32"),
        ("0.32", {"fly_window_size": 3}, "unknown key"),
        ("0.32", {"rejection_sample_method": "fly"}, "no rejection_sample_method"),
        ("0.33", {"num_speculative_tokens": 0}, "whole number"),
        ("0.33", {"num_speculative_tokens_per_batch_size": [[2, 4, 1]]}, "begin at batch size 1"),
        ("0.33", {"num_speculative_tokens_per_batch_size": [[1, 4, 3], [4, 8, 1]]}, "do not overlap"),
        ("0.33", {"num_speculative_tokens": 2, "num_speculative_tokens_per_batch_size": [[1, 4, 3]]}, "above"),
        ("0.33", {"num_speculative_tokens_per_batch_size": [[1, 4]]}, "expected"),
        ("0.33", {"method": "suffix", "num_speculative_tokens_per_batch_size": [[1, 4, 3]]}, "drops lengths"),
        ("0.12", {}, "was not read; known releases"),
    ],
)
def test_refusals_by_release(release: str, config: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        version(release).check(config)


def test_our_reader_knows_every_key_and_takes_what_some_release_takes() -> None:
    """A key that a release has is read, neutral or refused by its value, and never called unknown."""
    for release in VERSIONS.values():
        for key in release.keys:
            with pytest.raises(ConfigError) as refused:
                parse_speculative_config({"method": "ngram", "num_speculative_tokens": 2, key: object()})
            assert "unknown key" not in str(refused.value), key
    assert parse_speculative_config({"method": "medusa", "model": "f"})["draft"] == "medusa:f"
    with pytest.raises(ConfigError, match="vLLM 0.33"):  # a method of the one release with a key of the other
        parse_speculative_config({"method": "medusa", "model": "f", "draft_lm_head_quantization": None})
    assert not vllm_versions.INTERNAL & VERSIONS["0.33"].keys
