"""A page of metrics in Prometheus's text format, read within a size and a time whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from outrider.errors import ConfigError
from outrider.web import Fault, words

try:
    from prometheus_client.parser import text_fd_to_metric_families
    from prometheus_client.samples import Sample
except ImportError as error:
    raise ConfigError("watching needs prometheus-client: pip install 'outrider[serve]'") from error

MOST_BYTES = 4 << 20
"""Most bytes of a page. vLLM's has 60 kB for an engine."""
MOST_LINES, LONGEST = 20_000, 2048
"""Lines of metrics that are read, and the characters of one."""
SECONDS = 2.0
"""Time for reading a page: a hundred times what a busy server's takes."""
LARGEST = 1e18


@dataclass(frozen=True, slots=True)
class Page:
    """The samples of a page by name. odd: names of which a value was no number that such a metric can have."""

    samples: dict[str, list[Sample]]
    odd: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.samples

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all series of a name whose `labels` are these or absent; None without any."""
        found = [s.value for s in self.samples.get(name, ()) if all(s.labels.get(k, v) == v for k, v in labels.items())]
        return math.fsum(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums by the values of a label."""
        out: dict[str, float] = {}
        for s in self.samples.get(name, ()):
            out[s.labels.get(label, "")] = out.get(s.labels.get(label, ""), 0.0) + s.value
        return out

    def values(self, name: str, label: str) -> list[str]:
        """The different values of a label, in their order of appearance."""
        return list(dict.fromkeys(s.labels[label] for s in self.samples.get(name, ()) if s.labels.get(label)))


def parse(body: bytes, wanted: frozenset[str]) -> Page:
    """The samples of the `wanted` names. Raises Fault where the page is cut off, too much, or has a line of theirs that cannot be
    read: half a page is none, since a number that lost its last digits would look like a server that has begun anew.

    Lines of other names, comments and types are not looked at.
    """
    text = body.decode("utf-8", "replace")
    lines = [line for line in text.split("\n") if _name(line) in wanted]
    if lines and not text.endswith("\n"):
        raise Fault("cut", "the page of metrics breaks off in the middle of a line")
    if len(lines) > MOST_LINES or any(len(line) > LONGEST for line in lines):
        raise Fault(
            "large", f"the page has more than {MOST_LINES} lines of metrics, or one of over {LONGEST} characters"
        )
    samples: dict[str, list[Sample]] = {}
    odd = set[str]()
    try:
        # it only goes through the lines
        for family in text_fd_to_metric_families(_timed(lines)):  # type: ignore[arg-type]
            for sample in family.samples:
                good = math.isfinite(sample.value) and 0 <= sample.value <= LARGEST
                samples.setdefault(sample.name, []).append(sample) if good else odd.add(sample.name)
    except Fault:
        raise
    except Exception as error:  # what a parser says of bytes that anybody may have sent
        raise Fault(
            "garbled", f"a line of the page is no metric ({words(str(error) or type(error).__name__)[:80]})"
        ) from None
    for name in odd:
        samples.pop(name, None)
    return Page(samples, frozenset(odd))


def _name(line: str) -> str:
    ends = [at for at in (line.find(mark, 0, 200) for mark in "{ \t") if at >= 0]
    return line[: min(ends)] if ends else ""


def _timed(lines: list[str]) -> Iterator[str]:
    end = perf_counter() + SECONDS
    for line in lines:
        if perf_counter() > end:
            raise Fault("large", f"the page takes more than {SECONDS:g} s to read")
        yield line
