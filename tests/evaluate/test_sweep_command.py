"""`outrider sweep` on real cells: a worker's and this process's answers are the same bits, and a second run does nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.cli.sweep_kinds import kinds, perform
from outrider.evaluate.store.store import canonical
from outrider.evaluate.sweep.book import Book
from outrider.evaluate.sweep.cells import code_version
from outrider.evaluate.sweep.kinds import base_engine
from outrider.evaluate.sweep.plan import read_plan
from outrider.evaluate.sweep.report import prompts_of, write_sweep
from outrider.evaluate.sweep.summary import summarise

ROOT = Path(__file__).parents[2]
SMALL = "count: 5, max_tokens: 8"
ARMS = "arms: {plain: {draft: none, length: 0}, two: {length: 2}}"


def plan_of(tmp_path: Path, *cells: str):
    """A plan and its file."""
    path = tmp_path / "plan.yaml"
    path.write_text("cells:\n" + "".join(f"  - {{{cell}}}\n" for cell in cells))
    return path, read_plan(path, kinds())


def performed(cell: Any) -> dict[str, Any]:
    """What a worker with one thread finds, in this process."""
    return perform(cell.job(Path.cwd(), 1))


def recorded(tmp_path: Path, *cells: str) -> dict[str, Any]:
    """The summary of cells that are performed here; the first one also anew, with the models loaded again."""
    _, plan = plan_of(tmp_path, *cells)
    with Book(tmp_path / "s.db", plan.name, plan.cells) as book:
        for cell in plan.cells:
            found = performed(cell)
            beside = {"measured": found["measured"], "where": found["where"], "attempts": 1}
            assert book.put(cell, json.loads(json.dumps(found["record"])), beside)
            assert (found["measured"] is not None) == cell.alone
        base_engine.cache_clear()
        first = plan.cells[0]
        assert canonical(performed(first)["record"]) == canonical(book.known[first.identity].record)
        return summarise(plan.cells, book, kinds())


def test_acceptance_and_speed_have_rows_and_pictures(tmp_path: Path) -> None:
    """Also twice the same: on a worker that has just begun, and on one that holds other cells' models."""
    small, prompts = "count: 2, max_tokens: 8", tmp_path / "p.jsonl"
    prompts.write_text('{"turns": ["def f(x):", "# again"]}\n{"prompt": "import os"}\n')
    cells = (
        f"kind: bench, {small}, grid: {{length: [2], seed: [0, 1]}}",
        f"kind: bench, metric: speed, {small}, prompts: {prompts}, {ARMS}",
    )
    document = recorded(tmp_path, *cells)
    assert [g["done"] for g in document["groups"]] == [2, 1] and not document["failed"]
    arm = document["groups"][0]["acceptance"][0]
    assert 1 < arm["tokens_per_step"]["value"] < 3 and arm["rejections"]["observed"] > 0
    speed = document["groups"][1]["speed"][0]
    assert (speed["arm"], speed["base"]) == ("two", "plain") and len(speed["by_machine"]) == 1
    write_sweep(tmp_path / "s.html", "plan", document)
    page = (tmp_path / "s.html").read_text()
    assert page.count("<svg") == 2
    shipped = "the shipped code, as they stand"
    mine = f"{prompts}, as they stand, and 1 later turn behind the model's own replies"
    assert prompts_of(document) == [
        (g["label"], said) for g, said in zip(document["groups"], (shipped, mine), strict=True)
    ]
    assert shipped in page and str(prompts) in page
    assert prompts_of({"groups": document["groups"][:1]}) == [("all", shipped)]
    assert speed["tokens_per_second"] and document["groups"][1]["acceptance"][0]["tokens"] == 3 * 8


@pytest.mark.slow
def test_every_other_kind_has_an_answer_and_a_row(tmp_path: Path) -> None:
    document = recorded(
        tmp_path,
        f"kind: ab, experiment: {{{ARMS}, metric: acceptance, {SMALL}}}",
        f"kind: ab, experiment: {{{ARMS}, {SMALL}}}",
        f"kind: predict, {SMALL}, rows: 8",
        f"kind: audit, {SMALL}, samples: 1, length: 2",
        f"kind: audit, {SMALL}, samples: 1, length: 2, temperature: 0.0",
    )
    assert [g["done"] for g in document["groups"]] == [1] * 5 and not document["failed"]
    assert all(said for g in document["groups"] for said in g["says"])


def test_a_worker_refuses_other_code_and_other_data(tmp_path: Path) -> None:
    _, plan = plan_of(tmp_path, "kind: bench, count: 2")
    job = plan.cells[0].job(Path.cwd(), 1)
    for field in ("code", "data"):
        with pytest.raises(Exception, match=r"install the same|same files"):
            perform({**job, field: "other"})
    assert code_version() == plan.cells[0].code


def test_a_plan_runs_once(tmp_path: Path, run: Any) -> None:
    path, _ = plan_of(tmp_path, "kind: bench, count: 3, max_tokens: 8, grid: {seed: [0, 1]}")
    store = tmp_path / "s.db"
    code, said = run("sweep", path, "--store", store, "--dry-run")
    assert code == 0 and said.count("to do") == 2 and not store.exists()
    code, said = run("sweep", path, "--store", store, "--workers", "1", "--html", tmp_path / "a.html", "--json")
    document = json.loads(said)
    assert code == 0 and document["groups"][0]["done"] == 2 and (tmp_path / "a.html").exists()
    code, again = run("sweep", path, "--store", store, "--json")
    assert code == 0 and json.loads(again)["groups"] == document["groups"]
    assert run("sweep", path, "--store", store, "--dry-run")[1].count("done") == 2


def test_the_example_is_a_plan() -> None:
    plan = read_plan(ROOT / "examples" / "sweep.yaml", kinds())
    assert len(plan.cells) == 12 and sum(c.alone for c in plan.cells) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "mars"), "local or ray"),
        (("--address", "auto"), "add --on ray"),
        (("--on", "ray", "--workers", "2"), "--workers is for --on local"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path: Path, run: Any, words: tuple[str, ...], said: str) -> None:
    path, _ = plan_of(tmp_path, "kind: bench, count: 2")
    code, shown = run("sweep", path, "--store", tmp_path / "s.db", *words)
    assert code == 2 and said in shown and "Traceback" not in shown
