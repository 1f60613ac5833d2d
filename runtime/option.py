"""How an option is declared, once, and how its value is read: mistakes come back as one line. Torch-free."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from sgl_diffusion.runtime.errors import UserError


def option(default: Any, help: str, *, aliases: Sequence[str] = (), unset: str = "the model's", **limits: Any) -> Any:
    """A documented field. `unset` is what a default of None comes to; `limits` are pydantic's (`ge`, `le`)."""
    extra: dict[str, Any] = {"aliases": list(aliases), "unset": unset}
    if isinstance(default, list | dict):
        return Field(default_factory=type(default), description=help, json_schema_extra=extra, **limits)
    return Field(default, description=help, json_schema_extra=extra, **limits)


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_resolution(value: str) -> str:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", value) is None:
        raise ValueError("expected WIDTHxHEIGHT in pixels, for example 1024x1024")
    return value


def _as_word(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _as_numbers(value: Any) -> Any:
    if any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value])):
        raise ValueError("expected a whole number")
    return value if isinstance(value, list) else [value]


Strings = Annotated[list[str], BeforeValidator(as_list)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_as_numbers)]
Resolution = Annotated[str, AfterValidator(_is_resolution)]
Switch = Annotated[Literal["auto", "true", "false"], BeforeValidator(_as_word)]


class Options(BaseModel):
    """Base of all groups: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _mean_what_they_say(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this, `seed: true` is seed 1, and a switch is also turned by `on`, `y` and 1."""
        kind = value_type(cls.model_fields[info.field_name or ""])
        if kind is bool and value not in (None, "true", "false") and not isinstance(value, bool):
            raise ValueError("expected true or false")
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError("expected a whole number" if kind is int else "expected a number")
        return value


T = TypeVar("T", bound=Options)


# -- names ------------------------------------------------------------------------------


def groups(model: type[Options]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """The groups of `ServerArgs` or `SamplingParams`: title and own fields, in the order of declaration."""
    for base in model.__bases__:
        assert issubclass(base, Options)
        own = {n: f for n, f in base.model_fields.items() if n in base.__annotations__}
        yield (base.__doc__ or base.__name__), own


def aliases(field: FieldInfo) -> list[str]:
    found: list[str] = _extra(field)["aliases"]
    return found


def unset(field: FieldInfo) -> str:
    """What a default of None comes to."""
    found: str = _extra(field)["unset"]
    return found


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict), "declared with option()"
    return field.json_schema_extra


def value_type(field: FieldInfo) -> type:
    """The plain type behind an annotation: bool, int, float, str, list or dict."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not NoneType)
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return str
    return dict if issubclass(origin, BaseModel) else origin


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# -- values -------------------------------------------------------------------------------


def parse(model: type[T], values: Mapping[str, Any]) -> T:
    """A `ServerArgs` or `SamplingParams`; pydantic's complaint becomes one line that names field, value, allowed."""
    try:
        return model(**values)
    except ValidationError as e:
        raise UserError(one_line(e)) from e


def one_line(error: ValidationError) -> str:
    """The first of pydantic's complaints: field, value, what is allowed."""
    first = error.errors()[0]
    field = ".".join(p for p in first["loc"] if isinstance(p, str))  # without the place in a list
    context = first.get("ctx", {})
    told = {
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "less_than": "must be below {lt}",
        "finite_number": "expected a finite number",
        "literal_error": "expected {expected}",
        "value_error": "{error}",
        "string_pattern_mismatch": "expected auto, cpu, cuda or cuda:N",
        "string_type": "expected text",
        "int_parsing": "expected a whole number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "int_parsing_size": "expected a whole number below 2^63",
        "float_parsing": "expected a number",
        "float_type": "expected a number",
        "list_type": "expected a list",
        "dict_type": "expected keys and values",
        "model_type": "expected keys and values",
        "extra_forbidden": "is not a known key",
    }.get(first["type"], first["msg"].replace("{", "{{").replace("}", "}}"))
    value = json.dumps(first["input"]) if isinstance(first["input"], bool) else str(first["input"])
    return f"{field}={value if len(value) <= 200 else value[:200] + '...'}: {told.format(**context)}"
