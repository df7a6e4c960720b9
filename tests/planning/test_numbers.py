"""Number formats against numpy and torch, bit by bit."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu import DanluError
from danlu.planning.config import NumbersConfig
from danlu.planning.numbers import FLOATS, INTS, decode_float, encode_float, numbers, parse_number, store_int

FP32, FP16, BF16 = FLOATS
INT8, INT4 = INTS


def bits_of(fields: tuple[int, int, int], form: object) -> int:
    sign, exponent, fraction = fields
    return ((sign << form.exponent_bits) | exponent) << form.fraction_bits | fraction


@given(st.floats(width=32) | st.floats(-7e4, 7e4) | st.floats(-1e-5, 1e-5) | st.floats(-1e-40, 1e-40))
def test_bits_are_those_of_numpy_and_torch(x: float) -> None:
    if math.isnan(x):
        return
    with np.errstate(over="ignore"):
        expected = {FP32: np.float32(x).view(np.uint32), FP16: np.float16(x).view(np.uint16)}
    for form, bits in expected.items():
        assert bits_of(encode_float(x, form), form) == int(bits)
    if float(np.float32(x)) == x:  # torch rounds to bfloat16 from float32
        bf16 = torch.tensor(x, dtype=torch.float32).bfloat16().view(torch.uint16).item()
        assert bits_of(encode_float(x, BF16), BF16) == bf16


@given(st.integers(0, 2**16 - 1), st.sampled_from([FP16, BF16]))
def test_every_bit_pattern_is_its_own_nearest(pattern: int, form: object) -> None:
    width = form.exponent_bits
    fields = (pattern >> 15, (pattern >> form.fraction_bits) & (2**width - 1), pattern & (2**form.fraction_bits - 1))
    value = decode_float(*fields, form)
    if not math.isnan(value):
        assert encode_float(value, form) == fields


def test_ranges_are_those_of_torch() -> None:
    for form, dtype in ((FP32, torch.float32), (FP16, torch.float16), (BF16, torch.bfloat16)):
        info = torch.finfo(dtype)
        assert float(form.largest) == info.max
        assert float(form.smallest_normal) == info.smallest_normal


def test_ties_go_to_even_and_thirds_are_exact() -> None:
    assert decode_float(*encode_float(Fraction(2049), FP16), FP16) == 2048
    assert decode_float(*encode_float(Fraction(2051), FP16), FP16) == 2052
    assert encode_float(Fraction(1, 3), FP32) == (0, 125, 0x2AAAAB)


def test_integers_share_a_scale_and_clip() -> None:
    assert store_int(Fraction("0.5"), INT8, Fraction(1)).bits == "01000000"  # 63.5 -> 64, the even one
    assert store_int(Fraction(-1), INT4, Fraction(1)).bits == "1001"  # -7
    assert store_int(math.inf, INT4, Fraction(1)).value == 1.0


def test_the_verb_prints_all_formats_and_json_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    numbers(NumbersConfig(number="0.1"))
    shown = capsys.readouterr().out
    assert "0 01111011 10011001100110011001101" in shown
    assert "0 01011 1001100110" in shown
    numbers(NumbersConfig(number="0.1", json=True))
    found = {entry["format"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == ["FP32", "FP16", "BF16", "INT8", "INT4"]
    assert found["FP16"]["value"] == float(np.float16(0.1))
    assert found["FP32"]["n_bytes"] == 4
    assert found["INT4"]["n_bytes"] == 0.5


@pytest.mark.parametrize("text", ["1e400", "1e-400", "nan", "-inf", "-0", "1/3", "1e-45", "65520"])
def test_extremes_print(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers(NumbersConfig(number=text))
    assert "FP32" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "abc", "1/0", "0x10", "1,5"])
def test_what_is_no_number_is_told(text: str) -> None:
    with pytest.raises(DanluError, match="is not a number"):
        parse_number(text)
