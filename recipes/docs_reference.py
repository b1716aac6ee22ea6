"""The generated pages of the site: every command, every field of a request, every metric. Each is written from what the code itself
reads: the command line's parser, the models that check bodies, and the metrics of a server.

    python recipes/docs_reference.py            # writes docs/reference/{commands,fields,metrics}.md
    python recipes/docs_reference.py --check    # says which are out of date, with exit code 1
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
SIDES = {">=": "At least", "<=": "At most", ">": "Above", "<": "Below"}
WRITTEN = "<!-- Written by recipes/docs_reference.py (`make reference`): edit the code, not this page. -->\n\n"


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def code(text: str) -> str:
    return f"`{cell(text)}`"


# ------------------------------------------------------------------------------------------------ commands
def leaves(command: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by the words that call it."""
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(before), command
    for name, one in (below or {}).items():
        yield from leaves(one, (*before, name))


def commands() -> str:
    """docs/reference/commands.md"""
    import typer

    from outrider.cli.main import app

    every = list(leaves(typer.main.get_command(app)))
    out = [
        "# Commands\n\nWhat `outrider COMMAND --help` says, for every command. Each has an example, which the tests "
        "run. `--json` prints "
        "one JSON document on stdout, everything else goes to stderr. Exit codes: 0 done or passed, 1 a gate failed, "
        "2 wrong usage, "
        "3 inconclusive, 130 ended by Ctrl-C. `python -m outrider` is the same program.\n",
        "| command | what it does |\n|---|---|",
        *(f"| [`{name}`](#outrider-{name.replace(' ', '-')}) | {cell(first(command))} |" for name, command in every),
    ]
    out += [described(name, command) for name, command in every]
    return WRITTEN + "\n".join(out)


def first(command: Any) -> str:
    """The first sentence of a command's help."""
    return re.split(r"(?<=[.?])\s(?=[A-Z-])", " ".join((command.help or "").split()))[0]


def described(name: str, command: Any) -> str:
    """One command: its help, its usage, its example, its arguments and options."""
    text, _, rest = (command.help or "").partition("Example: ")
    example, _, after = rest.partition("\n")
    paragraphs = [" ".join(p.replace("\b", "").split()) for p in (text + "\n\n" + after).split("\n\n")]
    context = command.make_context(name, [], resilient_parsing=True)
    lines = [f"\n## outrider {name}\n", *(f"{p}\n" for p in paragraphs if p)]
    lines += [f"```\n{' '.join(['outrider', name, *command.collect_usage_pieces(context)])}\n```\n"]
    lines += [f"Example:\n\n```\n{example.strip()}\n```\n"] if example else []
    records = [p.get_help_record(context) for p in command.params if "--help" not in p.opts]
    named = [(names.replace(" range>", ">"), text) for names, text in filter(None, records)]
    rows = [f"| {code(names)} | {cell(defaults(text))} |" for names, text in named]
    return "\n".join([*lines, "| argument or option | what |\n|---|---|", *rows, ""]) if rows else "\n".join(lines)


def defaults(text: str) -> str:
    """A help with what the parser puts into brackets (default, range, variable) as sentences."""
    found = re.search(r"\s*\[([^\[\]]*)\]$", text)
    if found is None:
        return text
    said = []
    for part in found.group(1).split("; "):
        part = part.removeprefix("env var: ") if part.startswith("env var") else part
        span = re.fullmatch(r"(?:(\S+)<=)?x(?:(<=|>=|>|<)(\S+))?", part)
        if part.startswith("default: "):
            said.append(f"Default: `{part.removeprefix('default: ')}`.")
        elif span is not None and span[1]:
            said.append(f"From {span[1]} to {span[3]}.")
        elif span is not None:
            said.append(f"{SIDES[span[2]]} {span[3]}.")
        else:
            said.append("*Required.*" if part == "required" else f"Variable: `{part}`.")
    return " ".join([text[: found.start()], *said])


