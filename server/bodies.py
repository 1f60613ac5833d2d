"""Bodies of requests: JSON or a form, read up to a limit, as names and values that are safe to keep."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.types import Message

from sgl_diffusion.server.errors import ApiError, bad_field

MIB = 2**20
MAX_FILES, MAX_FIELDS = 16, 200  # of a form
MAX_DEPTH = 32  # of lists and mappings in one another
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"


@dataclass(frozen=True)
class Body:
    """What a client sent.

    Attributes:
        values: by field; text only, where it came as a form.
        files: of a form, by field. They are gone with this object.
    """

    values: dict[str, Any]
    files: dict[str, list[UploadFile]] = field(default_factory=dict)
    is_form: bool = False


async def read_body(request: Request, max_mib: int, timeout_s: float, files: Collection[str] = ()) -> Body:
    """Reads a body to its end.

    Args:
        files: fields that may be files of a form. Without any, only JSON is taken.
    Raises:
        ApiError: too large (413), of another type (415), broken (400), too slow (408).
    """
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    kind = kind.strip().lower()
    takes = [JSON_TYPE, FORM_TYPE] if files else [JSON_TYPE]
    if kind not in takes:
        raise ApiError(415, f"content-type={kind or 'none'}: expected {' or '.join(takes)}", param="content-type")
    if kind == FORM_TYPE and "charset" in parameters.lower() and "utf-8" not in parameters.lower():
        raise ApiError(415, "content-type: expected no charset but utf-8", param="content-type")
    limited = _limited(request, max_mib)
    try:
        async with asyncio.timeout(timeout_s):
            if kind == JSON_TYPE:
                return Body(_flat(read_json(await limited.body())))
            return await _read_form(limited, max_mib, files)
    except TimeoutError:
        raise ApiError(408, f"the body took more than {timeout_s:g} s", code="timeout") from None


def _limited(request: Request, max_mib: int) -> Request:
    """The same request, which ends with 413 when its body is too large, whatever it says of its length."""
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_mib * MIB:
            raise _too_large(max_mib)
        return message

    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_mib * MIB:
        raise _too_large(max_mib)
    return Request(request.scope, receive)


def _too_large(max_mib: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_mib} MiB", code="body_too_large")


# -- JSON --------------------------------------------------------------------------------


def read_json(text: str | bytes, name: str = "the body") -> Any:
    """JSON without what a database or a JSON answer could not hold: NUL, half characters, numbers without bounds.

    Raises:
        ApiError: 400.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        _check_text(value)
    except RecursionError:
        raise ApiError(400, f"{name}: nested too deeply", code="invalid_json") from None
    except ValueError as e:  # not JSON, not UTF-8, and integers of thousands of digits
        raise ApiError(400, f"{name}: not readable as JSON: {e}", code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _check_text(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text with a NUL character")
        value.encode()  # a UnicodeEncodeError is a ValueError
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key, depth)
            _check_text(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, depth + 1)


# -- forms -------------------------------------------------------------------------------


async def _read_form(request: Request, max_mib: int, file_fields: Collection[str]) -> Body:
    """`a`, `a[]` (of a list) and `a[b]` (of a mapping), as the official clients write them."""
    form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_mib * MIB)
    values: dict[str, Any] = {}
    files: dict[str, list[UploadFile]] = {}
    for written, value in form.multi_items():
        name, bracket, inner = written.partition("[")
        inner = inner.removesuffix("]")
        if isinstance(value, UploadFile):
            if name not in file_fields:
                raise bad_field(name, ": is not a file")
            files.setdefault(name, []).append(value)
            continue
        _check_form_text(written, value)
        if bracket and inner:
            entries = values.setdefault(name, {})
            if not isinstance(entries, dict):
                raise bad_field(name, ": is given twice")
            entries[inner] = _scalar(value)
        elif bracket or name in file_fields:
            entries = values.setdefault(name, [])
            if not isinstance(entries, list):
                raise bad_field(name, ": is given twice")
            entries.append(value)
        elif name in values:
            raise bad_field(name, ": is given twice")
        else:
            values[name] = value
    if isinstance(extra := values.get("extra_body"), str):
        values["extra_body"] = read_json(extra, "extra_body")
    return Body(_flat(values), files, is_form=True)


def _check_form_text(name: str, value: str) -> None:
    try:
        _check_text([name, value])
    except ValueError as e:
        raise ApiError(400, f"the form: {e}", code="invalid_form") from None


def _scalar(text: str) -> Any:
    """An entry of a mapping has no declared type: there `0.5` is a number, `true` a switch."""
    try:
        return read_json(text)
    except ApiError:
        return text


def _flat(values: Any) -> dict[str, Any]:
    """The fields, with those of `extra_body` among them: some clients send it as it is. null means not given."""
    if not isinstance(values, dict):
        raise ApiError(400, "the body: expected a JSON object", code="invalid_json")
    extra = values.pop("extra_body", None) or {}
    if not isinstance(extra, dict):
        raise bad_field("extra_body", ": expected keys and values")
    if twice := sorted(set(values) & set(extra)):
        raise bad_field(twice[0], ": is given twice, once in extra_body")
    return {str(name): value for name, value in {**values, **extra}.items() if value is not None}
