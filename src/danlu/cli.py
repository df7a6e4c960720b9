"""The command line, made from the table of verbs.

Every field of a verb's config becomes an option (positional fields become arguments, optional ones of them both), with
the field's help, default, unit and bounds. Values come, weakest first, from the defaults, `--config FILE.yaml`, and the
command line, where `--lr 0.01` and `lr=0.01` mean the same. All go through :func:`danlu.config.load`, which reports
every mistake at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from danlu import __version__
from danlu import config as configs
from danlu.errors import DanluError
from danlu.verbs import SPELLINGS, VERB_BY_NAME, VERBS, Verb

_OVERRIDES = "overrides"
"""A positional field of this name takes the `key=value` words as they are (the vars of a recipe)."""

GROUPS = {
    "data": "Make data sets.",
    "tokenizer": "Make tokenizers.",
    "adapters": "Look at adapters.",
    "keys": "API keys of the server.",
}
"""Help of the first word of two-word verbs."""

_EPILOG = "Each option can also be given as key=value (lr=0.01) or, for all at once, in a YAML file with --config."
_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*=")
_CONFIG, _WORDS, _AS_OPTION = "CONFIG_FILE", "WORDS", "_OPTION"  # in capitals, which no config field is
_UNION = (typing.Union, types.UnionType)


def main() -> None:
    """Run the command line; what goes wrong decides the exit code: 2 the user's mistake, 130 Ctrl-C, 1 ours."""
    try:
        build_app(sys.argv[1:])(prog_name="danlu")
    except DanluError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        print(f"This is a bug in danlu {__version__}; please report it with the lines above.", file=sys.stderr)
        sys.exit(1)


def build_app(words: Sequence[str] | None = None) -> typer.Typer:
    """The typer app.

    Args:
        words: the command line, if it is known: the other verbs are then listed but their configs are not imported,
            which keeps `danlu --help` and each verb's start fast. Shell completion needs them all.
    """
    if "_DANLU_COMPLETE" in os.environ:
        words = None
    settings: dict[str, Any] = {
        "no_args_is_help": True,
        "rich_markup_mode": None,  # rich takes longer to import than the whole of `danlu --help`
        "pretty_exceptions_enable": False,
        "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 120},
    }
    app = typer.Typer(**settings)
    app.callback()(_main_options)
    groups = {name: typer.Typer(help=text, **settings) for name, text in GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for verb in VERBS:
        *first, name = verb.name.split()
        asked = words is None or list(words[: len(first) + 1]) == [*first, name]
        parent = groups[first[0]] if first else app
        function = _command(verb) if asked else _listed_only
        parent.command(name, help=verb.help, short_help=verb.help, epilog=_EPILOG)(function)
    for other, listed in SPELLINGS.items():
        if words is not None and list(words[:1]) == [other]:
            app.command(other, help=VERB_BY_NAME[listed].help, hidden=True)(_command(VERB_BY_NAME[listed]))
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"danlu {__version__}")
        raise typer.Exit


def _main_options(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Show the version and exit.",
        show_default=False,
    ),
) -> None:
    """One package for the whole life of a language model: from raw text to a model you can talk to."""


def _listed_only() -> None:
    """Stands for a verb that this command line does not run."""


