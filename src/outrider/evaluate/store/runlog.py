"""A bench run that survives: every record goes to a store as it comes, and an interrupted run is continued."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from outrider.evaluate.records import Key, Record
from outrider.evaluate.store.store import Store, fingerprint


class RunLog:
    """The store's end of a bench run; without a store it keeps nothing."""

    def __init__(self, where: str | Path | None, name: str, config: dict[str, Any]) -> None:
        """config: everything that decides what is measured; its prompts are kept as a fingerprint.

        Raises ConfigError when an unfinished run of that name was configured differently.
        """
        self.store = None if where is None else Store(where)
        kept = {**config, "prompts": fingerprint(config.get("prompts"))}
        self.run = "" if self.store is None else self.store.begin("bench", name, kept)

    def known(self) -> dict[Key, Record]:
        """Records that an interrupted run has committed."""
        if self.store is None:
            return {}
        return {key: Record.from_dict(data) for key, data in self.store.records(self.run).items()}

    def keep(self, record: Record) -> Record:
        """Commit a record; on return it is on the disk."""
        if self.store is not None:
            self.store.append(self.run, record.key, asdict(record))
        return record

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the run with its document."""
        if self.store is not None:
            self.store.finish(self.run, summary)
            self.store.close()
