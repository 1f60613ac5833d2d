"""Component configs: frozen dataclasses that read `config.json` and refuse what they do not understand."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")


class ConfigError(ValueError):
    """A component's `config.json` asks for something the native model does not implement."""


def read_config(cls: type[C], raw: Mapping[str, Any], *, ignored: Mapping[str, str] | None = None) -> C:
    """`cls` from the keys of a `config.json`.

    Args:
        cls: a frozen dataclass; a field without a default is a required key.
        raw: the parsed file. Keys that start with `_` are diffusers' bookkeeping.
        ignored: keys that may hold any value, each with the reason why it has no effect on the result.
    Raises:
        ConfigError: on a missing or unknown key, naming it.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    given = {k: v for k, v in raw.items() if not k.startswith("_") and k not in (ignored or {})}
    if unknown := sorted(set(given) - set(fields)):
        known = ", ".join(fields)
        raise ConfigError(f"config key {unknown[0]}={given[unknown[0]]!r} is not understood; known keys: {known}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(given)):
        raise ConfigError(f"config key {missing[0]} is missing")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def demand(config: object, **allowed: Any) -> None:
    """Refuses a config whose field differs from the only value the native model implements."""
    for name, value in allowed.items():
        if (got := getattr(config, name)) != value:
            raise ConfigError(f"config key {name}={got!r} is not supported natively; only {value!r} is")
