"""Flags and config files, generated from the declarations in `runtime/args.py`. Torch-free."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, aliases, canonical_names, groups, nearest
from sgl_diffusion.runtime.errors import UserError

COMPONENT_PATH = re.compile(r"--([a-z][a-z0-9-]*)-path")
DOTTED = re.compile(r"--([a-z][a-z0-9-]*)\.([A-Za-z0-9_.-]+)")
MAPS = ("component_paths", "component_attention_backends", "diffusers_kwargs", "vae_config")


class Parser(argparse.ArgumentParser):
    """Mistakes are `UserError`s, so that every way in speaks with one voice."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One argument group for every group of options."""
    for model in (ServerArgs, SamplingParams):
        for title, fields in groups(model):
            group = parser.add_argument_group(title)
            for name, field in fields.items():
                _add_flag(group, name, field)


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    names = [flag(n) for n in (name, *aliases(field))]
    help = (field.description or "").replace("%", "%%") + f" (default: {default_text(field)})"
    shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help}
    kind = value_type(field)
    if kind is bool:
        group.add_argument(*names, nargs="?", const="true", metavar="true|false", **shared)
        group.add_argument("--no-" + name.replace("_", "-"), action="store_const", const="false", dest=name,
                           default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip
    elif kind is list:
        group.add_argument(*names, nargs="+", action="extend", metavar=name.split("_")[-1].upper(), **shared)
    else:
        choices = literal_values(field)
        metavar = "{" + ",".join(choices) + "}" if choices else name.split("_")[-1].upper()
        group.add_argument(*names, metavar=metavar, **shared)


def value_type(field: FieldInfo) -> type:
    """The plain type behind an annotation: bool, list, dict, str, int, float."""
    annotation: Any = field.annotation
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(a for a in typing.get_args(annotation) if a is not NoneType)
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin = typing.get_origin(annotation) or annotation
    if origin is Literal:
        return str
    return dict if isinstance(origin, type) and issubclass(origin, BaseModel) else origin


def literal_values(field: FieldInfo) -> list[str]:
    annotation: Any = field.annotation
    options = [annotation, *typing.get_args(annotation)]
    return [str(v) for o in options if typing.get_origin(o) is Literal for v in typing.get_args(o)]


def default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "by model" if "model" in (field.description or "") else "automatic"
    if value in ([], {}) or isinstance(value, BaseModel):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- the command line -> values -------------------------------------------------------


def parse_command_line(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Values by canonical name: config file first, flags over it. Only what the user gave is in it.

    Raises:
        UserError: an unknown flag or key, a value that cannot be read.
    """
    argv, extra = _take_open_ended(parser, list(argv))
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].partition("=")[0]
        if name.startswith("-"):
            raise UserError(f"unknown flag {name}{nearest(name, known)}")
        raise UserError(f"unexpected argument {unknown[0]!r}")
    given = {k: v for k, v in vars(namespace).items() if k != "config"}
    for name in MAPS:
        if isinstance(given.get(name), str):
            given[name] = _read_map(name, given[name])
    for name, entries in extra.items():
        given[name] = {**given.get(name, {}), **entries}
    config = getattr(namespace, "config", None)
    base = read_config_file(Path(config)) if config is not None else {}
    return {**base, **{k: _merge(base.get(k), v) for k, v in given.items()}}


def _merge(below: Any, above: Any) -> Any:
    return {**below, **above} if isinstance(below, dict) and isinstance(above, dict) else above


def _take_open_ended(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Takes flags with a free part out of `argv`: `--<component>-path P` and `--<map>.<key> V`."""
    known = {option for action in parser._actions for option in action.option_strings}
    rest: list[str] = []
    extra: dict[str, dict[str, Any]] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        dotted, path = DOTTED.fullmatch(name), COMPONENT_PATH.fullmatch(name)
        if dotted and flag(dotted[1].replace("-", "_")) in known:
            field, key = dotted[1].replace("-", "_"), dotted[2]
            key = key.replace("-", "_") if field in ("vae_config", "component_paths") else key
        elif path and name not in known:
            if typo := _typo_of(name, known):
                raise UserError(f"unknown flag {name}; did you mean {typo}?")
            field, key = "component_paths", path[1].replace("-", "_")
        else:
            rest.append(word)
            continue
        extra.setdefault(field, {})[key] = value if equals else _next(words, name)
    return rest, extra


def _typo_of(name: str, known: Collection[str]) -> str | None:
    """The known name that `--outptu-path` was meant to be: much nearer than a component's key would be."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    return close[0] if close else None


def _next(words: Any, name: str) -> str:
    value = next(words, None)
    if value is None or value.startswith("--"):
        raise UserError(f"{name}: expected one value")
    return str(value)


def _read_map(name: str, text: str) -> dict[str, Any]:
    """`{"a": 1}` or `a=x,b=y`."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as e:
            raise UserError(f"{name}={text}: not readable as JSON: {e}") from e
        return typing.cast(dict[str, Any], value)
    pairs = [p.partition("=") for p in text.split(",")]
    if any(not equals for _, equals, _ in pairs):
        raise UserError(f"{name}={text}: expected a JSON object or key=value,key=value")
    return {k.strip(): v.strip() for k, _, v in pairs}


# -- config files ---------------------------------------------------------------------


def read_config_file(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; keys with underscores or hyphens, aliases, nested or dotted; null means not given.

    Raises:
        UserError: an unreadable file or an unknown key, with the nearest known one.
    """
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise UserError(f"config={path}: expected a .json, .yaml or .yml file")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as e:
        raise UserError(f"config={path}: cannot be read: {e.strerror}") from e
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"config={path}: not readable: {' '.join(str(e).split())}") from e
    if not isinstance(raw, Mapping):
        raise UserError(f"config={path}: expected keys and values")
    names = canonical_names()
    values: dict[str, Any] = {}
    for written, value in raw.items():
        if value is None:
            continue
        key, _, inner = str(written).replace("-", "_").partition(".")
        component = key.removesuffix("_path")
        if key in names and inner:
            values.setdefault(names[key], {})[inner] = value
        elif key in names:
            values[names[key]] = _merge(values.get(names[key]), value)
        elif key.endswith("_path") and component and not _typo_of(key, names):
            values.setdefault("component_paths", {})[component] = value
        else:
            raise UserError(f"config={path}: unknown key {written}{nearest(key, list(names))}")
    return values
