"""Configs are dataclasses whose fields carry their own documentation and bounds.

A verb declares what it takes once::

    @dataclass(frozen=True)
    class PretrainConfig:
        data: Path = option(REQUIRED, "Data folder made by `danlu data build`.")
        lr: float = option(0.02, "Learning rate of the matrices.", gt=0)

and the command line, YAML files, ``key=value`` overrides, recipes and Python calls all read that declaration.
:func:`load` collects every unknown key and every impossible value before it complains, so a user mends a config once,
not once per mistake.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union

import yaml

from danlu.errors import DanluError, Problems

T = TypeVar("T")

REQUIRED: Final[Any] = MISSING
"""Default of an option the user has to give."""


@dataclass(frozen=True)
class Option:
    """What is known of one config field besides its name, type and default."""

    help: str
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    positional: bool = False
    affects_result: bool = True


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    positional: bool = False,
    affects_result: bool = True,
) -> Any:
    """Declare a config field.

    Args:
        default: the default value, or ``REQUIRED``. A tuple stands for a list.
        help: one sentence for the help text; say what the field does, not what it is called.
        unit: unit of the number ("tokens", "minutes", ...), shown behind the default.
        ge, gt, le, lt: bounds of a number (or of every number in a tuple, every value of a mapping).
        positional: the command line takes it without ``--name``.
        affects_result: False for fields that change where or how a run goes but not what it makes (output folder,
            progress, logging); they are left out of the fingerprint that decides whether a finished stage is reused.
    """
    metadata = {"option": Option(help, unit, ge, gt, le, lt, positional, affects_result)}
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The declaration behind a config field."""
    found = field.metadata.get("option")
    return found if isinstance(found, Option) else Option(help="")


@functools.cache  # they are compiled anew each time, which the server would do for each request
def _type_hints(config_type: type) -> dict[str, Any]:
    return typing.get_type_hints(config_type)


