"""Energy of the processor packages, where the machine reports it: the counters of the kernel's powercap interface (RAPL).

They count everything that runs on the machine, not one process, and say nothing about memory on most machines nor about any
accelerator. Where they are missing (most virtual machines) or not readable (root only, on most systems) there is no figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class EnergySample:
    """Microjoules of each package's counter, and where the counter starts again."""

    counters: tuple[tuple[int, int], ...]

    def joules_since(self, earlier: EnergySample) -> float:
        """Energy between two readings; a counter may have started again once."""
        total = 0
        for (now, wraps), (before, _) in zip(self.counters, earlier.counters, strict=True):
            total += now - before if now >= before else now + wraps - before
        return total / 1e6


class Meter:
    """The package counters of this machine, found once."""

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 is a part of it and would be counted twice, psys is all of them
        self._packages: list[Path] = []
        self.absent = "this machine reports no energy (no RAPL counters under /sys/class/powercap)"
        for folder in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
            try:
                if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                    _counter(folder)
                    self._packages.append(folder)
            except PermissionError:
                self.absent = f"{folder}/energy_uj may only be read by root: run as root, or change its permissions"
            except (OSError, ValueError):
                continue

    @property
    def present(self) -> bool:
        return bool(self._packages)

    def read(self) -> EnergySample | None:
        """The counters now; None where there are none."""
        return EnergySample(tuple(map(_counter, self._packages))) if self._packages else None


def _counter(folder: Path) -> tuple[int, int]:
    return tuple(int((folder / n).read_text()) for n in ("energy_uj", "max_energy_range_uj"))  # type: ignore[return-value]
