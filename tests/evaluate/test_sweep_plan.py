"""Plan files: what they expand to, and a sentence for everything that is wrong with one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.cli.sweep_kinds import kinds
from outrider.errors import ConfigError
from outrider.evaluate.sweep.cells import data_of, folders_in, identity
from outrider.evaluate.sweep.plan import MAX_CELLS, read_plan, same_but_seed

SPEED = "{kind: bench, metric: speed, arms: {plain: {draft: none}, two: {length: 2}}"


def read(tmp_path: Path, text: str):
    """The plan of a text."""
    (tmp_path / "plan.yaml").write_text(text)
    return read_plan(tmp_path / "plan.yaml", kinds())


def test_a_grid_is_every_combination_and_repeats_are_one_measurement(tmp_path: Path) -> None:
    plan = read(tmp_path, "cells:\n  - {kind: bench, grid: {length: [1, 2, 4], seed: [0, 1]}}\n  - {kind: audit}\n")
    assert plan.name == "plan" and len(plan.cells) == 7 and len({c.identity for c in plan.cells}) == 7
    assert [(c.fields["length"], c.fields["seed"]) for c in plan.cells[:6]] == [
        (n, s) for n in (1, 2, 4) for s in (0, 1)
    ]
    assert [len(g) for g in same_but_seed(plan.cells)] == [2, 2, 2, 1]
    assert plan.cells[0].label == "bench: length 1, seed 0"


def test_cells_of_seconds_need_arms_and_a_machine_alone(tmp_path: Path) -> None:
    plan = read(tmp_path, f"cells:\n  - {SPEED}}}\n  - {{kind: bench}}\n")
    assert [c.alone for c in plan.cells] == [True, False]
    assert plan.cells[0].fields["base"] == "plain" and "length" not in plan.cells[0].fields
    deep = read(tmp_path, f"cells:\n  - {SPEED}, grid: {{arms.two.length: [2, 3]}}}}\n")
    assert [c.fields["arms"]["two"]["length"] for c in deep.cells] == [2, 3]


def test_the_identity_is_of_what_is_measured_and_not_of_how_it_is_written(tmp_path: Path) -> None:
    short = read(tmp_path, "cells: [{kind: bench, length: 2}]").cells[0]
    long = read(tmp_path, "name: x\ncells: [{seed: 0, length: 2, count: 16, draft: auto, kind: bench}]").cells[0]
    assert short.identity == long.identity
    other = [identity(short.fields, "code", short.data), identity(short.fields, short.code, "data")]
    assert len({short.identity, *other, read(tmp_path, "cells: [{kind: bench, length: 3}]").cells[0].identity}) == 4


def test_other_prompts_under_the_same_name_are_another_cell(tmp_path: Path) -> None:
    prompts, seen = tmp_path / "p.txt", set()
    for text in ("def a(\ndef b(\n", "def a(\ndef c(\n"):
        prompts.write_text(text)
        seen.add(read(tmp_path, f"cells: [{{kind: bench, prompts: {prompts}}}]").cells[0].identity)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "list of `cells`"),
        ("cells: {}", "list of `cells`"),
        ("cells: []", "at least 1 item"),
        ("cells: [{kind: bench}]\nspeed: 3", "unknown field 'speed'"),
        ("cells: [{kind: bench}]\nattempts: 0", "attempts"),
        ("cells: [{kind: bench}]\nlimit: .inf", "limit"),
        ("cells: [{kind: bnech}]", "did you mean 'bench'"),
        ("cells: [{kind: bench, lenght: 2}]", "did you mean 'length'"),
        ("cells: [{kind: bench, length: 65}]", "length"),
        ("cells: [{kind: bench, length: two}]", "length"),
        ("cells: [{kind: bench, length: 2, grid: {length: [1]}}]", "both a field and in the grid"),
        ("cells: [{kind: bench, grid: {length: 2}}]", "lists of values"),
        ("cells: [{kind: bench, grid: {a.b: [1]}}]", "no 'a'"),
        ("cells: [{kind: bench, metric: speed}]", "at least two"),
        ("cells: [{kind: bench, arms: {a: {}, b: {}}, length: 2}]", "belong into the arms"),
        ("cells: [{kind: bench, arms: {a: {}, b: {lenght: 2}}}]", "did you mean 'length'"),
        ("cells: [{kind: bench, base: a}]", "base names one of the `arms`"),
        ("cells: [{kind: bench}, {kind: bench}]", "same as cell 0"),
        ("cells: [{kind: bench, prompts: nowhere.txt}]", "no such file"),
        ("cells: [{kind: bench, target: ./nowhere}]", "nowhere"),
        ("cells: [{kind: audit, tolerance: much}]", "tolerance"),
        ("cells: [{kind: audit, tolerance: 1.2.3}]", "tolerance"),
        ("cells: [{kind: audit, tolerance: '2'}]", "0 to 1"),
        ("cells: [{kind: bench, dtype: bf17}]", "unknown dtype 'bf17'"),
        ("cells: [{kind: predict, dtype: bf17}]", "unknown dtype 'bf17'"),
        ("cells: [{kind: bench, rule: specular_sampling}]", "unknown rule 'specular_sampling'"),
        ("cells: [{kind: bench, rule: 'tv_budget:per_token=2'}]", "between 0 and 1"),
        ("cells: [{kind: bench, rule: 'tv_budget:per_token=0.1'}]", "allow_lossy"),
        ("cells: [{kind: audit, rule: 'tv_budget:per_token=0.1'}]", "allow_lossy"),
        ("cells: [{kind: bench, arms: {a: {}, b: {rule: 'tv_budget:per_token=0.1'}}}]", "allow_lossy"),
        ("cells: [{kind: ab, experiment: {arms: {a: {}, b: {rule: matches}}}}]", "unknown rule 'matches'"),
        ("cells: [{kind: ab, experiment: {arms: {a: {}}}}]", "at least two `arms`"),
        ("cells: [{kind: features, train: medusa, shards: 2, shard: 2}]", "no shard 2 of 2"),
        ("cells: [&a [*a]]", "no loop"),
        ("cells: [{kind: bench, seed: 2020-01-01}]", "seed: Input should be a valid integer"),
        ("{", "not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        read(tmp_path, text)
    assert said in str(found.value) and "plan.yaml" in str(found.value) and len(str(found.value)) < 600


def test_a_grid_is_bounded_before_it_is_made(tmp_path: Path) -> None:
    values = "[" + ",".join(map(str, range(500))) + "]"
    with pytest.raises(ConfigError, match=f"more than {MAX_CELLS}"):
        read(tmp_path, f"cells: [{{kind: bench, grid: {{seed: {values}, count: {values}, max_tokens: {values}}}}}]")


def test_aliases_are_bounded_before_they_are_written_out(tmp_path: Path) -> None:
    """Half a kilobyte of YAML that stands for 9^12 texts."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases stand for more than 16 MiB"):
        read(tmp_path, "\n".join([*lines, "cells: [{kind: bench}]"]))


KEYS = st.sampled_from(["kind", "cells", "grid", "seed", "arms", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(ANYTHING)
def test_no_plan_makes_anything_but_a_sentence(tmp_path_factory: pytest.TempPathFactory, found: object) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({"cells": [{"kind": "bench", "grid": found}, found]}))
    with pytest.raises(ConfigError):
        read_plan(path, kinds())


def test_a_pipe_is_no_data_of_cells() -> None:
    """Every cell reads it anew, in whatever process: the second would find nothing."""
    end, start = os.pipe()
    with pytest.raises(ConfigError, match="is a pipe, and every cell reads it anew: write it to a file"):
        data_of([Path(f"/dev/fd/{end}")])
    os.close(start)
    os.close(end)


def test_folders_of_a_draft(tmp_path: Path) -> None:
    (tmp_path / "eagle").mkdir()
    assert folders_in(f"ngram+dynamic:16:eagle:{tmp_path}/eagle") == [tmp_path / "eagle"]
    assert folders_in(f"tree:3x2:{tmp_path}/eagle+auto") == [tmp_path / "eagle"] and folders_in("ngram+auto") == []
