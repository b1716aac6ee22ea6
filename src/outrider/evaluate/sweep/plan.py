"""Plan files: YAML that names cells, and grids of them. Bounded and checked whole before anything is loaded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outrider.errors import ConfigError, unknown_name
from outrider.evaluate.store.store import canonical
from outrider.evaluate.sweep.cells import Cell, Kind, code_version, data_of, identity
from outrider.files import read_yaml

MAX_BYTES = 1 << 20
"""Most characters of a plan as JSON, aliases written out."""
MAX_CELLS = 10_000
"""Most cells of a plan."""
MAX_DEPTH = 8


class _Plan(BaseModel):
    """The file. attempts: tries of a cell whose worker dies. limit: seconds of one try. common: fields that all cells have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    name: Annotated[str, Field(min_length=1, max_length=200)]
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    limit: Annotated[float, Field(gt=0, le=30 * 86400)] = 3600.0
    common: dict[str, Any] = Field(default_factory=dict)
    cells: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_CELLS)]


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan that can be run: its cells in the order of the file."""

    name: str
    attempts: int
    limit: float
    cells: tuple[Cell, ...]


def read_plan(path: Path, kinds: Mapping[str, Kind]) -> Plan:
    """The plan of a YAML file. Raises ConfigError with the place in the file: for what is no plan, for an unknown field (with the
    nearest known one), a value out of bounds, a file that is not there, a cell that is named twice."""
    plan = _parse(path)
    cells: list[Cell] = []
    seen: dict[str, int] = {}
    read: dict[str, str] = {}
    for number, (entry, place, fields) in enumerate(_expanded(plan, path)):
        where = f"{path}: cells[{entry}]"
        kind, checked = _checked(fields, kinds, where)
        files = [str(p) for p in _readable(kind, checked, where)]
        data = read.setdefault("\0".join(files), "") or data_of(map(Path, files))
        read["\0".join(files)] = data
        plain = checked.as_cell()
        cell = Cell(
            number, _label(kind.name, place, plain), plain, kind.alone(checked), checked.threads, code_version(), data
        )
        if (twin := seen.setdefault(cell.identity, number)) != number:
            raise ConfigError(
                f"{where}: cell {number} is the same as cell {twin}: name each once, with seeds to repeat it"
            )
        cells.append(cell)
    return Plan(plan.name, plan.attempts, plan.limit, tuple(cells))


def _parse(path: Path) -> _Plan:
    found = read_yaml(path, MAX_BYTES)
    if not isinstance(found, dict) or not isinstance(found.get("cells"), list):
        raise ConfigError(f"{path}: a plan is a mapping with a list of `cells`, each with its `kind`")
    for key in found:
        if key not in _Plan.model_fields:
            raise ConfigError(f"{path}: {unknown_name('field', str(key), _Plan.model_fields)}")
    try:
        return _Plan.model_validate({"name": path.stem, **found})
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(x) for x in first["loc"])
    return f"{where}: {first['msg']}, got {str(first['input'])[:80]!r}" if where else str(first["msg"])


def _expanded(plan: _Plan, path: Path) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Number of the entry, the cell's place in its grid, and its fields."""
    count = 0
    for entry, given in enumerate(plan.cells):
        where = f"{path}: cells[{entry}]"
        fields = {**plan.common, **given}
        grid = fields.pop("grid", {})
        if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
            raise ConfigError(f"{where}: grid maps fields to lists of values, such as {{length: [1, 2, 4]}}")
        size = 1
        for values in grid.values():
            size *= len(values)
        if (count := count + size) > MAX_CELLS:
            raise ConfigError(f"{where}: more than {MAX_CELLS} cells: split the plan")
        for values in itertools.product(*grid.values()):
            place = dict(zip(grid, values, strict=True))
            cell = json.loads(json.dumps(fields))
            for name, value in place.items():
                _put(cell, name, value, where)
            yield entry, place, cell


def _put(cell: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Set a field of a grid; "arms.fast.length" is one within others."""
    *path, last = name.split(".")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{where}: grid field {name[:80]!r} is nested too deeply")
    if last in cell and not path:
        raise ConfigError(f"{where}: {name} is both a field and in the grid: leave one out")
    inner = cell
    for part in path:
        inner = inner.get(part)  # type: ignore[assignment]
        if not isinstance(inner, dict):
            raise ConfigError(f"{where}: grid field {name[:80]!r}: there is no {part!r} to set it in")
    inner[last] = value


def _checked(fields: dict[str, Any], kinds: Mapping[str, Kind], where: str) -> tuple[Kind, Any]:
    name = str(fields.get("kind"))
    if name not in kinds:
        raise ConfigError(f"{where}: {unknown_name('kind', name, kinds)}")
    kind = kinds[name]
    for key in fields:
        if key not in kind.fields.model_fields:
            raise ConfigError(f"{where}: {unknown_name('field', str(key), kind.fields.model_fields)}")
    try:
        return kind, kind.fields.model_validate(fields)
    except (ValidationError, ConfigError) as error:
        raise ConfigError(f"{where}: {_first(error) if isinstance(error, ValidationError) else error}") from None


def _readable(kind: Kind, checked: Any, where: str) -> list[Path]:
    try:
        files = list(kind.reads(checked))
        if absent := next((p for p in files if not p.exists()), None):
            raise ConfigError(f"{absent}: no such file or folder; paths of a plan begin where the command is run")
        return files
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _label(kind: str, place: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """What tables call a cell: its kind and its place in the grid."""
    said = {**(place or {k: fields[k] for k in ("draft", "length") if k in fields})}
    if fields.get("seed") is not None:
        said["seed"] = said.pop("seed", fields["seed"])  # the last word: see `same_but_seed`
    words = ", ".join(f"{k} {v if isinstance(v, str | int | float) else canonical(v)}" for k, v in said.items())
    return f"{kind}: {words}"[:160] if words else kind


def same_but_seed(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that differ in their seed alone, together: repeats of one measurement."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = {k: v for k, v in cell.fields.items() if k != "seed"}
        groups.setdefault(identity(rest, cell.code, cell.data), []).append(cell)
    return list(groups.values())
