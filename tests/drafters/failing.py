"""A drafter that fails, in a module of its own: a process that gets it imports nothing else."""

from __future__ import annotations

from outrider.drafters.model.drafter import ModelDrafter


class Failing(ModelDrafter):
    """Fails at its fifth draft."""

    calls = 0

    def draft(self, evidence, budget):
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("boom")
        return super().draft(evidence, budget)