# ------------------------------------------------------------------------------------------------ request fields
def fields() -> str:
    """docs/reference/fields.md"""
    from outrider.serve.app import document

    described = document()
    schemas = described["components"]["schemas"]
    out = [
        "# Request fields\n\nEvery field of every request body, with its bounds, as the server's own `/openapi.json` "
        "describes them. An "
        "unknown field is refused by its name, and `null` stands for any optional field that is left out. "
        "[Serve](../serve.md#fields) and [agents](../agents.md) say how they act together.\n"
    ]
    seen: list[str] = []
    for path, verbs in described["paths"].items():
        body = verbs.get("post", {}).get("requestBody")
        if body is None:
            out.append(f"\n## GET {path}\n\n{verbs['get']['summary']}. No body.\n")
            continue
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        out.append(f"\n## POST {path}\n\n{verbs['post']['summary']}.\n")
        if name in seen:
            out.append(f"The body is a {link(name)}, as above.\n")
            continue
        seen.append(name)
        out.append(f"### {shown(name)}\n\n" + table(schemas[name]))
    below = [name for name in reached(schemas, seen) if "properties" in schemas[name]]
    out += ["\n## Objects inside\n", *(f"### {shown(name)}\n\n" + table(schemas[name]) for name in below)]
    return WRITTEN + "\n".join(out)


def reached(schemas: dict[str, Any], roots: list[str]) -> list[str]:
    """The objects that bodies name, in the order in which they are first named."""
    found = list(roots)
    for name in found:
        for inner in re.findall(r"#/components/schemas/(\w+)", repr(schemas[name])):
            if inner not in found:
                found.append(inner)
    return found[len(roots) :]


def shown(name: str) -> str:
    """An object's name; where two routes have one of the same name, with its route."""
    *package, last = name.removeprefix("outrider__serve__").split("__")
    return f"{last} ({package[0]})" if package else last


def link(name: str) -> str:
    return f"[{shown(name)}](#{re.sub('[^a-z0-9]+', '-', shown(name).lower()).strip('-')})"


def table(schema: dict[str, Any]) -> str:
    """The fields of one object: those that are needed, those that act, and those without an effect."""
    needed = schema.get("required", ())
    rows = [
        f"| {code(name)} | {cell(kind(one))}{', **required**' if name in needed else ''} | {cell(one.get('description', ''))} |"
        for name, one in sorted(schema["properties"].items(), key=lambda item: weight(item[0], item[1], needed))
    ]
    said = " ".join(schema.get("description", "").split())
    return "\n".join([*([said, ""] if said else []), "| field | value | what |", "|---|---|---|", *rows, ""])


def weight(name: str, field: dict[str, Any], needed: Sequence[str]) -> int:
    """Where a field stands in its table; fields of the same weight keep the order of the code."""
    return 0 if name in needed else 2 if field.get("description", "").startswith("No effect") else 1


def kind(schema: dict[str, Any]) -> str:
    """What a value may be, in words: type, bounds, choices."""
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = dict.fromkeys(kind(one) for one in schema[several] if one.get("type") != "null")
            return " or ".join(kinds) or "null"
    if "$ref" in schema:
        return link(schema["$ref"].rsplit("/", 1)[-1])
    if "const" in schema:
        return code(repr(schema["const"]).replace("'", '"').replace("True", "true").replace("False", "false"))
    if "enum" in schema:
        return ", ".join(code(f'"{one}"') for one in schema["enum"])
    named = schema.get("type", "any")
    if named == "array":
        if schema.get("maxItems") == 0:
            return "empty list"
        return f"list of {kind(schema.get('items', {}))}{bounds(schema, 'Items')}"
    if named == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'])}{bounds(schema, 'Properties')}"
    return named + bounds(schema, {"string": "Length", "object": "Properties"}.get(named, "imum"))


def bounds(schema: dict[str, Any], what: str) -> str:
    """Least and most, where they are stated."""
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    unit = {"Items": "", "Length": " characters", "Properties": " keys"}.get(what, "")
    if what == "imum":
        return "" if low is None and high is None else f", {number(low)} to {number(high)}"
    return "" if high is None else f" (at most {number(high)}{unit})"


