"""Options of a command line that make one object together: declared once, and taken by a command with one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_origin


@dataclass(frozen=True, slots=True)
class Table:
    """make: the object of the values, by field. options: field -> its type and `typer.Option`. defaults: of these fields."""

    make: Callable[..., Any]
    options: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @staticmethod
    def of(kind: type) -> Table:
        """The table that a dataclass is whose fields are annotated with their `typer.Option`."""
        hints = inspect.get_annotations(kind, eval_str=True)
        options = {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}
        return Table(kind, options, defaults_of(kind))


def defaults_of(kind: type) -> dict[str, Any]:
    """The defaults of a dataclass; a field that must be given has none."""
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


def takes(
    table: Table | type, parameter: str, *, only: Iterable[str] = (), leave_out: Iterable[str] = (), **values: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the command has the options of `table` in place of `parameter`, which gets the one object that they make.

    only: the fields whose options the command has, leave_out: those it lacks; neither: all. values: what a field is by default
    in this command, and what it always is where the command lacks its option.
    """
    table = table if isinstance(table, Table) else Table.of(table)
    offered = [name for name in table.options if (not only or name in only) and name not in leave_out]
    unknown = {*only, *leave_out} - set(table.options)
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    fixed = {name: value for name, value in values.items() if name not in offered}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
        at = [p.name for p in parameters].index(parameter)
        parameters[at : at + 1] = [_parameter(name, table, values) for name in offered]

        def call(**given: Any) -> Any:
            made = table.make(**fixed, **{name: given.pop(name) for name in offered})
            return command(**given, **{parameter: made})

        call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return decorate


def _parameter(name: str, table: Table, values: Mapping[str, Any]) -> inspect.Parameter:
    default = values.get(name, table.defaults.get(name, inspect.Parameter.empty))
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=table.options[name])
