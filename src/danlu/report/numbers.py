"""Numbers and commands as the report spells them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from typing import Any

from danlu import config as configs
from danlu.formats.card import Card
from danlu.verbs import VERB_BY_NAME

MISSING = "–"
"""Stands where a card does not hold a number."""


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def count(value: object) -> str:
    """12345 -> '12,345', 12345678 -> '12.3 M'."""
    number = _number(value)
    if number is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.1f} {letter}"
    return f"{number:,.0f}"


def decimal(value: object, digits: int = 3) -> str:
    """1.18342 -> '1.183'."""
    number = _number(value)
    return MISSING if number is None else f"{number:,.{digits}f}"


def percent(value: object, digits: int = 0) -> str:
    """0.456 -> '46 %'."""
    number = _number(value)
    return MISSING if number is None else f"{100 * number:.{digits}f} %"


def size(value: object) -> str:
    """Bytes: 11800000 -> '11.8 MB' (powers of 1000, as corpora are counted)."""
    number = _number(value)
    if number is None:
        return MISSING
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} bytes" if unit == "bytes" else f"{number:.1f} {unit}"


def duration(value: object) -> str:
    """Seconds: 182.4 -> '3 min 02 s'."""
    number = _number(value)
    if number is None:
        return MISSING
    if number < 60:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def flops(value: object) -> str:
    """5.16e11 -> '516 GFLOP/s'."""
    number = _number(value)
    if number is None:
        return MISSING
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if abs(number) >= scale:
            return f"{number / scale:.3g} {unit}FLOP/s"
    return f"{number / 1e6:.3g} MFLOP/s"


def words(key: str) -> str:
    """A metric's key as readers say it: 'bytes_per_token_heldout' -> 'bytes per token, held out'."""
    text = key.replace("_", " ").replace("heldout", "held-out")
    return text[: -len(" held-out")] + ", held out" if text.endswith(" held-out") else text


def verifier(spec: object) -> str:
    """What rewards, without the way to its folder: '0.1*model=runs/reward' -> '0.1*model=reward'."""
    return re.sub(r"(?<=model=).*/(?=[^/])", "", str(spec), count=1)


def visible(token: str) -> str:
    """A token with its white space made visible; long runs of spaces are counted."""
    token = re.sub(r" {5,}", lambda run: f"␣×{len(run[0])}", token)
    return token.translate({ord(" "): "·", ord("\n"): "⏎", ord("\t"): "⇥", ord("\r"): "␍"})


def command(card: Card) -> str:
    """The command line that makes this artifact again: what differs from the defaults, as the card's config has it."""
    verb = VERB_BY_NAME.get(card.verb)
    if verb is None:
        return f"# made by {card.verb}, which this version of danlu does not have"
    words = ["danlu", *card.verb.split()]
    options: list[str] = []
    chosen = chosen_options(card)
    for field in dataclasses.fields(verb.config_type()):
        if field.name not in chosen:
            continue
        value = chosen[field.name]
        values = value if isinstance(value, list) else [value]
        if configs.option_of(field).positional:
            words += [str(item) for item in values]
        elif value is None or isinstance(value, (bool, dict)):
            options.append(f"{field.name}={json.dumps(value, ensure_ascii=False)}")
        else:
            for item in values:
                options += [f"--{field.name.replace('_', '-')}", str(item)]
    return shlex.join(words + options)


def chosen_options(card: Card) -> dict[str, Any]:
    """The options of a card that are not what they are by default; all of them, of a verb that is not known."""
    verb = VERB_BY_NAME.get(card.verb)
    if verb is None:
        return card.config
    defaults = {field.name: _default(field) for field in dataclasses.fields(verb.config_type())}
    return {
        name: value
        for name, value in card.config.items()
        if name != "overwrite" and (name not in defaults or value != defaults[name])
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default in the plain form in which cards hold values."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if isinstance(made, tuple):
        return list(made)
    return made if made is None or isinstance(made, (bool, int, float, str, list, dict)) else str(made)
