"""What a newcomer types first: narrow windows and pipes, wrong paths before anything is loaded, the line that ends a text."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outrider.cli import paths, tables, terminal
from outrider.cli.closing import Closing, sentence
from outrider.cli.main import app, main, out_of_memory
from outrider.errors import ConfigError
from outrider.params import SamplingParams
from outrider.records import Counts
from outrider.verify import load_rule
from tests.contract.asked import PROMPTS, engine, target
from tests.contract.drafters import DRAFTERS

HEADER = ("arm", "tokens/s", "p10 to p90", "speed-up (95%)", "predicted", "rejections: predicted, observed", "time")
ROWS = [
    ("plain", "663.1", "612.0 to 690.5", "base", "", "", "target 96% host 4%"),
    ("length 12", "1286.2", "1100.4 to 1409.9", "2.00 (1.87 to 2.14) faster", "1.99", "490.0, 490 agree", "target 66%"),
]


def table() -> Table:
    made = Table(title="all [bold]arms[/bold]", title_justify="left")
    for name in HEADER:
        made.add_column(name)
    for row in ROWS:
        made.add_row(*row[:-1], Text(row[-1], style="blue"))
    return made


def shown(width: int, framed: bool) -> str:
    file = io.StringIO()
    kind = {"force_terminal": framed, "color_system": "truecolor" if framed else None}
    tables.show(table(), Console(file=file, width=width if framed else terminal.PIPE, highlight=False, **kind))
    return file.getvalue()


def words(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m|[│┃┏┓┗┛┡┩└┘├┤┬┴┼━─┳╇]", " ", text).split()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_word_is_broken_and_no_line_is_too_long(width: int) -> None:
    text = shown(width, framed=True)
    found = words(text)
    for word in " ".join((*HEADER[1:], *(c for r in ROWS for c in r))).split():
        assert word in found or width < 40, (word, text)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert max(map(len, lines)) <= width


def test_a_pipe_gets_plain_aligned_text() -> None:
    text = shown(80, framed=False)
    lines = text.splitlines()
    assert "\x1b" not in text and not set(text) & set("│┃┏━─█")
    assert lines[0] == "all arms" and len(lines) == 4
    assert [line.index(cell) for line, cell in zip(lines[1:], ("tokens/s", "663.1", "1286.2"), strict=True)] == [11] * 3


@pytest.mark.parametrize(("sizes", "room"), [([(3, 9), (4, 40), (2, 2)], 30), ([(5, 5)], 5), ([(1, 1), (9, 90)], 12)])
def test_widths_fill_the_room_and_break_nothing(sizes: list, room: int) -> None:
    widths = tables.fitted(sizes, room)
    assert widths is not None and sum(widths) <= room
    assert all(low <= w <= high for w, (low, high) in zip(widths, sizes, strict=True))
    assert tables.fitted(sizes, sum(low for low, _ in sizes) - 1) is None


# ------------------------------------------------------------------------------------------------------ the command
def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outrider", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def names(command: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The command and all below it, each as the words that call it."""
    below = getattr(command, "commands", {})
    return [before, *(found for name, c in below.items() for found in names(c, (*before, name)))]


