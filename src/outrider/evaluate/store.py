"""Where runs are kept: one SQLite file, one transaction per record, nothing committed is ever lost or written twice.

Schema (`PRAGMA user_version` = 1):

    runs         id, kind, name, state (running, done, failed), created, updated (Unix seconds), pid, host, config, summary (JSON)
    records      run, task, item, sample -> data (JSON): one outcome; the four keys are unique
    ledgers      run, task -> judged, rejected, risk, spread, bias: sums of the counts of the task's records
    experiments  name -> run, config, state (JSON): an A/B experiment and what it has decided

A record and its share of the ledger are one transaction. The journal is a write-ahead log where SQLite is 3.51.3 or later; older
ones can corrupt a write-ahead log that two connections reset at once, so there it is a rollback journal (TRUNCATE). Either way
readers wait at most BUSY seconds for a writer. The file must be on a local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError

VERSION = 1
BUSY = 10.0
WAL_IS_SAFE = (3, 51, 3)
SCHEMA = """
CREATE TABLE runs (id TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    updated REAL NOT NULL, pid INTEGER NOT NULL, host TEXT NOT NULL, config TEXT NOT NULL, summary TEXT);
CREATE TABLE records (run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, task TEXT NOT NULL, item INTEGER NOT NULL,
    sample INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (run, task, item, sample)) WITHOUT ROWID;
CREATE TABLE ledgers (run TEXT NOT NULL REFERENCES runs(id) ON DELETE CASCADE, task TEXT NOT NULL, judged INTEGER NOT NULL,
    rejected INTEGER NOT NULL, risk REAL NOT NULL, spread REAL NOT NULL, bias REAL NOT NULL, PRIMARY KEY (run, task));
