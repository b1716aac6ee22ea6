"""The page of the rows that `benchmarks/model_table.py` wrote: which models run, how, how fast, and what is refused.

python benchmarks/model_page.py benchmarks/model_table.jsonl --out docs/models.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = """# Will my model run?

All families of transformers {release} that `AutoModelForCausalLM` knows, and all of `AutoModelForImageTextToText`, of which the
text part is the target. Each was built small and random (a few layers of 64,
float32), saved, loaded like any checkpoint and decoded greedily, by `python benchmarks/model_table.py --out rows.jsonl`; this
page is what `benchmarks/model_page.py` makes of the rows. A checkpoint of a family runs in the same way, however large it is;
`outrider doctor PATH` says which runtime it is, and loading says what its path costs.

- **path**: *native* is Outrider's own runtime, all others are transformers: *seam* scores the rows of all sequences in one
  call, *cache* calls the model once per sequence, *snapshots* is for states that cannot be cut ([families](families.md)),
  *recompute* reads the whole text at every step.
- **drafts**: what may be proposed. *chains, no gain*: exact, but the model reads one token a call, so drafts save no time.
- **text**: whether greedy text is that of transformers' own `generate`, plainly, and with drafts that are accepted and rejected
  (n-grams, and its own text with every fifth token wrong), and sampled text (rule `match`) that of plain decoding.
- **speed**: as a share of transformers' `generate`, plain decoding of one sequence; the median of two interleaved runs of a few
  dozen tokens on a machine that other programs used too, so that single values are rough: measure a family that matters with
  `benchmarks/families.py`. Values marked *c* came out low and were measured again in processor time, one thread, five to eleven
  interleaved runs (up to 31 of a few), the lowest of them on 2026-11-30 (`--again 0.97 --rounds 11`, 2 cores of an AMD EPYC that
  other programs used too). The lowest of all is {lowest}: a step of ours costs about 0.1 ms more around the model than one
  of `generate`, of 1 to 3 ms of four layers of 64, and less within it.

{counts}

| family | path | drafts | text | speed |
|---|---|---|---|---|
{table}

## Refused

| family | sentence |
|---|---|
{refused}
{untried}"""


UNTRIED = """
## Not tried

transformers itself did not make these from small sizes, or needs another package for them.

| family | what it said |
|---|---|
{rows}
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page of the rows: what runs, what is refused, what could not be tried."""
    ran = [r for r in rows if "path" in r]
    untried = [r for r in rows if "made" in r or "crash" in r]
    refused = [r for r in rows if "refused" in r]
    chains = sum(r["drafts"] != "none" for r in ran)
    return PAGE.format(
        release=rows[0]["transformers"],
        lowest=min(r["speed"] for r in ran if "speed" in r),
        counts=f"{len(ran)} families run, {chains} of them with drafts; {len(refused)} are refused"
        + (f", {len(untried)} could not be tried." if untried else "."),
        table="\n".join(
            f"| {r['family']} | {r['path']} | {r['drafts']}{', no gain' if r['by_token'] else ''} | {verdict(r)} "
            f"| {r.get('speed', 'none')}{' *c*' if r.get('cpu') else ''} |"
            for r in ran
        ),
        refused="\n".join(f"| {r['family']} | {cell(r['refused'])} |" for r in refused),
        untried=UNTRIED.format(
            rows="\n".join(f"| {r['family']} | {cell(r.get('made') or r['crash'])} |" for r in untried)
        )
        if untried
        else "",
    )


def cell(text: object) -> str:
    """Text within a table."""
    return str(text).replace("|", "\\|")


CHECKS = ("equal", "ngram", "ngram_match", "told", "told_match")


def verdict(row: dict[str, Any]) -> str:
    """What was compared, and what of it differs."""
    wrong = [name for name in CHECKS if row.get(name) is False]
    if wrong:
        return f"differs: {', '.join(wrong)}"
    return (
        "equal"
        if "equal" in row
        else f"equal to plain decoding; transformers' own generate fails ({row['theirs_fails']})"
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, by family."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda r: r["family"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="rows, one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    wanted = parser.parse_args()
    wanted.out.write_text(page(read_rows(wanted.rows)))


if __name__ == "__main__":
    main()
