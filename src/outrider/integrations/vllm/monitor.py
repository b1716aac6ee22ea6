"""Our monitor on vLLM's engine: the same history, alerts and page as for our own server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from outrider.control.adaptive import Outlook
from outrider.integrations.vllm.served import Server
from outrider.serve.live import state_of
from outrider.serve.watch import Watching


@dataclass
class VllmMonitor(Watching):
    """`bridge` is a `Server`. problem: why the worker's latest report did not come; empty if it came."""

    problem: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        look = self.outlook
        self.bridge.metrics.gauges["spec_decode_length"] = (
            "Draft length chosen for the present load.",
            lambda: None if (now := look()) is None else now.length,
        )

    @property
    def own(self) -> Server:
        """vLLM's engine."""
        return cast(Server, self.bridge)

    @property
    def deep(self) -> bool:
        """Whether vLLM drafts at all."""
        return self.own.config.speculative_config is not None

    def outlook(self) -> Outlook | None:
        """The estimates of our scheduler's controller, or of our proposer's."""
        found = self._note().get("outlook")
        return None if found is None else Outlook(*found)

    def speeds(self) -> list[dict[str, Any]]:
        """Measured draft lengths at the present load."""
        names = ("length", "tokens_per_step", "cost", "speedup")
        return [dict(zip(names, row, strict=True)) for row in self._note().get("speeds", ())]

    def kv_usage(self) -> float:
        """Share of vLLM's cache blocks in use."""
        return self.own.sums.kv_usage

    def _note(self) -> dict[str, Any]:
        report = self.own.report
        return {} if report is None else report["note"] or report["proposer"] or {}

    def state(self, after: float) -> dict[str, Any]:
        """What the page shows."""
        config, info = self.own.config, self.own.metrics.info
        server = {
            "engine": "vLLM",
            "drafter": info.get("drafter", "none"),
            "rule": info.get("rule", "vllm"),
            "lossless": info.get("lossless") == "true",
            "slots": config.scheduler_config.max_num_seqs,
            "queue": None,
            "longest": int(info.get("longest", 0)),
            "max_length": config.model_config.max_model_len,
            "ready": self.bridge.alive,
            "notices": self._notices(),
            "missing": self._missing(),
        }
        return {**state_of(self, self.own.metrics.model, server, [], after), "store": False}

    def _missing(self) -> list[str]:
        """Parts of the page for which there is nothing here."""
        watched = self.own.report is not None and self.own.report["tap"] is not None
        live = self.outlook() is not None
        return [
            *("play", "requests", "phases"),
            *(() if watched else ("ledger", "pareto")),
            *(() if live else ("length", "speeds", "speedup")),
        ]

    def _notices(self) -> list[str]:
        report = self.own.report
        out = [self.problem] if self.problem else []
        if report is None or report["tap"] is None:
            why = "vLLM's own worker class" if report is None else report["unwatched"]
            out.append(f"no predicted rejections here ({why}): the ledger shows observed ones only")
        own = (report or {}).get("proposer") or {}
        return [*out, *own.get("notices", ())]
