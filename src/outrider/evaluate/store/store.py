"""Where runs are kept: one transaction per record, nothing committed is ever lost or written twice.

A store is an SQLite file or a Postgres database (`database`). Schema, version 1 (`PRAGMA user_version`, or the table
`outrider_schema`):

    runs         id, kind, name, state (running, done, failed), created, updated (Unix seconds), pid, host, config, summary (JSON)
    records      run, task, item, sample -> data (JSON): one outcome; the four keys are unique
    ledgers      run, task -> judged, rejected, risk, spread, bias: sums of the counts of the task's records
    experiments  name -> run, config, state (JSON): an A/B experiment and what it has decided

A record and its share of the ledger are one transaction. A run that is `running` belongs to the process that wrote it last;
another one may continue it when that process is gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import CapacityError, ConfigError
from outrider.evaluate.records import Key
from outrider.evaluate.store.database import URLS, connect

VERSION = 1
LEASE = 600.0
"""Seconds without a record after which a run of another machine may be continued."""
SCHEMA = (
    "CREATE TABLE runs (id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL, "
    "created DOUBLE PRECISION NOT NULL, updated DOUBLE PRECISION NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL, "
    "config TEXT NOT NULL, summary TEXT)",
    "CREATE TABLE records (run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, task TEXT NOT NULL, item INTEGER NOT NULL, "
    "sample INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (run, task, item, sample)) WITHOUT ROWID",
    "CREATE TABLE ledgers (run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, task TEXT NOT NULL, "
    "judged BIGINT NOT NULL, rejected BIGINT NOT NULL, risk DOUBLE PRECISION NOT NULL, spread DOUBLE PRECISION NOT NULL, "
    "bias DOUBLE PRECISION NOT NULL, PRIMARY KEY (run, task))",
    "CREATE TABLE experiments (name TEXT PRIMARY KEY, run TEXT NOT NULL REFERENCES runs(id), config TEXT NOT NULL, "
    "state TEXT NOT NULL)",
)
SUMS = ("judged", "rejected", "risk", "spread", "bias")


@dataclass(frozen=True, slots=True)
class Run:
    """One row of `runs`, its JSON parsed."""

    id: str
    kind: str
    name: str
    state: str
    created: float
    updated: float
    pid: int
    host: str
    config: dict[str, Any]
    summary: dict[str, Any] | None


class Store:
    """A store, made when it is not there. Use it as a context manager, or close it."""

    def __init__(self, where: str | Path, *, read_only: bool = False) -> None:
        """where: a file, or a URL (postgresql://user@host/database).

        Raises ConfigError for what is not a store, is damaged, cannot be reached, or was written by a later version.
        """
        self.db = connect(where, read_only=read_only)
        self.name = self.db.name
        try:
            version = self.db.version()
            if version == 0 and not read_only:
                self.db.make(SCHEMA, VERSION)
        except self.db.error as error:
            self.db.close()
            raise ConfigError(f"{self.name}: cannot be used as a store ({error})") from None
        except ConfigError:
            self.db.close()
            raise
        if version > VERSION or (version == 0 and read_only):
            self.db.close()
            late = f"it has schema {version} and this version knows {VERSION}: update outrider"
            raise ConfigError(
                f"{self.name}: cannot be used as a store ({late if version else 'nothing was ever written to it'})"
            )

    @contextlib.contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction; what the database refuses (a full disk, a lock, a read-only file) becomes one sentence."""
        try:
            with self.db.transaction():
                yield
        except self.db.error as error:
            raise CapacityError(
                f"{self.name}: cannot be written ({str(error).strip()}); what was committed is kept: repeat the command to go on"
            ) from None

    # ------------------------------------------------------------------ writing
    def begin(self, kind: str, name: str, config: dict[str, Any], *, reopen: bool = False) -> str:
        """A new run, or the unfinished one of the same kind and name, to be continued; its id. reopen: also a finished one.

        Raises ConfigError when that run was configured differently, or is being written by a process that is alive.
        """
        name = name.encode("utf-8", "backslashreplace").decode()  # of a file whose name is no text
        with self._write():
            row = self.db.execute(
                "SELECT id, config, pid, host, updated, state FROM runs WHERE kind = ? AND name = ? AND (state = 'running' OR ?) "
                "ORDER BY created DESC",
                (kind, name, reopen),
            ).fetchone()
            if row is None:
                run, now = secrets.token_hex(6), time.time()
                values = (run, kind, name, "running", now, now, os.getpid(), platform.node(), canonical(config))
                self.db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)
                return run
            run, known, pid, host, updated, state = row
            if known != canonical(config):
                raise ConfigError(
                    f"{self.name}: run {name!r} is unfinished and was configured differently: repeat its options, or choose "
                    "another name"
                )
            if state == "running" and _held(pid, host, updated):
                raise ConfigError(f"{self.name}: run {name!r} is being written by process {pid} of {host}")
            self.db.execute(
                "UPDATE runs SET state = 'running', pid = ?, host = ?, updated = ? WHERE id = ?",
                (os.getpid(), platform.node(), time.time(), run),
            )
            return run

    def append(
        self, run: str, key: Key, data: dict[str, Any], beside: Mapping[Key, dict[str, Any]] | None = None
    ) -> bool:
        """Commit one record and add its `counts` to the ledger; False, and nothing written, if the record is there already.

        beside: further records, which are written in the same transaction or not at all, and have no share of the ledger.
        """
        counts = data.get("counts") or {}
        with self._write():
            new = self.db.execute(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", (run, *key, canonical(data))
            ).rowcount
            if new:
                sums = [counts.get(name, 0) for name in SUMS]
                self.db.execute(
                    "INSERT INTO ledgers VALUES (?, ?, 0, 0, 0, 0, 0) ON CONFLICT DO NOTHING", (run, key[0])
                )
                added = ", ".join(f"{name} = {name} + ?" for name in SUMS)
                self.db.execute(f"UPDATE ledgers SET {added} WHERE run = ? AND task = ?", (*sums, run, key[0]))
                for other, more in (beside or {}).items():
                    self.db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", (run, *other, canonical(more)))
                self.db.execute("UPDATE runs SET updated = ? WHERE id = ?", (time.time(), run))
        return bool(new)

    def touch(self, run: str) -> None:
        """Say that a run is still being written, though it has had no record for a while: see LEASE."""
        with self._write():
            self.db.execute("UPDATE runs SET updated = ? WHERE id = ?", (time.time(), run))

    def finish(self, run: str, summary: dict[str, Any], state: str = "done") -> None:
        """Close a run with its summary."""
        with self._write():
            self.db.execute(
                "UPDATE runs SET state = ?, summary = ?, updated = ? WHERE id = ?",
                (state, canonical(summary), time.time(), run),
            )

    def save_experiment(self, name: str, run: str, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Put or replace what is known of an experiment."""
        with self._write():
            self.db.execute(
                "INSERT INTO experiments VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET run = excluded.run, "
                "config = excluded.config, state = excluded.state",
                (name, run, canonical(config), canonical(state)),
            )

    # ------------------------------------------------------------------ reading
    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [_run(row) for row in self.db.execute("SELECT * FROM runs ORDER BY created, id")]

    def run(self, name: str) -> Run:
        """The run with this id, or the latest one with this name. Raises ConfigError."""
        row = self.db.execute(
            "SELECT * FROM runs WHERE id = ? OR name = ? ORDER BY id = ? DESC, created DESC", (name, name, name)
        ).fetchone()
        if row is None:
            raise ConfigError(f"{self.name}: no run {name!r}; `outrider runs list` shows them")
        return _run(row)

    def records(self, run: str) -> dict[Key, dict[str, Any]]:
        """All records of a run, in the order of their keys."""
        order = 'COLLATE "C"' if self.name.startswith(URLS) else ""  # SQLite's order: by bytes
        rows = self.db.execute(
            f"SELECT task, item, sample, data FROM records WHERE run = ? ORDER BY task {order}, item, sample", (run,)
        )
        return {(task, item, sample): json.loads(data) for task, item, sample, data in rows}

    def ledgers(self, run: str) -> dict[str, dict[str, float]]:
        """The sums of a run by task."""
        rows = self.db.execute("SELECT task, judged, rejected, risk, spread, bias FROM ledgers WHERE run = ?", (run,))
        return {task: dict(zip(SUMS, sums, strict=True)) for task, *sums in rows}

    def experiment(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Run, configuration and state of an experiment. Raises ConfigError."""
        row = self.db.execute("SELECT run, config, state FROM experiments WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise ConfigError(f"{self.name}: no experiment {name!r}")
        return row[0], json.loads(row[1]), json.loads(row[2])

    def export(self, run: str) -> str:
        """A run as canonical JSON: sorted keys, one record a line, so that equal runs are equal bytes."""
        with self.db.snapshot():
            found = self.run(run)
            ledgers, records = self.ledgers(found.id), self.records(found.id)
        head = {"run": found.id, "kind": found.kind, "name": found.name, "state": found.state, "config": found.config}
        lines = [canonical(head | {"summary": found.summary, "ledgers": ledgers})]
        for (task, item, sample), data in records.items():
            lines.append(canonical({"task": task, "item": item, "sample": sample, "data": data}))
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run(row: tuple[Any, ...]) -> Run:
    run, kind, name, state, created, updated, pid, host, config, summary = row
    known = None if summary is None else json.loads(summary)
    return Run(run, kind, name, state, created, updated, pid, host, json.loads(config), known)


def canonical(value: object) -> str:
    """Canonical JSON; numbers that JSON does not have (an open interval) become null."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _held(pid: int, host: str, updated: float) -> bool:
    """Whether the process that wrote a run last may still be writing it. Another machine's process cannot be asked: a lease."""
    if host != platform.node():
        return time.time() - updated < LEASE
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(pid)
    return started is None or started <= updated + 1.0  # a later process that was given the same number is another one


def _started(pid: int) -> float | None:
    """When a process was started, in Unix seconds; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
        return int(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def fingerprint(value: object) -> str:
    """Short hash of plain data: whether two runs were asked the same."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]
