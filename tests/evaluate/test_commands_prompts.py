"""Which prompts the commands take: read once, so that they may come through a pipe; named in what is printed; refused where they
say nothing."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.cli import live_experiment, watch
from outrider.evaluate import workloads
from outrider.models.tokenizer import load_tokenizer
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.evaluate.test_workloads import HI, through_a_pipe, written

ROWS = "".join(json.dumps({"prompt": f"def f{i}(x):\n", "question_id": i, "category": "qa"}) + "\n" for i in range(5))
TURNS = "".join(json.dumps({"turns": [f"def f{i}(x):\n", "# again\n"], "category": "qa"}) + "\n" for i in range(2))
SMALL = ("--max-tokens", 4, "--max-length", 128)


@pytest.mark.parametrize(
    "argv",
    [
        ("bench", "--lengths", "0,1", "--repeats", 1, "--warmup", 0, "--compat", "spec-bench", *SMALL),
        ("predict", "--samples", 1, *SMALL),
        ("plan", "--lengths", "0,1", "--rounds", 2, *SMALL),
        ("plan", "--lengths", "0,1", "--rounds", 2, "--traffic", "poisson:2", "--requests", 20, "--slots", 1, *SMALL),
        ("tree", "--nodes", 2, "--depth", 1, "--width", 2, *SMALL),
        ("audit", "--samples", 1, *SMALL),
    ],
    ids=lambda argv: f"{argv[0]} {'fleet' if '--traffic' in argv else ''}".strip(),
)
def test_prompts_come_through_a_pipe_and_are_named(run, argv: tuple) -> None:
    pipe = through_a_pipe(ROWS)
    code, out = run(*argv, "--prompts", pipe, "--count", 5, "--json")
    os.close(int(pipe.name))
    document = json.loads(out)
    assert code in (0, 3) and document["data"] == {"prompts": str(pipe), "chat_template": False}
    for row in document.get("spec_bench", {}).get("length 1", ()):
        assert row["questions"] == 5 and row["task"] in ("qa", "overall")


@pytest.mark.parametrize(
    "argv", [("tree", "--nodes", 2, "--depth", 1), ("plan", "--traffic", "poisson:2", "--requests", 20)]
)
def test_what_is_printed_names_the_prompts(run, argv: tuple, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(ROWS)
    more = ("--lengths", "0,1", "--rounds", 2, "--slots", 1) if argv[0] == "plan" else ()
    code, out = run(*argv, *more, *SMALL, "--prompts", path, "--count", 4)
    assert code == 0 and "mine.jsonl, as they stand" in "".join(out.split("\n"))


def test_a_bench_asks_all_turns_and_says_so(run, tmp_path: Path) -> None:
    """Its tables, its page and its answer files; another run with other turns is no continuation of it."""
    path, page, answers = tmp_path / "turns.jsonl", tmp_path / "page.html", tmp_path / "answers"
    path.write_text(TURNS)
    argv = ("bench", "--lengths", "0,1", "--repeats", 1, "--warmup", 0, "--prompts", path, *SMALL, "--quality")
    code, out = run(*argv, "--compat", "spec-bench", "--answers", answers, "--html", page, "--json")
    document = json.loads(out)
    assert code == 0 and document["data"]["later_turns"] == 2
    assert all(arm["tokens"] == 2 * 2 * 4 and arm["nll"] > 0 for arm in document["arms"])
    assert "2 later turns behind the model&#x27;s own replies" in page.read_text()
    rows = [json.loads(line)["choices"][0] for line in (answers / "length-1.jsonl").read_text().splitlines()]
    assert [len(row[k]) for row in rows for k in ("turns", "wall_time", "new_tokens", "decoding_steps")] == [2] * 8


EXPERIMENT = "arms:\n  plain: {{draft: none}}\n  one: {{length: 1}}\nprompts: {}\nmax_tokens: 3\nmetric: acceptance\n"


def test_an_experiment_names_its_prompts_wherever_it_is_shown(run, tmp_path: Path) -> None:
    prompts, file, store, page = (tmp_path / name for name in ("p.jsonl", "e.yaml", "e.db", "e.html"))
    prompts.write_text(ROWS)
    file.write_text(EXPERIMENT.format(prompts))
    data = {"prompts": str(prompts), "chat_template": False}
    ran, shown = (run("ab", *argv, "--store", store, "--json")[1] for argv in (("run", file), ("status", "e")))
    assert json.loads(ran)["data"] == json.loads(shown)["data"] == data
    run("ab", "report", "e", "--out", page, "--store", store)
    assert f"Prompts: {prompts}, as they stand." in page.read_text()
    assert "p.jsonl, as they stand" in "".join(run("ab", "status", "e", "--store", store)[1].split("\n"))


def test_a_rehearsal_takes_prompts_as_the_experiment_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the template unless the file says otherwise, and tokens are what is sent; a pipe is read once."""
    seen: list[tuple[bool, bool]] = []
    real = workloads.ready

    def ready(engine, path, rows, template=True, **more):
        seen.append((path is None, template))
        return real(engine, path, rows, template, **more)

    monkeypatch.setattr(workloads, "ready", ready)
    pipe, file = through_a_pipe(ROWS), tmp_path / "live.yaml"
    file.write_text(EXPERIMENT.format(pipe) + "chat_template: false\n")
    name = live_experiment.run_rehearsal(file, str(tmp_path / "a.db"), 6, 3, EngineOptions(length=1), 3)
    os.close(int(pipe.name))
    assert seen == [(False, False)] and f"prompts: {pipe}, as they stand" in "".join(
        capsys.readouterr().err.split("\n")
    )
    found = live_experiment.document(name, str(tmp_path / "a.db"))
    assert sum(arm["outcomes"].get("length", 0) for arm in found["arms"]) == 6