def number(value: float | None) -> str:
    if value is None:
        return "any"
    for power in (31, 63):
        if abs(value) in (2**power, 2**power - 1):
            return f"{'-' if value < 0 else ''}2^{power}" + ("-1" if value > 0 else "")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


# ------------------------------------------------------------------------------------------------ metrics
class Bare:
    """A server without an engine, as far as its metrics need one: it has seen one draft token and one reply."""

    def __init__(self) -> None:
        from outrider.records import Counts
        from outrider.telemetry.prometheus import Metrics

        self.metrics, self.alive, self.tickets, self.failures = Metrics(model="model"), True, (), 0
        self.metrics.counts = Counts(judged_at=[1], accepted_at=[1])
        self.metrics.responses["/v1/completions", "200"] = 1
        self.metrics.info = {"drafter": "", "rule": ""}


def metrics() -> str:
    """docs/reference/metrics.md"""
    from outrider.serve.watch import Monitor
    from outrider.telemetry.alerts import CONDITIONS

    bare = Bare()
    metrics = bare.metrics
    Monitor(bare, price=1.0)  # the price: so that costs are there too
    later = [(f"outrider_{name}", "gauge", text) for name, (text, _) in metrics.gauges.items()]
    later += [(f"outrider_{name}", "counter", text) for name, (text, _) in metrics.counters.items()]
    metrics.gauges.clear()
    metrics.counters.clear()  # they read an engine, as this does
    metrics.kv_usage = float
    shared = [family for family in metrics.collect() if family.name.startswith("vllm:")]
    ours = list(metrics.ours())
    conditions = [f"| {code(c.name)} | {c.severity} | {cell(c.summary)} |" for c in CONDITIONS]
    return WRITTEN + "\n".join(
        [
            "# Metrics\n\nWhat `GET /metrics` says, in Prometheus's text format. All are sums of raw counts: readers "
            "form ratios, as "
            "ratios of sums. Labels come from closed sets; no text and no name of a client's is ever one. `outrider dashboards "
            "export` writes a Grafana dashboard and alert rules that read them.\n",
            "## vLLM's names\n\nThese have the meaning that vLLM gives them, so that its dashboards and benchmark clients work.\n",
            listed([family_row(family) for family in shared]),
            "\n## Ours\n",
            listed([family_row(family) for family in ours] + [(*row, ["model_name"]) for row in later]),
            "\nThose of dollars are there with `--price-per-hour` only.\n",
            "\n## Built-in alerts\n\n`outrider_alert_firing` has one series for each; the page shows them, and "
            "`--alert-webhook` sends "
            "them.\n",
            "| alert | severity | what it says |\n|---|---|---|",
            *conditions,
            "",
        ]
    )


def family_row(family: Any) -> tuple[str, str, str, list[str]]:
    """Name, type, help and labels of a family; a bucket's end is no label of ours."""
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    return family.name, family.type, family.documentation, list(labels)


def listed(rows: list[tuple[str, str, str, list[str]]]) -> str:
    """A table of families; what Prometheus writes behind the name of a counter or of a configuration is written here too."""
    ending = {"counter": "_total", "info": "_info"}
    return "\n".join(
        ["| metric | type | labels | what |", "|---|---|---|---|"]
        + [
            f"| {code(name + ending.get(kind, ''))} | {kind} | {', '.join(map(code, labels))} | {cell(text)} |"
            for name, kind, text, labels in rows
        ]
    )


PAGES: dict[str, Callable[[], str]] = {"commands.md": commands, "fields.md": fields, "metrics.md": metrics}


def main() -> int:
    stale = []
    for name, write in PAGES.items():
        page, text = FOLDER / name, write().rstrip() + "\n"
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            FOLDER.mkdir(exist_ok=True)
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page}")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; write them anew with: make reference")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
