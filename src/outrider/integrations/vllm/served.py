"""vLLM's engine as our monitor watches it: what its stat logger and its worker report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from outrider.integrations.vllm.sums import StepSums
from outrider.records import Counts
from outrider.telemetry.prometheus import Metrics

RPC_SECONDS = 10.0
"""Seconds that a worker has to answer."""


@dataclass
class Server:
    """vLLM's engine as our monitor watches it. client: vLLM's engine client. sums: of our stat logger; new ones without it."""

    client: Any
    sums: StepSums
    ledger: bool
    report: dict[str, Any] | None = None
    tickets: tuple[()] = ()
    failures: int = 0

    @property
    def metrics(self) -> Metrics:
        """Our metrics."""
        return self.sums.metrics

    @property
    def alive(self) -> bool:
        """Whether vLLM's engine runs."""
        return not bool(getattr(self.client, "errored", False))

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self.client.vllm_config

    async def ask(self) -> None:
        """Get the worker's report, if it is of our class, and take over its sums."""
        if "outrider" not in str(self.config.parallel_config.worker_cls):
            return
        found = await self.client.collective_rpc("outrider_report", timeout=RPC_SECONDS)
        report = next((r for r in found if r), None)
        if report is not None:
            self.take(report)

    def take(self, report: dict[str, Any]) -> None:
        """Take over a report: what the rejection sampler did is known exactly there."""
        before, self.report = self.report, report
        if report["tap"] is None:
            return
        counts, tap = self.metrics.counts, report["tap"]
        for name in ("proposed", "judged", "accepted", "rejected", "risk", "spread", "bias"):
            value = tap["all"][name]
            setattr(counts, name, value if name in ("risk", "spread", "bias") else int(value))
        depth = next((d for d in range(len(tap["judged_at"]), 0, -1) if tap["judged_at"][d - 1]), 0)
        counts.judged_at, counts.accepted_at = tap["judged_at"][:depth], tap["accepted_at"][:depth]
        old = before["tap"]["engine_seeded"] if before and before["tap"] else dict.fromkeys(tap["engine_seeded"], 0.0)
        new = {name: value - old[name] for name, value in tap["engine_seeded"].items()}
        # evidence is a product of factors of sums, so several steps at once count as one
        more = Counts(judged=int(new["judged"]), rejected=int(new["rejected"]), risk=new["risk"], spread=new["spread"])
        self.metrics.residuals.add(more)
        self.metrics.evidence.merge(more)
