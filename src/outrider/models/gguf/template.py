"""Chat templates of files: programs of strangers, run in Jinja's immutable sandbox, which lets them read what they are given."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; for a prompt its body counts as it is."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class TemplateRefusal(Exception):
    """A template refuses a conversation, by its own words."""


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """With what templates written for transformers expect: blocks without blank lines, loop controls, three functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def render(template: str, given: dict[str, Any]) -> str:
    """The text of a conversation. Raises jinja2.TemplateError, TemplateRefusal, or whatever else the template's program raises."""
    return _compiled(template).render(**given)
