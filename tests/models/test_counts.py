"""A configuration from outside cannot make transformers build without end: counts are bounded, whatever a family calls them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from benchmarks.model_sizes import OWN, shrink
from outrider.errors import ConfigError
from outrider.models import counts
from outrider.models.admit import admit
from outrider.models.counts import MOST_LAYERS, MOST_MODULES, MOST_PARTS, bounded, check_counts

HUGE = 10**9
HOSTILE: list[tuple[str, tuple[str | int, ...]]] = [
    ("llama", ("num_hidden_layers",)),
    ("gpt2", ("n_layer",)),
    ("xlstm", ("num_blocks",)),
    ("gemma3n_text", ("altup_num_inputs",)),
    ("stablelm", ("num_attention_heads",)),
    ("gpt_neo", ("attention_types", 0, 1)),
    ("deepseek_v3", ("first_k_dense_replace",)),
    ("mixtral", ("num_local_experts",)),
    ("qwen3_vl", ("vision_config", "depth")),
    ("zamba2", ("num_mem_blocks",)),
    ("moshi", ("depth_decoder_config", "num_hidden_layers")),
]
"""A family, and where its configuration has a number that becomes huge."""


def hostile(folder: Path, family: str, where: tuple[str | int, ...], value: int) -> dict:
    """A small configuration of the family, in a folder, with one number changed."""
    raw = json.loads(shrink(AutoConfig.for_model(family), OWN.get(family, {})).to_json_string(use_diff=False))
    at = raw
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


@pytest.mark.parametrize(("family", "where"), HOSTILE, ids=lambda x: x if isinstance(x, str) else str(x[-1]))
def test_a_huge_count_is_refused_by_its_name(family: str, where: tuple[str | int, ...], tmp_path: Path) -> None:
    raw = hostile(tmp_path, family, where, HUGE)
    name = next(key for key in reversed(where) if isinstance(key, str))
    with pytest.raises(ConfigError, match=rf"config.json: {name} 1000000000 is more than \d+: check its configuration"):
        admit(tmp_path, raw)


@pytest.mark.parametrize("family", ["gemma3n_text", "jamba"])
def test_an_assertion_of_a_family_becomes_a_sentence(family: str, tmp_path: Path) -> None:
    """A padding token outside the vocabulary: torch asserts."""
    raw = hostile(tmp_path, family, ("pad_token_id",), HUGE)
    with pytest.raises(ConfigError, match="transformers does not run") as caught:
        admit(tmp_path, raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "where"), HOSTILE, ids=lambda x: x if isinstance(x, str) else str(x[-1]))
def test_the_same_configuration_as_it_was_is_not(family: str, where: tuple[str | int, ...], tmp_path: Path) -> None:
    """The negative control: nothing in a small configuration counts as huge."""
    raw = hostile(tmp_path, family, ("vocab_size",), 512)
    check_counts(tmp_path, raw)


def test_the_largest_counts_that_pass() -> None:
    where = Path("x")
    check_counts(
        where, {"num_hidden_layers": MOST_LAYERS, "num_experts": MOST_PARTS, "vocab_size": HUGE, "group_size": HUGE}
    )
    for name, most in (("num_hidden_layers", MOST_LAYERS), ("n_routed_experts", MOST_PARTS), ("n_head", MOST_PARTS)):
        with pytest.raises(ConfigError, match="is more than"):
            check_counts(where, {"text_config": [{name: most + 1}]})


def test_modules_are_counted_whatever_the_number_is_called(tmp_path: Path) -> None:
    """The loop ends at the limit; a model below it is built, and what is built afterwards is not counted."""
    made = 0

    def part() -> nn.Module:
        nonlocal made
        made += 1
        return nn.Linear(1, 1, bias=False)

    with torch.device("meta"):
        with pytest.raises(ConfigError, match=f"more than {MOST_MODULES} modules"), bounded(tmp_path):
            nn.ModuleList(part() for _ in range(HUGE))
        assert made <= MOST_MODULES + 1
        with bounded(tmp_path):
            nn.ModuleList(part() for _ in range(100))
        nn.ModuleList(nn.Identity() for _ in range(MOST_MODULES + 1))


def numbers(node: ast.AST) -> Iterator[str]:
    """Attributes of `self` in a sum or product; not what is inside a call, such as the length of one."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        yield node.attr
    elif isinstance(node, ast.BinOp):
        yield from numbers(node.left)
        yield from numbers(node.right)


def loops(tree: ast.AST) -> Iterator[str]:
    """Attributes of `self` up to which `range` counts, or by which a list is repeated, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            yield from numbers(node.args[0] if len(node.args) == 1 else node.args[1])
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                yield from numbers(other) if isinstance(one, ast.List) else ()


def test_every_loop_of_a_configuration_of_transformers_is_bounded() -> None:
    """A configuration is read before any module is made, so that only the names protect its loops."""
    folder = Path(transformers.__file__).parent / "models"
    found = {name for file in folder.glob("*/configuration_*.py") for name in loops(ast.parse(file.read_text()))}
    assert {"num_hidden_layers", "num_mtp_layers"} <= found
    free = set()
    for name in found:
        try:
            check_counts(Path("x"), {name: HUGE})
            free.add(name)
        except ConfigError:
            pass
    assert not free


LIMITED = """
import json, resource, sys, time
from pathlib import Path
from outrider.errors import ConfigError
from outrider.models.admit import admit
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
for folder in map(Path, sys.argv[1:]):
    start = time.process_time()
    try:
        admit(folder, json.loads((folder / "config.json").read_text()))
    except ConfigError as error:
        said = str(error)
        print(json.dumps([said, time.process_time() - start]))
"""


def test_each_ends_within_200_mb_and_a_second_of_the_processor(tmp_path: Path) -> None:
    """In a process that cannot have more memory; a second of the processor is a hundred times what a refusal by name takes."""
    folders = []
    for i, (family, where) in enumerate(HOSTILE):
        folder = tmp_path / str(i)
        folder.mkdir()
        hostile(folder, family, where, HUGE)
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", LIMITED, *folders], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(HOSTILE)
    assert all("\n" not in sentence and len(sentence) < 300 for sentence, _ in said)
    assert max(seconds for _, seconds in said) < 1.0


def test_what_another_thread_builds_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "MOST_MODULES", 3)
    with bounded(tmp_path), ThreadPoolExecutor(1) as other:
        assert len(other.submit(lambda: nn.ModuleList(nn.Identity() for _ in range(9))).result()) == 9
        nn.Linear(2, 2)
