"""Somebody who does research: the Python of the pages, predictions and theory, runs in a store, an audit, a gate."""

from __future__ import annotations

from pathlib import Path

from steps import documented, journey, need, python_of, run, terminal

FEW = "--count 3 --max-tokens 16"


def from_python() -> None:
    for page in ("README.md", "api.md"):
        Path("page.py").write_text("\n".join(python_of(page)), encoding="utf-8")
        done = run("python page.py")
        need(done.out.strip() and not done.err.strip(), f"the Python of {page} said on stderr: {done.err}")


def theory() -> None:
    run(documented("theory.md", "outrider theory chain"))
    terminal(documented("theory.md", "outrider theory speedup"))
    run(documented("theory.md", "outrider theory figures"), "--out figures")
    need(len(list(Path("figures").glob("*.svg"))) > 5, "no figures")
    run(documented("predict.md", "outrider predict --save-logs"), FEW)
    run("outrider predict --from-logs pair.jsonl")
    terminal("outrider predict --from-logs pair.jsonl")


def runs() -> None:
    for name in ("baseline", "candidate"):
        line = documented(
            "evaluate.md", f"outrider bench --lengths 0,4 --count 16 --quality --store outrider.db --name {name}"
        )
        run(line, f"{FEW} --warmup 0 --repeats 1")
    terminal("outrider runs list")
    run("outrider runs show baseline")
    run("outrider runs export baseline --out baseline.jsonl")
    run("outrider runs export baseline --out baseline.csv")
    need(Path("baseline.jsonl").stat().st_size and Path("baseline.csv").stat().st_size, "nothing was exported")
    terminal(documented("evaluate.md", "outrider gate candidate baseline"), code=(0, 1, 3))
    run("outrider runs show nosuch", code=2)
    run(
        documented("audit.md", "outrider audit --count 16 --samples 2"),
        "--count 2 --samples 1 --max-tokens 8",
        code=(0, 3),
    )


if __name__ == "__main__":
    journey("research", from_python, theory, runs)
