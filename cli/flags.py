"""Flags and config files, generated from the declarations in `runtime/args.py`. Torch-free."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, canonical_names
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import Options, aliases, groups, nearest, unset, value_type

COMPONENT_PATH = re.compile(r"--([a-z][a-z0-9-]*)-path")
DOTTED = re.compile(r"--([a-z][a-z0-9-]*)\.([A-Za-z0-9_.-]+)")
KWARGS = "diffusers_kwargs"
ATTENTION_CONFIG = "attention_backend_config"
MAPS = (
    "component_paths", "component_attention_backends", "component_quantizations", ATTENTION_CONFIG, "vae_config",
    "nunchaku_config", KWARGS,
)  # fmt: skip
CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
Models = Sequence[type[Options]]
REQUEST: Models = (ServerArgs, SamplingParams)


class Parser(argparse.ArgumentParser):
    """Mistakes are `UserError`s, so that every way in speaks with one voice."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, models: Models = REQUEST, *, shown: bool = True) -> None:
    """One argument group for every group of options, in --help if they are `shown`."""
    for model in models:
        for title, fields in groups(model):
            group = parser.add_argument_group(title) if shown else parser
            for name, field in fields.items():
                _add_flag(group, name, field, shown=shown)


def _add_flag(group: argparse._ActionsContainer, name: str, field: FieldInfo, *, shown: bool) -> None:
    names = [flag(n) for n in (name, *aliases(field))]
    help = (field.description or "").replace("%", "%%")
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        help += f" Keys: {', '.join(field.annotation.model_fields)}."
    help += f" (default: {default_text(field)})"
    shared: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": help if shown else argparse.SUPPRESS,
    }
    kind = value_type(field)
    word = {int: "N", float: "X", dict: "MAP"}.get(kind, name.split("_")[-1].upper())
    if kind is bool:
        group.add_argument(*names, nargs="?", const="true", metavar="true|false", **shared)
        group.add_argument("--no-" + name.replace("_", "-"), action="store_const", const="false", dest=name,
                           default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # fmt: skip
    elif kind is list:
        group.add_argument(*names, nargs="+", action="extend", metavar=word, **shared)
    elif kind is dict:
        group.add_argument(*names, action="append", metavar=word, **shared)
    else:
        choices = literal_values(field)
        group.add_argument(*names, metavar="{" + ",".join(choices) + "}" if choices else word, **shared)


def literal_values(field: FieldInfo) -> list[str]:
    annotation: Any = field.annotation
    options = [annotation, *typing.get_args(annotation)]
    return [str(v) for o in options if typing.get_origin(o) is Literal for v in typing.get_args(o)]


def default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return unset(field)
    if value in ([], {}) or isinstance(value, BaseModel):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- the command line -> values -------------------------------------------------------


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str], models: Models = REQUEST
) -> dict[str, Any]:
    """Values by canonical name: config file first, flags over it. Only what the user gave is in it.

    Args:
        models: whose options the config file may name.
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
    config = getattr(namespace, "config", None)
    values = read_config_file(Path(config), models) if config is not None else {}
    for name, value in vars(namespace).items():
        if name in MAPS:
            for written in value:
                values[name] = merge(values.get(name), read_map(name, written))
        elif name != "config":
            values[name] = value
    for name, entries in extra.items():
        values[name] = merge(values.get(name), entries)
    return values


def merge(below: Any, above: Any) -> Any:
    """`above` over `below`; where both are mappings, key by key."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{k: merge(below.get(k), v) for k, v in above.items()}}


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
        elif path and name not in known:
            if typo := _typo_of(name, known):
                raise UserError(f"unknown flag {name}; did you mean {typo}?")
            field, key = "component_paths", path[1]
        else:
            rest.append(word)
            continue
        entry = read_map(field, {key: _scalar(field, value if equals else _next(words, name))})
        extra[field] = merge(extra.get(field), entry)
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


# -- maps -------------------------------------------------------------------------------


def read_map(name: str, written: Any) -> dict[str, Any]:
    """`{"a": 1}` or `a=x,b=y` as text, or a mapping from a config file. A dotted key is a nested one.

    Raises:
        UserError: text that is neither, or something that is not a mapping.
    """
    if isinstance(written, str):
        if name == ATTENTION_CONFIG and "=" not in written and Path(written).suffix.lower() in CONFIG_SUFFIXES:
            written = _read_file(name, Path(written))
        else:
            written = _read_json(name, written) if written.lstrip().startswith("{") else _read_pairs(name, written)
    if not isinstance(written, Mapping):
        raise UserError(f"{name}={written}: expected keys and values")
    values: dict[str, Any] = {}
    for key, value in written.items():
        if name != KWARGS:  # there, keys and null are passed on as they are
            key = str(key).replace("-", "_")
            if value is None:
                continue
        *outer, last = str(key).split(".")
        entry = {last: value}
        for part in reversed(outer):
            entry = {part: entry}
        values = merge(values, entry)
    return values


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise UserError(f"{name}={text}: not readable as JSON: {e}") from e


def _read_pairs(name: str, text: str) -> dict[str, str]:
    pairs = [p.partition("=") for p in text.split(",")]
    if any(not equals for _, equals, _ in pairs):
        raise UserError(f"{name}={text}: expected a JSON object or key=value,key=value")
    return {k.strip(): _scalar(name, v.strip()) for k, _, v in pairs}


def _scalar(name: str, text: str) -> Any:
    """Text of a flag. Arguments of diffusers have no declared types: there `0.5` is a number, `true` a switch."""
    if name != KWARGS:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


# -- config files ---------------------------------------------------------------------


def _read_file(name: str, path: Path) -> Any:
    """What a JSON or YAML file holds. Raises UserError if it cannot be read; `name` is the option that names it."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as e:
        raise UserError(f"{name}={path}: cannot be read: {e.strerror}") from e
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"{name}={path}: not readable: {' '.join(str(e).split())}") from e


def read_config_file(path: Path, models: Models = REQUEST) -> dict[str, Any]:
    """A JSON or YAML file; keys with underscores or hyphens, aliases, nested or dotted; null means not given.

    Raises:
        UserError: an unreadable file or an unknown key, with the nearest known one.
    """
    if path.suffix.lower() not in CONFIG_SUFFIXES:
        raise UserError(f"config={path}: expected a .json, .yaml or .yml file")
    raw = _read_file("config", path)
    if not isinstance(raw, Mapping):
        raise UserError(f"config={path}: expected keys and values")
    names = canonical_names(models)
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for written, value in raw.items():
        if value is None:
            continue
        key, dot, inner = str(written).partition(".")
        key = key.replace("-", "_")
        name = names.get(key)
        component = key.removesuffix("_path")
        if name is None and component not in ("", key) and not _typo_of(key, names):
            name, inner = "component_paths", component
        if name is None or (dot and name not in MAPS):
            raise UserError(f"config={path}: unknown key {written}{nearest(key, list(names))}")
        if name in MAPS:
            values[name] = merge(values.get(name), read_map(name, {inner: value} if inner else value))
        elif other := spelled.get(name):
            raise UserError(f"config={path}: {other} and {written} are the same option")
        else:
            values[name], spelled[name] = value, str(written)
    return values
