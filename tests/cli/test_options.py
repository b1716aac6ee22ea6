"""Options are declared once: tables name fields of what they make, commands offer what their table says, helps have an example
that runs."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from outrider.cli.engine_options import ENGINE, configured
from outrider.cli.main import app, main
from outrider.cli.sampling_options import SAMPLING
from outrider.cli.takes import Table, takes
from outrider.errors import ConfigError
from outrider.options import EngineOptions
from outrider.params import SamplingParams
from recipes.docs_reference import leaves

ROOT = Path(__file__).parents[2]
UNASKED = {"chunk"}
"""Fields of `EngineOptions` that no command has an option for."""
ENGINES = {
    "generate": set(ENGINE.options) - {"slots"},
    "chat": set(ENGINE.options) - {"slots"},
    "serve": set(ENGINE.options),
    "bench": set(ENGINE.options) - {"length", "lengths", "slots"},
    "audit": set(ENGINE.options) - {"slots"},
    "plan": set(ENGINE.options) - {"target", "draft", "length", "lengths", "allow_lossy", "slots"},
    "predict": set(ENGINE.options) - {"length", "lengths", "rule", "allow_lossy", "slots"},
    "tree": set(ENGINE.options) - {"length", "lengths", "rule", "allow_lossy", "slots"},
    "demo": {"target", "draft", "length", "dtype"},
    "doctor": {"dtype", "max_length"},
    "train": {"target", "device"},
    "image": {"draft", "length", "rule", "allow_lossy", "dtype"},
    "ab rehearse": {"length"},
}
"""Command -> the engine options that it has."""
OWN = {
    ("doctor", "slots"),
    ("doctor", "target"),
    ("doctor", "draft"),
    ("doctor", "measure"),
    ("plan", "target"),
    ("plan", "draft"),
    ("plan", "slots"),
    ("plan", "lengths"),
    ("bench", "lengths"),
    ("predict", "length"),
    ("train", "length"),
    ("image", "target"),
    ("watch", "target"),
    ("watch", "draft"),
}
"""Options and arguments of the same name that mean something else in a command."""
SAMPLERS = {
    "generate": set(SAMPLING.options),
    "chat": {"temperature", "top_p", "seed", "max_tokens"},
    "bench": {"temperature", "top_p", "max_tokens"},
    "predict": {"temperature", "top_p", "max_tokens"},
    "plan": {"temperature", "max_tokens"},
    "tree": {"temperature", "max_tokens"},
    "demo": {"temperature", "max_tokens"},
    "audit": {"max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos"},
    "ab rehearse": {"max_tokens"},
    "image": {"temperature"},
}
"""Command -> the sampling options that it has."""
DEFAULTS = {
    ("demo", "length"): 2,
    ("ab rehearse", "length"): 4,
    ("image", "length"): 5,
    ("bench", "prefix_cache"): False,
    ("plan", "prefix_cache"): False,
    ("chat", "temperature"): 0.7,
    ("chat", "max_tokens"): 256,
    ("audit", "max_tokens"): 64,
    ("plan", "max_tokens"): 64,
    ("tree", "max_tokens"): 64,
    ("ab rehearse", "max_tokens"): 32,
}
"""(command, field) -> its default there, where it is another one than the field's."""


COMMANDS = dict(leaves(typer.main.get_command(app)))


def spelling(hint: Any) -> list[str]:
    """How a table's option is spelled."""
    option = hint.__metadata__[0]
    return [one for d in (option.default, *(option.param_decls or ())) if isinstance(d, str) for one in d.split("/")]


# ----------------------------------------------------------------- tables
def test_the_tables_name_fields_of_what_they_make() -> None:
    assert set(ENGINE.options) | UNASKED == {f.name for f in fields(EngineOptions)}
    assert set(SAMPLING.options) < {f.name for f in fields(SamplingParams)}
    for name, value in ENGINE.defaults.items():
        assert getattr(EngineOptions(), name) == value
    for name, value in SAMPLING.defaults.items():
        assert getattr(SamplingParams(), name) == (() if name == "stop" else value)
    assert set(SAMPLING.defaults) == set(SAMPLING.options)