def load(
    config_type: type[T],
    *,
    file: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> T:
    """Build a config from (weakest first) its defaults, a YAML file, ``key=value`` strings and given values.

    Raises:
        Problems: unknown keys, wrong types, values out of bounds and missing required keys, all at once.
    """
    hints = _type_hints(config_type)  # type: ignore[arg-type]  # mypy takes classes for unhashable
    given: dict[str, tuple[Any, str]] = {}  # key -> (value, where it came from)
    problems: list[str] = []
    if file is not None:
        for key, value in read_yaml_mapping(file).items():
            given[key] = (value, str(file))
    for text in overrides:
        key, separator, raw = text.partition("=")
        if not separator or not key:
            problems.append(f"{text!r} is not an override; write key=value")
            continue
        key = key.strip().replace("-", "_")
        try:
            value = yaml.safe_load(raw) if raw and not _is_text(hints.get(key)) else raw
        except yaml.YAMLError:
            value = raw
        given[key] = (value, text)
    for key, value in (values or {}).items():
        given[key] = (value, "")

    fields = {field.name: field for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    kwargs: dict[str, Any] = {}
    for key, (value, origin) in given.items():
        where = f"{origin}: " if origin else ""
        if key not in fields:
            problems.append(f"{where}unknown key {key!r}{_did_you_mean(key, fields)}")
            continue
        try:
            kwargs[key] = _coerce(value, hints[key])
        except ValueError as error:
            problems.append(f"{where}{key}: {error}")
    missing_keys: list[str] = []
    for name, field in fields.items():
        no_default = field.default is MISSING and field.default_factory is MISSING
        if no_default and name not in kwargs and name not in given:
            missing_keys.append(name)
            problems.append(f"{name} is missing: {option_of(field).help}")
    for name, value in kwargs.items():
        problems += [f"{name}: {text}" for text in _out_of_bounds(value, option_of(fields[name]))]
    if not problems:
        config = config_type(**kwargs)
        problems = cross_check(config)
        if not problems:
            return config
    raise Problems(f"the configuration cannot be used ({len(problems)} problem{'s'[: len(problems) > 1]}):", problems)


def cross_check(config: object) -> list[str]:
    """Problems between fields, as told by the config's own ``problems()`` method (if it has one)."""
    check = getattr(config, "problems", None)
    return list(check()) if callable(check) else []


def validate(config: T) -> T:
    """Check a config built in Python the way :func:`load` checks one read from a file; return it."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return load(type(config), values=values)


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain JSON/YAML values."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def fingerprint(config: object, *more: str) -> str:
    """Hex digest of everything in the config that affects the result, plus the fingerprints of the inputs."""
    plain = to_dict(config)
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if not option_of(field).affects_result:
            plain.pop(field.name)
    text = json.dumps([type(config).__name__, plain, more], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file that must hold one mapping with string keys; anything else is told with file and line."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DanluError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise DanluError(f"{path}{line}: is not valid YAML ({getattr(error, 'problem', None) or error})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise DanluError(f"{path}: must hold a mapping of option names to values")
    return loaded


def type_name(hint: Any) -> str:
    """A type as the help text and error messages name it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    if hint is str:
        return "text"
    if hint is float:
        return "number"
    if hint is int:
        return "whole number"
    return getattr(hint, "__name__", str(hint)).lower()


def _coerce(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; ValueError with a reason where it is not one. Never guesses (True is not 1)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if value in ("", "none", "null") and type(None) in args and str not in args:
            return None
        last = ValueError("no such value")
        for arg in args:
            if arg is type(None):
                continue
            try:
                return _coerce(value, arg)
            except ValueError as error:
                last = error
        raise last
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not one of {', '.join(map(str, args))}{_did_you_mean(str(value), args)}")
    if origin is tuple or origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        coerced = [_coerce(item, args[0]) for item in items]
        return tuple(coerced) if origin is tuple else coerced
    if origin is dict:
        if isinstance(value, str):
            value = _mapping_of(value)
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a mapping")
        return {_coerce(k, args[0]): _coerce(v, args[1]) for k, v in value.items()}
    if hint is Any:
        return value
    if hint is Path:
        if isinstance(value, os.PathLike):  # a Path, or the data folder another verb returned
            return Path(value)
        if isinstance(value, str) and value and "\0" not in value:
            return Path(value).expanduser()
        raise ValueError(f"{value!r} is not a path")
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{value!r} is not true or false")
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{value!r} is not a whole number")
        try:
            number = float(value)
        except (ValueError, OverflowError):  # OverflowError: a whole number of hundreds of digits
            raise ValueError(f"{value!r} is not a whole number") from None
        if not math.isfinite(number) or number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        try:
            return int(value) if isinstance(value, (int, str)) else int(number)  # exact, also past 2^53
        except ValueError:
            return int(number)  # "1e6"
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{value!r} is not a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):  # OverflowError: a whole number of hundreds of digits
            raise ValueError(f"{value!r} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a finite number")
        return number
    if hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise ValueError(f"{value!r} is not text")
    raise TypeError(f"config fields cannot be of type {hint!r}")  # a programmer's mistake, not a user's


def _mapping_of(text: str) -> Any:
    """A mapping as it is typed behind ``--option``; what is none stays as it is."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _is_text(hint: Any) -> bool:
    """Whether what is typed for a field is its value as it stands: `revision=1.10` is not the number 1.1."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_is_text(arg) for arg in typing.get_args(hint))
    return hint in (str, Path) or (
        typing.get_origin(hint) is Literal and all(isinstance(arg, str) for arg in typing.get_args(hint))
    )


def _out_of_bounds(value: Any, bounds: Option) -> list[str]:
    numbers = (
        list(value.values()) if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else [value]
    )
    unit = f" {bounds.unit}" if bounds.unit else ""
    problems = []
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if bounds.ge is not None and number < bounds.ge:
            problems.append(f"{number:g}{unit} is too small; at least {bounds.ge:g}")
        if bounds.gt is not None and number <= bounds.gt:
            problems.append(f"{number:g}{unit} is too small; more than {bounds.gt:g}")
        if bounds.le is not None and number > bounds.le:
            problems.append(f"{number:g}{unit} is too large; at most {bounds.le:g}")
        if bounds.lt is not None and number >= bounds.lt:
            problems.append(f"{number:g}{unit} is too large; less than {bounds.lt:g}")
    return problems


def _did_you_mean(word: str, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(word, [str(item) for item in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