def _command(verb: Verb) -> Callable[..., None]:
    """The function typer calls for a verb; its signature is what typer makes the options from."""
    config_type = verb.config_type()
    fields = dataclasses.fields(config_type)
    hints = typing.get_type_hints(config_type)
    positional = [field for field in fields if configs.option_of(field).positional]

    def command(**given: Any) -> None:
        arguments = [given.pop(field.name, None) for field in positional] + [given.pop(_WORDS, None)]
        words = [word for value in arguments for word in ([value] if isinstance(value, str) else value or [])]
        file = given.pop(_CONFIG)
        values = {
            name.removesuffix(_AS_OPTION): value for name, value in given.items() if value is not None and value != []
        }
        try:
            overrides = [word for word in words if _OVERRIDE.match(word)]
            for name, value in _assign(
                [word for word in words if word not in overrides], positional, hints, verb
            ).items():
                values[name] = value + values.get(name, []) if isinstance(value, list) else value
            if _OVERRIDES in hints:  # a verb that hands them on
                values, overrides = {**values, _OVERRIDES: overrides}, []
            config = configs.load(config_type, file=file, overrides=overrides, values=values)
            result = verb.function()(config)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        if isinstance(result, Path):
            print(result)

    command.__signature__ = inspect.Signature(list(_parameters(fields, hints)))  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _assign(
    words: Sequence[str], positional: Sequence[dataclasses.Field[Any]], hints: dict[str, Any], verb: Verb
) -> dict[str, Any]:
    """Hand the plain words to the positional fields, in order; the last field takes the rest if it is a list."""
    values: dict[str, Any] = {}
    rest = list(words)
    for field in positional:
        if not rest or field.name == _OVERRIDES:
            break
        if _is_list(hints[field.name]):
            values[field.name], rest = rest, []
        else:
            values[field.name] = rest.pop(0)
    if rest:
        raise DanluError(f"danlu {verb.name}: does not know what to do with {rest[0]!r}; see danlu {verb.name} --help")
    return values


def _parameters(fields: Sequence[dataclasses.Field[Any]], hints: dict[str, Any]) -> Iterator[inspect.Parameter]:
    """One typer parameter a field: a text without default; types, bounds and defaults are `config.load`'s part."""
    rest_name, rest_help = "key=value", "Options without their dashes, as lr=0.01."
    for field in fields:
        if not configs.option_of(field).positional:
            continue
        if not _is_list(hints[field.name]):
            argument = typer.Argument(
                None, metavar=field.name.upper(), help=_help(field, hints[field.name]), show_default=False
            )
            yield _parameter(field.name, str | None, argument)
        elif field.name == _OVERRIDES:
            rest_help = _help(field, hints[field.name])
        else:
            rest_name, rest_help = f"{field.name.upper()}|key=value", _help(field, hints[field.name])
    yield _parameter(
        _WORDS, list[str] | None, typer.Argument(None, metavar=rest_name, help=rest_help, show_default=False)
    )
    for field in fields:
        positional = configs.option_of(field).positional
        if positional and (field.default is dataclasses.MISSING or field.name == _OVERRIDES):
            continue
        hint, flag = hints[field.name], "--" + field.name.replace("_", "-")
        annotation: Any
        if hint is bool:
            flag, annotation, metavar = f"{flag}/--no-{flag[2:]}", bool | None, None
        else:
            annotation, metavar = (list[str] | None) if _is_list(hint) else (str | None), _metavar(hint)
        declared = typer.Option(None, flag, metavar=metavar, help=_help(field, hint), show_default=False)
        yield _parameter(field.name + _AS_OPTION * positional, annotation, declared)
    yaml = typer.Option(
        None, "--config", metavar="FILE.yaml", help="YAML file with any of these options.", show_default=False
    )
    yield _parameter(_CONFIG, str | None, yaml)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _help(field: dataclasses.Field[Any], hint: Any) -> str:
    """What the field does, then what is known of its value: default and unit, bounds, whether it may be repeated."""
    declared = configs.option_of(field)
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    facts = []
    if default is dataclasses.MISSING:
        facts.append("required")
    elif default is not None and default != () and default != {}:
        facts.append(f"default: {_spell(default)}{' ' + declared.unit if declared.unit else ''}")
    elif declared.unit:
        facts.append(f"in {declared.unit}")
    for bound, words in (
        (declared.ge, "at least"),
        (declared.gt, "more than"),
        (declared.le, "at most"),
        (declared.lt, "less than"),
    ):
        if bound is not None:
            facts.append(f"{words} {bound:g}")
    if _is_list(hint) and not declared.positional:
        facts.append("may be repeated")
    return f"{declared.help} [{'; '.join(facts)}]" if facts else declared.help


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_spell, value))
    return str(value)


def _metavar(hint: Any) -> str:
    """A type as a placeholder: PATH, NUMBER, TEXT, or the values themselves."""
    names = {int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in _UNION:
        return "|".join(dict.fromkeys(_metavar(arg) for arg in args if arg is not type(None)))
    if origin in (tuple, list):
        return _metavar(args[0])
    return names.get(hint, "VALUE")


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list)
