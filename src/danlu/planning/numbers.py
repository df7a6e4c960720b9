"""`danlu numbers`: how a number looks in each of the formats that weights are kept in.

Floating point is sign, exponent and fraction (IEEE 754): (-1)^s x 1.fraction x 2^(exponent - bias). The smallest
exponent means 0.fraction (subnormal numbers, down to zero), the largest infinity or not-a-number. Integers stand for
multiples of a scale that all numbers of a block share: x is about q x scale, with scale = absmax / largest integer.
All of it is computed exactly, with fractions.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from danlu.config import validate
from danlu.console import out as stdout
from danlu.errors import DanluError
from danlu.planning.config import NumbersConfig


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format by its widths in bits."""

    name: str
    exponent_bits: int
    fraction_bits: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def largest(self) -> Fraction:
        """Largest finite value."""
        return (2 - Fraction(1, 1 << self.fraction_bits)) * (1 << self.bias)

    @property
    def smallest_normal(self) -> Fraction:
        return Fraction(1, 1 << (self.bias - 1))

    @property
    def smallest(self) -> Fraction:
        """Smallest subnormal value."""
        return self.smallest_normal / (1 << self.fraction_bits)


@dataclass(frozen=True)
class IntFormat:
    """Integers of so many bits, from -largest to largest, times a scale."""

    name: str
    bits: int

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1


FLOATS = (FloatFormat("FP32", 8, 23), FloatFormat("FP16", 5, 10), FloatFormat("BF16", 8, 7))
INTS = (IntFormat("INT8", 8), IntFormat("INT4", 4))


@dataclass(frozen=True)
class Stored:
    """A number in a format.

    Attributes:
        bits: most significant first; the parts of a float separated by blanks.
        value: what is really stored.
        error: stored value minus the number; None where either is not finite.
        relative_error: its magnitude as a share of the number's.
        meaning: the bits spelled out as a formula.
        largest, smallest: range of magnitudes; subnormal floats included.
        n_bytes: size of one number; an integer's shared scale comes on top.
    """

    format: str
    bits: str
    value: float
    error: float | None
    relative_error: float | None
    meaning: str
    largest: float
    smallest: float
    n_bytes: float


def encode_float(number: Fraction | float, form: FloatFormat) -> tuple[int, int, int]:
    """Sign, exponent and fraction fields of the nearest value, ties to even.

    Args:
        number: exact, or a float for inf, nan and -0.0.
    """
    top = 2**form.exponent_bits - 1
    if isinstance(number, float) and not math.isfinite(number):
        negative = math.copysign(1.0, number) < 0
        return (int(negative), top, 2 ** (form.fraction_bits - 1) if math.isnan(number) else 0)
    sign = int(math.copysign(1.0, number) < 0) if isinstance(number, float) else int(number < 0)
    magnitude = abs(Fraction(number))
    if magnitude == 0:
        return sign, 0, 0
    exponent = max(_floor_log2(magnitude), 1 - form.bias)
    units = round(magnitude / Fraction(2) ** (exponent - form.fraction_bits))  # Python rounds ties to even
    # A significand that rounds up to 2 carries into the exponent, as the fields of IEEE 754 do by themselves.
    field = units + ((exponent + form.bias - 1) << form.fraction_bits)
    if field >> form.fraction_bits >= top:
        return sign, top, 0
    return sign, field >> form.fraction_bits, field & (2**form.fraction_bits - 1)


def decode_float(sign: int, exponent: int, fraction: int, form: FloatFormat) -> Fraction | float:
    """The value of the three fields; a float for infinities, not-a-number and negative zero."""
    if exponent == 2**form.exponent_bits - 1:
        return math.nan if fraction else (-math.inf if sign else math.inf)
    significand = Fraction(fraction, 2**form.fraction_bits) + (exponent > 0)
    value = significand * Fraction(2) ** (max(exponent, 1) - form.bias)
    if sign and value == 0:
        return -0.0
    return -value if sign else value


def store_float(number: Fraction | float, form: FloatFormat) -> Stored:
    """A number in a floating-point format."""
    sign, exponent, fraction = encode_float(number, form)
    value = decode_float(sign, exponent, fraction, form)
    bits = f"{sign} {exponent:0{form.exponent_bits}b} {fraction:0{form.fraction_bits}b}"
    if exponent == 2**form.exponent_bits - 1:
        meaning = "not a number" if fraction else "too large: infinity"
    elif exponent == 0 and fraction == 0:
        meaning = "zero"
    else:
        kind = f"1 + {fraction}/2^{form.fraction_bits}" if exponent else f"{fraction}/2^{form.fraction_bits}"
        meaning = f"{'-' if sign else ''}({kind}) x 2^{max(exponent, 1) - form.bias}"
    error, relative = _errors(number, value)
    n_bytes = (1 + form.exponent_bits + form.fraction_bits) / 8
    return Stored(
        form.name, bits, float(value), error, relative, meaning, float(form.largest), float(form.smallest), n_bytes
    )


