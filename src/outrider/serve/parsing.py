"""Checked models of request bodies: nothing unknown is accepted, and every error names its field and the remedy."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from outrider.errors import RequestError, unknown_name

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """No unknown keys, no implicit conversions, no NaN. The text below a field is its description in /openapi.json."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class BadField(RequestError):
    """A field that cannot be served. param: its name. code: OpenAI's error code, if there is one."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


def parse(model: type[M], body: object, gone: dict[str, str] | None = None) -> M:
    """A checked request of the class `model`. Raises BadField with field and remedy, without repeating the client's values.

    gone: fields of older interfaces, with what replaces them.
    """
    if not isinstance(body, dict):
        raise BadField("the body must be a JSON object")
    for name, instead in (gone or {}).items():
        if body.get(name) is not None:
            raise BadField(f"{name} is not a field of this server: {instead}", name)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = _worst(error)
    except RecursionError:
        raise BadField("the body is nested too deeply") from None
    known = _names(model, set())
    where = [str(part) for part in first["loc"] if not isinstance(part, str) or part in known]
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:64]
        message = f"{unknown_name('field', name, _fields_at(model, where))} (or it is not supported here)"
        raise BadField(message, ".".join([*where, name])[:200])
    param = ".".join(where)[:200] or None
    raise BadField(f"{param or 'the body'}: {_plain(first)}", param)


def _worst(error: ValidationError) -> Any:
    """The error to report: one about an unknown field first, otherwise the one deepest in the body."""
    errors = error.errors(include_url=False, include_context=True, include_input=False)
    return next((e for e in errors if e["type"] == "extra_forbidden"), max(errors, key=lambda e: len(e["loc"])))


def _inside(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _inside(part)]


def _names(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[str]:
    """The fields of a model and of all models inside it. Other parts of a location name branches of unions, or clients' keys."""
    if model in seen:
        return set()
    seen.add(model)
    out = {field.alias or name for name, field in model.model_fields.items()}
    for field in model.model_fields.values():
        for inner in _inside(field.annotation):
            out |= _names(inner, seen)
    return out


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The fields that a body may have at a place."""
    here = [model]
    for part in path:
        inner = [m for one in here if part in one.model_fields for m in _inside(one.model_fields[part].annotation)]
        here = inner or here
    return list(dict.fromkeys(field.alias or name for one in here for name, field in one.model_fields.items()))


def _plain(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "literal_error":
        return f"{message}; other values are not supported"
    return message[0].lower() + message[1:]
