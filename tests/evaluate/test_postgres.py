"""A store in Postgres is the same store: Debian's server, started by the test on a socket of its own."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.errors import CapacityError, ConfigError
from outrider.evaluate.store import tables
from outrider.evaluate.store.store import Store
from tests.evaluate.test_store import bench, killed_bench, repeatable, report

__all__ = ["repeatable"]  # the fixture
PLACES = sorted(
    Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name) if p.parent.name.isdigit() else 0
)
BIN = str(PLACES[-1]) + "/" if PLACES else ""

RUNUSER = shutil.which("runuser") or "/usr/sbin/runuser"  # a shell without /sbin in its path does not find it


def as_server(*command: str) -> list[str]:
    """The server refuses to run as root: there it runs as the user that Debian's package makes."""
    return [RUNUSER, "-u", "postgres", "--", *command] if getpass.getuser() == "root" else list(command)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of an empty server; its files are gone afterwards."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'outrider[postgres]')")
    if not BIN and shutil.which("initdb") is None:
        pytest.skip("Postgres is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="outrider-pg-"))
    try:
        if getpass.getuser() == "root":
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("there is no user postgres, and root may not run the server")
            os.chown(folder, user.pw_uid, user.pw_gid)
        data, options = str(folder / "data"), f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
        make = [f"{BIN}initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(as_server(*make), check=True, capture_output=True)
        start = [f"{BIN}pg_ctl", "-D", data, "-o", options, "-w", "-l", str(folder / "log"), "start"]
        subprocess.run(as_server(*start), check=True, stdout=subprocess.DEVNULL)
        yield f"postgresql://postgres@/postgres?host={folder}"
        subprocess.run(
            as_server(f"{BIN}pg_ctl", "-D", data, "-m", "immediate", "stop"), check=True, capture_output=True
        )
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def url(server: str) -> str:
    """The server, its store emptied."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as db:
        db.execute("DROP SCHEMA public CASCADE")
        db.execute("CREATE SCHEMA public")
    return server


def test_a_bench_run_says_the_same_in_postgres_and_in_a_file(url: str, tmp_path: Path, repeatable: None) -> None:
    killed_bench(tmp_path / "a.db")
    killed_bench(url)
    assert report(url) == report(tmp_path / "a.db")
    with Store(url, read_only=True) as there, Store(tmp_path / "a.db", read_only=True) as here:
        mine, theirs = (
            [{k: v for k, v in r.items() if k != "run"} for r in tables.table(s, "kill")] for s in (here, there)
        )
        assert mine == theirs and len(mine) == 24
        assert there.ledgers(there.run("kill").id) == here.ledgers(here.run("kill").id)


def test_a_killed_writer_loses_and_repeats_nothing(url: str, tmp_path: Path, repeatable: None) -> None:
    killed_bench(tmp_path / "a.db")
    seen = 0
    for lap in range(5):
        child = os.fork()
        if child == 0:
            try:
                killed_bench(url)
            finally:
                os._exit(0)
        time.sleep(0.05 + 0.03 * lap)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with Store(url) as db:
            runs = db.runs()
            now = len(db.records(runs[-1].id)) if runs else 0
        assert now >= seen
        seen = now
        if runs and runs[-1].state == "done":
            break  # the next lap would begin another run
    with Store(url) as db:
        done = any(r.state == "done" for r in db.runs())
    if not done:
        killed_bench(url)
    assert report(url) == report(tmp_path / "a.db")


def test_records_are_unique_and_readers_do_not_write(url: str) -> None:
    with Store(url) as db:
        run = db.begin("bench", "x", {})
        assert db.append(run, ("arm", 0, 0), {"counts": {"judged": 3, "risk": 0.1}})
        assert not db.append(run, ("arm", 0, 0), {"counts": {"judged": 9}})
        assert db.ledgers(run)["arm"] == {"judged": 3, "rejected": 0, "risk": 0.1, "spread": 0.0, "bias": 0.0}
        db.save_experiment("e", run, {"a": 1}, {"b": float("inf")})
        assert db.experiment("e") == (run, {"a": 1}, {"b": None})
        with pytest.raises(ConfigError, match="configured differently"):
            db.begin("bench", "x", {"a": 3})
        with Store(url, read_only=True) as reader:
            assert len(reader.records(run)) == 1
            with pytest.raises(CapacityError, match="read-only"):
                reader.begin("bench", "y", {})


def test_what_cannot_be_reached_is_said_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        Store("postgresql://me:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value) and "127.0.0.1:9" in str(caught.value)
    with pytest.raises(ConfigError, match="nothing was ever written"):
        Store(url, read_only=True)


def test_a_bench_goes_through_the_command_layer(url: str) -> None:
    assert len(bench(url)) == 24
