r"""Regular expressions as Python writes them, in the dialect of llguidance (Rust's), so that what it writes is what
``re.fullmatch`` accepts.

The dialects differ in a few character classes: Rust's ``\w`` has combining marks, its ``\d`` the digits of a newer
Unicode, its ``\S`` the four separators U+001C to U+001F. Each class is narrowed to what both have.
"""

from __future__ import annotations

import re

from danlu.errors import DanluError
from danlu.tokenizer.backend import require_encodable

MAX_CHARS = 20_000
MAX_WRITTEN_OUT = 200_000
"""Characters and classes after repetitions such as ``(a{9}){9}`` were written out."""
MAX_CASELESS_RANGES = 64
"""Python looks at each character of a range whose case is ignored, which takes milliseconds."""

CLASSES = {"d": "[0-9]", "w": r"[\p{L}\p{N}_]", "S": r"[^\s\x1c-\x1f]"}
NEGATED = {"D": "[^0-9]", "W": r"[^\p{L}\p{N}_]", "s": r"\s\x1c-\x1f"}
"""The same between ``[^`` and ``]``, where what is left out must be widened."""

_PIECE = re.compile(r"\\.|\[\^?\]?|.", flags=re.DOTALL)  # a bracket that comes first in a class is a character of it
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?|\{(\d*),?(\d*)\}|.", flags=re.DOTALL)


def read_regex(source: str) -> str:
    """The expression in Rust's dialect.

    Raises:
        DanluError: it is not a regular expression, too long or too deep, or the dialects would read it differently.
    """
    if len(source) > MAX_CHARS:
        raise DanluError(f"regex: has {len(source)} characters; at most {MAX_CHARS} can be followed")
    require_encodable(source)
    if _written_out(source) > MAX_WRITTEN_OUT:
        raise DanluError(f"regex: is too large; written out, it may have {MAX_WRITTEN_OUT} characters and classes")
    if re.search(r"\(\?[a-zA-Z]*i", source) and _ranges(source) > MAX_CASELESS_RANGES:
        raise DanluError(f"regex: ignores the case of more than {MAX_CASELESS_RANGES} ranges; write both cases")
    pieces: list[str] = []
    opened: str | None = None  # the beginning of the class that we are in
    for piece in _PIECE.findall(source):
        if opened is None:
            opened = piece if piece.startswith("[") else None
        elif piece == "]":
            opened = None
        elif piece.startswith("[") or (piece in "&-~" and pieces[-1] == piece):
            raise DanluError(f"regex: {piece!r} within a character class is read in different ways; write \\{piece[0]}")
        if piece.startswith("["):
            piece = piece.replace("]", r"\]")
        elif piece.startswith("\\"):
            piece = (NEGATED if opened and opened.startswith("[^") else CLASSES).get(piece[1:], piece)
        pieces.append(piece)
    try:
        re.compile(source)
    except RecursionError:
        raise DanluError("regex: is nested too deeply") from None
    except OverflowError as error:
        raise DanluError(f"regex: cannot be followed ({error})") from None
    except re.error as error:
        # An escape or a group that Python does not know, such as \p{L}, Rust may know.
        if not str(error).startswith(("bad escape \\", "unknown extension")):
            raise DanluError(f"regex: is not a regular expression ({error})") from None
    return "".join(pieces)


def _written_out(source: str) -> int:
    """How many characters and classes there are when each group is repeated as often as it may be."""
    groups, last = [0], 0
    for found in _ATOM.finditer(source):
        if found[0] == "(":
            groups.append(0)
        elif found[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif found[1] is not None:
            digits = found[2] or found[1] or "1"
            times = int(digits) if len(digits) < 10 else MAX_WRITTEN_OUT
            groups[-1] += last * (times - 1)
            last *= times
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)


def _ranges(source: str) -> int:
    """How many ranges its classes have, at most."""
    return sum(found[0].count("-") for found in _ATOM.finditer(source) if found[0].startswith("["))
