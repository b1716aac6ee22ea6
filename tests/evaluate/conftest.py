"""Commands run in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from outrider.cli.main import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command: its exit code and its output."""

    def one(*argv: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            main()
        seen = capsys.readouterr()  # with --json stdout is the document alone, whatever else there is to say
        return int(end.value.code or 0), seen.out if "--json" in argv and seen.out else "".join(seen)

    return one