def test_a_watch_that_audits_asks_by_the_template_of_its_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversations are sent as the template writes them, and that is said; without a target there are their texts alone."""
    target, prompts = (
        make_checkpoint(tmp_path / "target", "llama", tokenizer=True),
        written(tmp_path, {"messages": [HI]}),
    )
    asked = watch.WatchOptions(budget=500, prompts=prompts, target=str(target))
    _, ids = watch.auditor_of(asked, SamplingParams(), workloads.load_rows(prompts, 9))
    assert load_tokenizer(target).decode(ids[0]) == "<s>user: hi</s><s>assistant: "
    assert "rows.jsonl, by the chat template" in "".join(capsys.readouterr().err.split("\n"))
    assert watch.requests_of(None, replace(asked, target=None)).make.args[1] == ["hi"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("predict", "--from-logs", "LOG", "--prompts", "P"), "--prompts says nothing beside --from-logs"),
        (("predict", "--from-logs", "LOG", "--no-chat-template"), "--no-chat-template says nothing beside --from-logs"),
        (("predict", "--from-logs", "LOG", "--samples", 2), "--samples says nothing beside --from-logs"),
        (("predict", "--from-logs", "LOG", "--temperature", 0.5), "options of an engine and of sampling"),
        (("predict", "--from-logs", "LOG", "--draft", "none"), "options of an engine and of sampling"),
        (("audit", "--texts", "LOG", "--prompts", "P"), "--prompts says nothing beside --texts"),
        (("audit", "--texts", "LOG", "--no-chat-template"), "--no-chat-template says nothing beside --texts"),
        (("audit", "--texts", "LOG", "--count", 3), "--count says nothing beside --texts"),
        (("audit", "--model", "m"), "--model is the model's name at --url"),
        (("plan", "--gpus", 1, "--no-chat-template"), "--no-chat-template says nothing beside --gpus"),
        (("plan", "--contexts", "256", "--no-chat-template"), "--no-chat-template says nothing beside --contexts"),
        (("plan", "--contexts", "256", "--prompts", "P"), "--prompts says nothing beside --contexts"),
    ],
)
def test_prompts_that_nobody_would_read_are_refused(run, argv: tuple, words: str, tmp_path: Path) -> None:
    files = {"LOG": tmp_path / "log.jsonl", "P": tmp_path / "p.txt"}
    for file in files.values():
        file.write_text("x\n")
    code, out = run(*(files.get(a, a) for a in argv))
    assert code == 2 and words in " ".join(out.split())


def test_what_is_measured_finds_no_prompt_of_an_earlier_repeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arms share prompts, and repeats ask them again: `bench`, `ab` and cells of a sweep keep none of what is computed for them."""
    from outrider.cli import ab, bench
    from outrider.evaluate.experiments.experiment import read_experiment
    from outrider.evaluate.sweep import kinds

    class Asked(Exception):
        pass

    def asked(options: EngineOptions | None = None, *_: object, **named: object) -> None:
        raise Asked(options.prefix_cache if options else named["prefix_cache"])

    file = tmp_path / "ab.yaml"
    file.write_text("name: x\narms: {plain: {draft: none}, two: {length: 2}}\ncount: 8\nbatch: 1\n")
    monkeypatch.setattr(ab, "load_engine", asked)
    monkeypatch.setattr(kinds, "build_engine", lambda *_, **named: asked(None, **named))
    for call in (
        lambda: ab.prepare(read_experiment(file), file),
        lambda: kinds.base_engine.__wrapped__(None, "auto", 1, False),
    ):
        with pytest.raises(Asked, match="False"):
            call()
    assert inspect.signature(bench.bench).parameters["prefix_cache"].default is False