def store_int(number: Fraction | float, form: IntFormat, absmax: Fraction) -> Stored:
    """A number as an integer times a scale; what lies beyond the range is clipped to its end."""
    scale = absmax / form.largest
    if isinstance(number, float) and math.isnan(number):
        raise DanluError("number: nan has no place among integers")
    if isinstance(number, float) and math.isinf(number):
        integer = form.largest if number > 0 else -form.largest
    else:
        integer = max(-form.largest, min(form.largest, round(Fraction(number) / scale)))
    value = integer * scale
    error, relative = _errors(number, value)
    return Stored(
        form.name, f"{integer % 2**form.bits:0{form.bits}b}", float(value), error, relative,
        f"{integer} x {float(scale):.6g}", float(absmax), float(scale), form.bits / 8,
    )  # fmt: skip


def numbers(config: NumbersConfig) -> list[Stored]:
    """Print a number's layout, value, error and range in FP32, FP16, BF16, INT8 and INT4, and return them.

    Raises:
        DanluError: it is not a number.
    """
    config = validate(config)
    number = parse_number(config.number)
    finite = not (isinstance(number, float) and not math.isfinite(number))
    absmax = max(Fraction(config.absmax), abs(Fraction(number))) if finite else Fraction(config.absmax)
    found = [store_float(number, form) for form in FLOATS]
    if not (isinstance(number, float) and math.isnan(number)):
        found += [store_int(number, form, absmax) for form in INTS]
    if config.json:
        print(json.dumps([_jsonable(asdict(stored)) for stored in found], indent=2))
    else:
        _print(config.number, found, float(absmax))
    return found


def parse_number(text: str) -> Fraction | float:
    """A decimal number or fraction, exactly; a float for inf, nan and -0.

    Raises:
        DanluError: it is not a number, or has an exponent beyond what any format here could hold.
    """
    special: float | None = None
    with contextlib.suppress(ValueError):
        special = float(text)
    # Beyond a double's range (1e400, 1e-400) no format here tells one number from another, and exact digits would be
    # endless.
    if special is not None and (not math.isfinite(special) or special == 0):
        return special
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise DanluError(f"number: {text!r} is not a number; give one such as 0.1, -3e-5, 1/3, inf") from None


def _floor_log2(x: Fraction) -> int:
    estimate = x.numerator.bit_length() - x.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= x else estimate - 1


def _errors(number: Fraction | float, value: Fraction | float) -> tuple[float | None, float | None]:
    if not (math.isfinite(number) and math.isfinite(value)):
        return None, None
    error = Fraction(value) - Fraction(number)
    return float(error), float(abs(error / Fraction(number))) if number else 0.0


def _jsonable(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no not-a-number."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in stored.items()}


def _print(text: str, found: list[Stored], absmax: float) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    console.print(Text(f"{text} as a computer keeps it\n", style="bold"))
    as_bits = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for column in ("format", "bits", "stored value", "error"):
        as_bits.add_column(column, no_wrap=True)
    for stored in found:
        bits = Text()
        parts = stored.bits.split()
        for part, style in zip(parts, ("red", "green", "blue") if len(parts) == 3 else ("blue",), strict=True):
            bits.append(part + " ", style=style)
        as_bits.add_row(stored.format, bits, f"{stored.value:.12g}", _short(stored.error, "+"))
    in_words = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for column in ("format", "bytes", "meaning", "relative error", "largest", "smallest"):
        in_words.add_column(column, no_wrap=True)
    for stored in found:
        in_words.add_row(
            stored.format, f"{stored.n_bytes:g}", stored.meaning, _short(stored.relative_error),
            f"{stored.largest:.3g}", f"{stored.smallest:.3g}",
        )  # fmt: skip
    for table in (as_bits, in_words):
        console.print(table, soft_wrap=False)
        console.print()
    legend = Text("floats: ")
    for part, style in (("sign", "red"), ("exponent", "green"), ("fraction", "blue")):
        legend.append(part + " ", style=style)
    legend.append(f"\nintegers: two's complement, times a scale that a block of numbers shares (absmax {absmax:g})")
    console.print(legend)


def _short(error: float | None, sign: str = "") -> str:
    return "-" if error is None else f"{error:{sign}.2g}" if error else "0"