@pytest.mark.parametrize("command", names(typer.main.get_command(app)), ids=" ".join)
def test_help_is_plain_and_whole_everywhere(command: tuple[str, ...], monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for flag in ("-h", "--help"):
        assert run(monkeypatch, *command, flag) == 0
        text = capsys.readouterr().out
        assert text.startswith("Usage: outrider") and not set(text) & set("…─│")


WRONG = [
    ["generate", "x", "--target", "./nosuch"],
    ["generate", "x", "--target", "./empty"],
    ["generate", "x", "--target", "./file"],
    ["generate", "x", "--draft", "tree:2x2:./nosuch"],
    ["generate", "x", "--draft", "ngram+medusa:/nosuch"],
    ["generate", "x", "--json-schema", "nosuch.json"],
    ["generate", ""],
    ["bench", "--prompts", "nosuch.jsonl"],
    ["bench", "--prompts", "empty"],
    ["bench", "--out", "file/x.json"],
    ["bench", "--out", "empty"],
    ["plan", "--draft", "ngram", "--draft", "./nosuch"],
    ["predict", "--from-logs", "nosuch"],
    ["predict", "--from-logs", "file"],
    ["generate", "x", "--rule", "blokc"],
    ["bench", "--draft", "ngarm"],
    ["serve", "--dtype", "float33"],
    ["generate", "x", "--device", "gpu9"],
    ["bench", "--device", "meta"],
    ["bench", "--lengths", "0,99"],
    ["bench", "--answers", "x.jsonl"],
    ["plan", "--lengths", "0,99"],
    ["train", "medusa", "--device", "mps"],
    ["audit", "--rule", "nosuch"],
    ["audit", "--level", "0"],
    ["audit", "--url", "", "--model", "x"],
    ["audit", "--url", "ftp://x"],
    ["train", "medusa", "--out", "file"],
    ["train", "medusa", "--work", "file"],
    ["bench", "--preset", "chart", "--figures", "file"],
    ["bench", "--compat", "spec-bench", "--answers", "file"],
    ["theory", "figures", "--out", "file"],
    ["audit", "--detect", "nan"],
    ["bench", "--prompts", "deep.jsonl"],
    ["predict", "--prompts", "deep.jsonl"],
    ["plan", "--prompts", "deep.jsonl"],
    ["tree", "--prompts", "deep.jsonl"],
    ["generate", "x", "--json-schema", "/dev/zero"],
    ["serve", "--target", "./nosuch"],
    ["serve", "--experiment", "nosuch.yaml"],
    ["train", "medusa", "--data", "nosuch"],
    ["ab", "run", "nosuch.yaml"],
    ["audit", "--texts", "nosuch"],
    ["doctor", "./nosuch"],
    ["doctor", "./empty", "./empty"],
    ["tree", "--prompts", "nosuch"],
    ["chat", "--target", "/nosuch"],
    ["runs", "import", "nosuch"],
    ["gate", "nosuch.json", "other.json"],
    ["ab", "status", "x", "--store", "nosuch.db"],
    ["ab", "report", "x", "--store", "nosuch.db", "--out", "x.html"],
    ["theory", "figures", "--out", "file/x"],
]
"""Command lines that name what is not there, or is no such thing."""


def test_wrong_paths_and_names_are_said_before_torch_is_imported(tmp_path: Path) -> None:
    """One process for all of them: none of these may have imported it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    code = (
        "import sys\nfrom outrider.cli.main import main\n"
        f"for argv in {WRONG!r}:\n"
        "    sys.argv = ['outrider', *argv]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        print(end.code, 'torch' in sys.modules, argv)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.stdout.splitlines() == [f"2 False {argv}" for argv in WRONG], done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(WRONG) and all(s.startswith("outrider: ") for s in said), said


def test_python_m_outrider(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "outrider", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("outrider ")


def test_a_mistyped_option_names_the_nearest(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "generate", "x", "--temprature", "1") == 2
    assert "--temperature" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["theory", "chain"], ["theory", "speedup", "--target", "70b", "--draft", "1b"]])
def test_a_reader_that_goes_away_is_no_error(argv: list[str]) -> None:
    line = f"{sys.executable} -m outrider {' '.join(argv)} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 TB"), "out of memory"),
        (PermissionError(13, "Permission denied", "/kept/away"), "/kept/away: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(raised, said: str, monkeypatch, capsys) -> None:
    def fail(**_: object) -> None:
        raise raised

    monkeypatch.setattr("outrider.cli.main.command", lambda: fail)
    assert run(monkeypatch) == 2
    seen = capsys.readouterr().err.splitlines()
    assert len(seen) == 1 and seen[0].startswith("outrider: ") and said in seen[0]
    assert out_of_memory(raised) == (said == "out of memory")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("outrider.cli.main.command", lambda: fail)
    monkeypatch.setattr(sys, "argv", ["outrider"])
    with pytest.raises(RuntimeError, match="shapes differ"):
        main()


def test_what_an_extra_lacks_is_named() -> None:
    paths.needs("serve", ("json",))
    with pytest.raises(ConfigError, match=r"this needs no_such_package: pip install 'outrider\[serve\]'"):
        paths.needs("serve", ("json", "no_such_package"))


def test_output_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    assert paths.out_file(tmp_path / "new" / "deep" / "x.json") == tmp_path / "new" / "deep" / "x.json"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        paths.writable(tmp_path / "file" / "x")
    with pytest.raises(ConfigError, match="is a folder"):
        paths.out_file(tmp_path)


# ------------------------------------------------------------------------------------------------- the closing line
def test_the_line_says_what_the_counts_say() -> None:
    model = target()
    closing = Closing()
    one = engine(model, DRAFTERS["model"](model, 1), load_rule("auto"), 1, eos=(), sinks=(closing,))
    one.generate([PROMPTS[0]], SamplingParams(max_tokens=5, seed=1))
    closing.begin(one)
    list(one.stream(PROMPTS[1], SamplingParams(max_tokens=12, seed=1, ignore_eos=True)))
    line = closing.line()
    assert line.startswith("12 tokens, ")
    assert f"{one.counts.rejected} observed" in line and "first token after" in line
    assert f"acceptance length {1 + one.counts.accepted / one.counts.steps:.2f}" in line


def test_the_line_of_a_text_without_drafts_or_without_tokens() -> None:
    assert "nothing was drafted" in sentence(Counts(steps=3, emitted=3), 1.0, 0.5)
    assert sentence(Counts(), 0.25, None) == "no token came in 0.25 s"


def test_generate_ends_with_the_line_on_stderr_alone(monkeypatch, capsys) -> None:
    common = ("generate", "def f(", "--seed", "1", "--max-tokens", "8", "--ignore-eos")
    assert run(monkeypatch, *common) == 0
    seen = capsys.readouterr()
    assert "tokens/s" in seen.err and "acceptance length" in seen.err and "tokens/s" not in seen.out
    assert run(monkeypatch, *common, "--json") == 0
    assert "tokens/s" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "piped", "wanted"), [("-", "from a pipe", 0), (None, "from a pipe", 0), (None, "", 2)]
)
def test_a_prompt_comes_from_a_pipe(given, piped: str, wanted: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    more = [] if given is None else [given]
    assert run(monkeypatch, "generate", *more, "--max-tokens", "2", "--draft", "none") == wanted
    assert wanted == 0 or "the prompt is empty" in capsys.readouterr().err
