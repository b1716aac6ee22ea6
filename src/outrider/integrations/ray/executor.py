"""Cells of a sweep as Ray tasks. Ray places them and says when a worker or a machine is lost; trying again is the driver's.

A task that fits nowhere waits in Ray for ever and says nothing, so `never` compares a cell with the machines that are there.
"""

# pyright: reportMissingImports=false
# Ray is not among what the code is checked with: `make test-ray` has it.
from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from outrider.errors import printable
from outrider.evaluate.sweep.cells import Cell
from outrider.evaluate.sweep.executor import Event
from outrider.integrations.ray import QUIET, connect

FRESH = 2.0
"""Seconds for which the list of machines is believed."""


def stages(work: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """In the worker: that it runs, then what came of it."""
    import os
    import platform

    from outrider.evaluate.sweep.work import refusal

    yield {"started": f"process {os.getpid()} of {platform.node()}"}
    module, _, name = work.partition(":")
    try:
        yield {"answer": getattr(importlib.import_module(module), name)(job)}
    except Exception as error:
        yield refusal(error)


class RayExecutor:
    """Tasks on a Ray cluster.

    work: "module:function", importable on every machine. address: of the cluster; None: one is started here.
    A cell of speed gets all CPUs of a machine that has the resource `quiet`, and its arms run there side by side. The others take
    one CPU for each of their threads, anywhere.
    """

    def __init__(self, work: str, address: str | None = None) -> None:
        self.ray = connect(address)
        self.work = work
        self._task = self.ray.remote(num_returns="streaming", max_retries=0)(stages)
        self._open: dict[Any, int] = {}
        self._need: dict[int, tuple[float, str | None]] = {}  # ticket -> its CPUs, and the machine it has alone
        self._machines: tuple[float, list[dict[str, Any]]] = (float("-inf"), [])

    def machines(self) -> list[dict[str, Any]]:
        """The machines of the cluster that are alive, and what each has."""
        if monotonic() - self._machines[0] > FRESH:
            self._machines = (monotonic(), [n for n in self.ray.nodes() if n["Alive"]])
        return self._machines[1]

    def _quiet(self) -> list[dict[str, Any]]:
        return [n for n in self.machines() if n["Resources"].get(QUIET, 0) >= 1 and n["Resources"].get("CPU", 0) >= 1]

    def never(self, cell: Cell) -> str | None:
        threads, most = cell.threads or 1, max((n["Resources"].get("CPU", 0) for n in self.machines()), default=0)
        if cell.alone and not any(n["Resources"]["CPU"] >= threads for n in self._quiet()):
            return (
                f"it measures seconds and needs a machine of its own with {threads} CPUs and the resource {QUIET!r}, and none "
                f"of the cluster has both: ray start --resources '{{\"{QUIET}\": 1}}' on one that does nothing else"
            )
        if threads > most:
            return f"it needs {threads} CPUs on one machine, and the largest has {most:g}"
        return None

    def waits(self, cell: Cell) -> str:
        free = self.ray.available_resources()
        told = ", ".join(f"{name} {free.get(name, 0):g}" for name in ("CPU", QUIET))
        return f"it fits a machine of the cluster, and others' work holds that: free are {told}"

    def room(self, cell: Cell) -> bool:
        taken = {node for _, node in self._need.values() if node}
        if cell.alone:
            return self._free_node(taken) is not None
        total = sum(n["Resources"].get("CPU", 0) for n in self.machines() if n["NodeID"] not in taken)
        return sum(cpus for cpus, node in self._need.values() if not node) + (cell.threads or 1) <= total

    def _free_node(self, taken: set[str]) -> str | None:
        """A quiet machine that no cell of ours has alone; cells that share it, Ray lets finish first."""
        return next((n["NodeID"] for n in self._quiet() if n["NodeID"] not in taken), None)

    def submit(self, ticket: int, cell: Cell) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy: Any = "SPREAD"
        cpus, node, resources = float(cell.threads or 1), None, {}
        if cell.alone:
            node = self._free_node({n for _, n in self._need.values() if n})
            whole = next(n["Resources"]["CPU"] for n in self.machines() if n["NodeID"] == node)
            strategy, resources = NodeAffinitySchedulingStrategy(node, soft=False), {QUIET: 1}  # type: ignore[arg-type]
            cpus = whole
        threads = int(cell.threads or cpus)
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}}
        options = {
            "num_cpus": cpus,
            "resources": resources,
            "scheduling_strategy": strategy,
            "runtime_env": environment,
        }
        stream = self._task.options(**options).remote(self.work, cell.job(Path.cwd(), threads))
        self._open[stream] = ticket
        self._need[ticket] = (cpus, node)

    def wait(self, seconds: float) -> list[Event]:
        if not self._open:
            sleep(seconds)
            return []
        ready, _ = self.ray.wait(list(self._open), num_returns=1, timeout=seconds)
        events: list[Event] = []
        for stream in ready:
            ticket = self._open[stream]
            try:
                message = self.ray.get(next(stream))
            except StopIteration:
                self._forget(stream)
                events.append(Event(ticket, "lost", "its task ended without an answer"))
            except Exception as error:  # Ray has many: a worker, a machine or its memory is gone
                self._forget(stream)
                events.append(
                    Event(ticket, "lost", printable(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
                )
            else:
                if "started" in message:
                    events.append(Event(ticket, "started", message["started"]))
                else:
                    self._forget(stream)
                    what = "answer" if "answer" in message else "refused"
                    events.append(Event(ticket, what, message.get("answer", message)))
        return events

    def _forget(self, stream: Any) -> None:
        self._need.pop(self._open.pop(stream), None)

    def cancel(self, ticket: int) -> None:
        for stream in [s for s, t in self._open.items() if t == ticket]:
            self.ray.cancel(stream, force=True)
            self._forget(stream)

    def cancel_all(self) -> None:
        """End what runs, and stay connected."""
        for ticket in list(self._open.values()):
            self.cancel(ticket)

    def close(self) -> None:
        self.cancel_all()
        self.ray.shutdown()