CREATE TABLE experiments (name TEXT PRIMARY KEY, run TEXT NOT NULL REFERENCES runs(id), config TEXT NOT NULL, state TEXT NOT NULL);
"""
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


Key = tuple[str, int, int]
"""Of a record within its run: (task, item, sample)."""


class Store:
    """A store file, made when it is not there. Use it as a context manager, or close it."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        """Raises ConfigError for a file that is not a store, is damaged, or was written by a later version."""
        self.path = Path(path)
        if read_only and not self.path.is_file():
            raise ConfigError(f"{self.path}: no such store; write one with bench --store")
        try:
            if not read_only:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"file:{self.path.resolve()}" + ("?mode=ro" if read_only else "")
            self.db = sqlite3.connect(name, uri=True, timeout=BUSY, isolation_level=None)
            self._open(read_only)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"{self.path}: cannot be used as a store ({error})") from None

    def _open(self, read_only: bool) -> None:
        run = self.db.execute
        run("PRAGMA foreign_keys = ON")
        if not read_only:
            mode = "WAL" if sqlite3.sqlite_version_info >= WAL_IS_SAFE else "TRUNCATE"
            run(f"PRAGMA journal_mode = {mode}")
            run("PRAGMA synchronous = FULL")
        version = run("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise sqlite3.DatabaseError(f"it has schema {version} and this version knows {VERSION}: update outrider")
        if version == 0 and not read_only:
            with self._transaction():  # another process may have made it in the meantime
                if run("PRAGMA user_version").fetchone()[0] == 0:
                    for statement in SCHEMA.split(";\n"):
                        if statement.strip():
                            run(statement)
                    run(f"PRAGMA user_version = {VERSION}")
        if run("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it is damaged: restore it from a copy")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    # ------------------------------------------------------------------ writing
    def begin(self, kind: str, name: str, config: dict[str, Any]) -> str:
        """A new run, or the unfinished one of the same kind and name to go on with; its id.

        Raises ConfigError when that run was configured differently, or is being written by a process that is alive.
        """
        with self._transaction():
            row = self.db.execute(
                "SELECT id, config, pid, host FROM runs WHERE kind = ? AND name = ? AND state = 'running'", (kind, name)
            ).fetchone()
            if row is None:
                run, now = secrets.token_hex(6), time.time()
                values = (run, kind, name, "running", now, now, os.getpid(), platform.node(), _json(config))
                self.db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)
                return run
            run, known, pid, host = row
            if known != _json(config):
                raise ConfigError(
                    f"{self.path}: run {name!r} is unfinished and was configured differently: repeat its options, or choose "
                    "another name"
                )
            if host == platform.node() and pid != os.getpid() and _alive(pid):
                raise ConfigError(f"{self.path}: run {name!r} is being written by process {pid}")
            self.db.execute(
                "UPDATE runs SET pid = ?, host = ?, updated = ? WHERE id = ?",
                (os.getpid(), platform.node(), time.time(), run),
            )
            return run

    def append(self, run: str, key: Key, data: dict[str, Any]) -> bool:
        """Commit one record and add its `counts` to the ledger; False, and nothing written, if the record is there already."""
        counts = data.get("counts") or {}
        with self._transaction():
            new = self.db.execute(
                "INSERT INTO records VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", (run, *key, _json(data))
            ).rowcount
            if new:
                sums = [counts.get(name, 0) for name in SUMS]
                self.db.execute(
                    "INSERT INTO ledgers VALUES (?, ?, 0, 0, 0, 0, 0) ON CONFLICT DO NOTHING", (run, key[0])
                )
                added = ", ".join(f"{name} = {name} + ?" for name in SUMS)
                self.db.execute(f"UPDATE ledgers SET {added} WHERE run = ? AND task = ?", (*sums, run, key[0]))
                self.db.execute("UPDATE runs SET updated = ? WHERE id = ?", (time.time(), run))
        return bool(new)

    def finish(self, run: str, summary: dict[str, Any], state: str = "done") -> None:
        """Close a run with its summary."""
        with self._transaction():
            self.db.execute(
                "UPDATE runs SET state = ?, summary = ?, updated = ? WHERE id = ?",
                (state, _json(summary), time.time(), run),
            )

    def save_experiment(self, name: str, run: str, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Put or replace what is known of an experiment."""
        with self._transaction():
            self.db.execute(
                "INSERT INTO experiments VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET run = excluded.run, "
                "config = excluded.config, state = excluded.state",
                (name, run, _json(config), _json(state)),
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
            raise ConfigError(f"{self.path}: no run {name!r}; `outrider runs list` shows them")
        return _run(row)

    def records(self, run: str) -> dict[Key, dict[str, Any]]:
        """All records of a run, in the order of their keys."""
        rows = self.db.execute("SELECT task, item, sample, data FROM records WHERE run = ? ORDER BY 1, 2, 3", (run,))
        return {(task, item, sample): json.loads(data) for task, item, sample, data in rows}

    def ledgers(self, run: str) -> dict[str, dict[str, float]]:
        """The sums of a run by task."""
        rows = self.db.execute("SELECT task, judged, rejected, risk, spread, bias FROM ledgers WHERE run = ?", (run,))
        return {task: dict(zip(SUMS, sums, strict=True)) for task, *sums in rows}

    def experiment(self, name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Run, configuration and state of an experiment. Raises ConfigError."""
        row = self.db.execute("SELECT run, config, state FROM experiments WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise ConfigError(f"{self.path}: no experiment {name!r}")
        return row[0], json.loads(row[1]), json.loads(row[2])

    def export(self, run: str) -> str:
        """A run as canonical JSON: sorted keys, one record a line, so that equal runs are equal bytes."""
        found = self.run(run)
        head = {"run": found.id, "kind": found.kind, "name": found.name, "state": found.state, "config": found.config}
        head |= {"summary": found.summary, "ledgers": self.ledgers(found.id)}
        lines = [_json(head)]
        for (task, item, sample), data in self.records(found.id).items():
            lines.append(_json({"task": task, "item": item, "sample": sample, "data": data}))
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


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def fingerprint(value: object) -> str:
    """Short hash of plain data: whether two runs were asked the same."""
    return hashlib.sha256(_json(value).encode()).hexdigest()[:16]
