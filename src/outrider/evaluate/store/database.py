"""Where a store's tables are: an SQLite file, or a Postgres database by URL. The same statements run on both.

SQLite: one transaction per record, synced before it returns. The journal is a write-ahead log where SQLite is 3.51.3 or later;
older ones (3.7.0 to 3.51.2) can corrupt a write-ahead log that two connections reset at once, so there it is a rollback journal
(TRUNCATE). Either way a connection waits at most BUSY seconds for another one. The file must be on a local disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

from outrider.errors import ConfigError

BUSY = 10.0
WAL_IS_SAFE = (3, 51, 3)
URLS = ("postgresql://", "postgres://")
LOCK = 0x6F757472
"""Number of the advisory lock under which a Postgres store is made ("outr")."""


@runtime_checkable
class Database(Protocol):
    """What a store needs of a database; statements have `?` for their parameters."""

    name: str
    error: tuple[type[Exception], ...]

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """Run one statement; the cursor has `fetchone`, `fetchall`, `rowcount`, and iterates over rows."""
        ...

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """One transaction that excludes other writers; undone when the body raises."""
        ...

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        """Everything read inside is of one moment."""
        ...

    def version(self) -> int:
        """Schema version, 0 for a database without a store."""
        ...

    def make(self, statements: Sequence[str], version: int) -> None:
        """Make the tables and set the version, unless another process has done so in the meantime."""
        ...

    def close(self) -> None: ...


def connect(where: str | Path, *, read_only: bool) -> Database:
    """The database of a store: a path, or a URL that begins with postgresql://. Raises ConfigError."""
    if isinstance(where, str) and where.startswith(URLS):
        return Postgres(where, read_only=read_only)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(where))
    if scheme:  # never a file of that name, which may have a password in it
        raise ConfigError(f"{scheme[1]}: is no kind of store: give a file, or a URL that begins with postgresql://")
    return Sqlite(Path(where), read_only=read_only)


class Sqlite:
    """A store file, made when it is not there."""

    error: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.name = str(path)
        if read_only and not path.is_file():
            raise ConfigError(f"{path}: no such store; write one with bench --store")
        try:
            if not read_only:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif _left_a_journal(path):
                _recover(path)
            self.connection = _open(path, "ro" if read_only else "rwc")
            if not read_only:
                mode = "WAL" if sqlite3.sqlite_version_info >= WAL_IS_SAFE else "TRUNCATE"
                self.execute(f"PRAGMA journal_mode = {mode}")
                self.execute("PRAGMA synchronous = FULL")
            if self.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("it is damaged: restore it from a copy")
        except self.error as error:
            raise ConfigError(f"{path}: cannot be used as a store ({error})") from None

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)

    @contextlib.contextmanager
    def _between(self, begin: str) -> Iterator[None]:
        self.execute(begin)
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # some errors (a full disk) have undone it already
                self.execute("ROLLBACK")
            raise

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        return self._between("BEGIN IMMEDIATE")

    def snapshot(self) -> contextlib.AbstractContextManager[None]:
        return self._between("BEGIN")

    def version(self) -> int:
        found = int(self.execute("PRAGMA user_version").fetchone()[0])
        if not found and self.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ConfigError(f"{self.name}: a database of something else; name another file as the store")
        return found

    def make(self, statements: Sequence[str], version: int) -> None:
        with self.transaction():
            if not self.version():
                for statement in statements:
                    self.execute(statement)
                self.execute(f"PRAGMA user_version = {version}")

    def close(self) -> None:
        self.connection.close()


def _open(path: Path, mode: str) -> sqlite3.Connection:
    name = path.resolve().as_uri() + f"?mode={mode}"  # a URI: `?` and `#` in a name are quoted
    connection = sqlite3.connect(name, uri=True, timeout=BUSY, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _left_a_journal(path: Path) -> bool:
    """Whether a writer that was killed may have left a transaction to undo, which a read-only connection cannot do."""
    for suffix in ("-journal", "-wal"):
        with contextlib.suppress(OSError):
            found = os.stat(f"{path}{suffix}")
            if stat.S_ISREG(found.st_mode) and found.st_size:
                return True
    return False


def _recover(path: Path) -> None:
    """Let SQLite undo an unfinished transaction; where the folder is not writable, reading says so in its own words."""
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        with contextlib.closing(_open(path, "rw")) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


def place_of(url: str) -> tuple[str, tuple[str, ...]]:
    """What messages call a Postgres URL, without user and password, and the passwords as they stand in it. ConfigError for one that
    cannot be told apart from its password."""
    scheme, _, rest = url.partition("://")
    user, _, place = rest.rpartition("@")
    query = re.findall(r"(?:^|&)(?:ssl)?password=([^&]+)", place.partition("?")[2])
    if any(c in user for c in "/?#@[]") or "@" in user:
        raise ConfigError(
            "the URL of the store cannot be read: write / ? # @ [ ] in its user or password as %2F %3F %23 %40 %5B %5D"
        )
    secrets = (user.partition(":")[2], *query)
    return f"{scheme}://{place.partition('?')[0]}", tuple(s for s in secrets if s)


class Postgres:
    """A Postgres database, schema `public` or the one the URL's options name. Needs `pip install 'outrider[postgres]'`."""

    def __init__(self, url: str, *, read_only: bool) -> None:
        try:
            import psycopg
        except ImportError:
            raise ConfigError("a store in Postgres needs psycopg: pip install 'outrider[postgres]'") from None
        self.name, secrets = place_of(url)
        self.error: tuple[type[Exception], ...] = (psycopg.Error,)
        try:
            # its stubs take only literal statements; ours are literals with `?` exchanged
            self.connection: Any = psycopg.connect(url, autocommit=True, connect_timeout=int(BUSY))
            self.connection.execute(f"SET lock_timeout = {int(1000 * BUSY)}")
            self.connection.read_only = read_only
        except psycopg.Error as error:
            words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            for secret in secrets:
                words = words.replace(secret, "***").replace(unquote(secret), "***")
            raise ConfigError(f"{self.name}: cannot be used as a store ({words})") from None

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return self.connection.execute(re.sub(r"\?", "%s", sql), tuple(values) or None)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.connection.transaction():
            self.execute("SELECT pg_advisory_xact_lock(?)", (LOCK,))  # as SQLite has it: one writer at a time
            yield

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        with self.connection.transaction():
            self.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield

    def version(self) -> int:
        there = self.execute("SELECT to_regclass('outrider_schema')").fetchone()[0]
        return int(self.execute("SELECT max(version) FROM outrider_schema").fetchone()[0]) if there else 0

    def make(self, statements: Sequence[str], version: int) -> None:
        with self.transaction():
            if not self.version():
                for statement in (*statements, "CREATE TABLE outrider_schema (version INTEGER NOT NULL)"):
                    self.execute(statement.replace(" WITHOUT ROWID", ""))
                self.execute("INSERT INTO outrider_schema VALUES (?)", (version,))

    def close(self) -> None:
        self.connection.close()
