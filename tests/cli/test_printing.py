"""What others have named is printed as text; what is secret is not printed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from outrider.cli import tables
from outrider.cli.audit import power
from outrider.cli.bench_print import speedup_text
from outrider.cli.main import app
from outrider.cli.terminal import Console, pair, print_json
from outrider.errors import ConfigError, printable
from outrider.evaluate.store.database import connect, place_of

RUN = CliRunner()
NAMES = [
    "[/b]",
    "[bold]x",
    "[/dim]",
    "[link=file:///etc]x",
    ":smile:",
    "\x1b[2J",
    "a\x9b31m",
    "\ud800",
    "x\u202ey",
    "[",
    "[]",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_stand_in_a_table_and_in_a_sentence(name: str) -> None:
    """Whole, without a command to the terminal; our own tags are read."""
    out = io.StringIO()
    console = Console(file=out, highlight=False, width=200, force_terminal=True, color_system=None)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    console.print(f"run {name} is [dim]done[/dim]")
    text = out.getvalue()
    assert text.count(printable(name)) >= 3 and "is done" in text
    assert not any(c in text for c in "\x1b\x9b\u202e\ud800")


def test_a_store_with_any_name_can_be_listed(tmp_path: Path) -> None:
    results = {"duration": 1.0, "completed": 0, "total_input_tokens": 0, "total_output_tokens": 0}
    (tmp_path / "r.json").write_text(json.dumps(results))
    store = str(tmp_path / "s.db")
    for name in ("[/b]", "\x1b[2Jx", "plain"):
        found = RUN.invoke(app, ["runs", "import", str(tmp_path / "r.json"), "--store", store, "--name", name])
        assert found.exit_code == 0, found.output
    shown = RUN.invoke(app, ["runs", "list", "--store", store])
    assert shown.exit_code == 0 and "[/b]" in shown.output and "\x1b" not in shown.output
    assert {
        r["name"] for r in json.loads(RUN.invoke(app, ["runs", "list", "--json", "--store", store]).output)["runs"]
    } == {
        "[/b]",
        "\x1b[2Jx",
        "plain",
    }


def test_a_speed_up_of_one_group_has_no_interval() -> None:
    s = {"value": 1.25, "low": 1.1, "high": 1.4, "verdict": "faster"}
    assert speedup_text(s) == "1.25 (1.10 to 1.40) faster"
    for absent in (math.nan, None):  # as it was measured, and as a file has it
        said = speedup_text(s | {"low": absent, "high": absent, "verdict": "undecided"})
        assert said == "1.25 (one group: no interval) undecided"


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": {"d": (math.inf,)}})
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": None, "b": [None, None, 1.5], "c": {"d": [None]}}


def test_half_a_character_is_printed_as_json_has_it(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"aiperf_version": "1", "m": {"unit": "s", "avg": "\\ud800"}}')
    store = str(tmp_path / "t.db")
    RUN.invoke(app, ["runs", "import", str(tmp_path / "t.json"), "--store", store])
    shown = RUN.invoke(app, ["runs", "list", "--json", "--store", store])
    assert shown.exit_code == 0 or shown.exit_code == 2
    assert not isinstance(shown.exception, UnicodeError)


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://u:hidden@h/x", "mysql://u:hidden@h/x", "postgresql:/u:hidden@h/x"]
)
def test_a_url_of_another_kind_is_no_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read_only, where in ((True, url), (False, url), (False, Path(url))):
        with pytest.raises(ConfigError) as caught:
            connect(where, read_only=read_only)
        assert "hidden" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("password", ["ge/heim", "ge?heim", "ge#heim", "ge@heim"])
def test_a_password_that_cannot_be_told_apart_is_refused_unseen(password: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place_of(f"postgresql://u:{password}@127.0.0.1:1/x")
    assert "heim" not in str(caught.value) and "%2F" in str(caught.value)


def test_a_place_is_named_without_user_and_password() -> None:
    assert place_of("postgresql://u:hid%2Fden@h:5/x?sslmode=off") == ("postgresql://h:5/x", ("hid%2Fden",))
    assert place_of("postgresql://h/x?password=hidden") == ("postgresql://h/x", ("hidden",))
    both = place_of("postgresql://u:one@h/x?password=t%2Fwo&sslpassword=three")
    assert both == ("postgresql://h/x", ("one", "t%2Fwo", "three"))
    assert place_of("postgres:///x") == ("postgres:///x", ())


def test_a_row_that_is_too_wide_goes_on_below_itself() -> None:
    table = Table()
    for name in ("arm", "rejections_predicted_observed", "time_of_a_step"):
        table.add_column(name)
    table.add_row("plain_decoding_of_it", "1", "target 89% rule 7% draft 1% host 3% and more of the same")
    out = Console(record=True, width=50, force_terminal=True, color_system=None, file=io.StringIO())
    tables.show(table, out)
    shown = out.export_text().splitlines()
    assert shown[0] == "plain_decoding_of_it" and all(len(line) <= 50 for line in shown)
    at = shown[2].index("target")
    assert len(shown) > 3 and shown[3][:at].isspace() and not shown[3][at].isspace()
    assert (
        " ".join(line[at:].strip() for line in shown[2:]) == "target 89% rule 7% draft 1% host 3% and more of the same"
    )


def test_powers_of_ten_have_no_negative_zero() -> None:
    assert [power(x) for x in (-0.04, 0.04, -0.05001, 2.0, 1489.26)] == [
        "10^0.0",
        "10^0.0",
        "10^-0.1",
        "10^2.0",
        "10^1489.3",
    ]


def test_a_name_and_its_sentence_fit_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal no line is longer than it is wide and no word is cut; into a pipe goes one line."""
    sentence = "at best 2.95 times as fast, 1.63 times where 70% of the drafted tokens are accepted"
    monkeypatch.setattr(
        "outrider.cli.terminal.console", lambda: Console(width=80, force_terminal=True, color_system=None)
    )
    pair("pays", sentence)
    lines = capsys.readouterr().out.splitlines()
    assert [len(line) <= 80 for line in lines] == [True, True] and lines[1].startswith(" " * 13)
    assert " ".join(" ".join(lines).split()) == f"pays {sentence}"
    monkeypatch.undo()
    pair("pays", sentence)
    assert capsys.readouterr().out == f"pays         {sentence}\n"