def test_an_option_has_the_type_of_its_field() -> None:
    """A field that is a number or a word is text on a command line; the field reads it."""
    hints = inspect.get_annotations(EngineOptions, eval_str=True) | {"draft_vocabulary": str | None}
    for name, option in ENGINE.options.items():
        assert option.__origin__ == hints[name], name
    assert EngineOptions(draft_vocabulary="32").draft_vocabulary == 32


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_has_the_options_that_it_takes_and_no_other(command: str) -> None:
    found = {p.name: p for p in COMMANDS[command].params}
    for table, taken in ((ENGINE, ENGINES.get(command, set())), (SAMPLING, SAMPLERS.get(command, set()))):
        for name, hint in table.options.items():
            if name in taken:
                assert [*found[name].opts, *found[name].secondary_opts] == spelling(hint), name
                assert found[name].help == hint.__metadata__[0].help
                assert found[name].default == DEFAULTS.get((command, name), table.defaults[name])
    spelled = {o for p in found.values() if (command, p.name) not in OWN for o in (*p.opts, *p.secondary_opts)}
    engine_only = {o for name, hint in ENGINE.options.items() for o in spelling(hint) if o.startswith("--")}
    taken = {o for name in ENGINES.get(command, set()) for o in spelling(ENGINE.options[name])}
    if not command.startswith("theory"):  # whose target and draft are sizes
        assert spelled & engine_only == taken & engine_only


def test_a_field_that_is_not_offered_has_the_commands_value() -> None:
    made: list[Any] = []

    @takes(ENGINE, "options", leave_out=("slots", "draft"), slots=1, length=7)
    def command(options: EngineOptions, n: Annotated[int, typer.Option("--n")] = 2) -> None:
        made.append((options, n))

    names = inspect.signature(command).parameters
    assert "slots" not in names and names["length"].default == 7 and "n" in names
    command(**{name: p.default for name, p in names.items()})
    assert made == [(EngineOptions(length=7, slots=1), 2)]
    with pytest.raises(TypeError, match="no such option: lenght"):
        takes(ENGINE, "options", leave_out=("lenght",))


@dataclass(frozen=True)
class Asked:
    where: Annotated[str, typer.Option("--where")]
    many: Annotated[int, typer.Option("--many", "-m", min=1)] = 3


def test_a_dataclass_with_annotated_fields_is_its_own_table() -> None:
    table = Table.of(Asked)
    assert list(table.options) == ["where", "many"] and table.defaults == {"many": 3}

    @takes(Asked, "asked")
    def command(asked: Asked) -> Asked:
        return asked

    names = inspect.signature(command).parameters
    assert names["where"].default is inspect.Parameter.empty
    assert command(where="here", many=4) == Asked("here", 4)


def test_vllms_json_replaces_what_it_names() -> None:
    options = EngineOptions(draft="other", length=5, dtype="float32")
    assert configured(options, None) is options
    found = configured(options, '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}')
    assert (found.draft, found.length, found.dtype) == ("ngram:3-3", 2, "float32")
    with pytest.raises(ConfigError, match="not JSON"):
        configured(options, "{")


# ----------------------------------------------------------------- helps and their examples
def example(command: str) -> str:
    """The line that a command's help gives."""
    found = re.findall(r"Example: (outrider .*)", COMMANDS[command].help or "")
    assert len(found) == 1, command
    return found[0]


def run(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_help_gives_one_example_on_one_line_that_is_parsed(command: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, ["outrider", *command.split(), "--help"]) == 0
    assert f"  Example: {example(command)}\n" in capsys.readouterr().out
    words = shlex.split(example(command))
    assert words[1 : 1 + len(command.split())] == command.split()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_help_is_plain_english(command: str) -> None:
    """The words of the field, and none of those that had to be deciphered."""
    said = " ".join([COMMANDS[command].help or "", *(getattr(p, "help", "") or "" for p in COMMANDS[command].params)])
    accent = r"\b(law|honest|judged|foresee\w*|whatever it costs|go(es)? on behind|has them not|one an? \w+)\b"
    assert not re.search(accent, said), re.search(accent, said)
    for p in COMMANDS[command].params:
        if p.name != "help" and not getattr(p, "hidden", False):
            assert p.help and p.help.rstrip()[-1] in ".)", f"{command}: {p.opts}"
