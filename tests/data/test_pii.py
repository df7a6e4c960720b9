"""What is masked, and above all what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.data.pii import iban_valid, luhn_valid, mask, resident_id_valid, ssn_valid

MASKED = [
    ("Write to ada.lovelace+math@analytical-engine.co.uk.", "Write to <EMAIL>."),
    ("邮箱zhang.san@qq.com或电话13812345678。", "邮箱<EMAIL>或电话<PHONE>。"),
    ("author: Guido <guido@python.org>", "author: Guido <<EMAIL>>"),
    ("call +49 30 9018200 or +8613812345678", "call <PHONE> or <PHONE>"),
    ("call (212) 456-7890 or 212-456-7890!", "call <PHONE> or <PHONE>!"),
    ("SSN 219-09-9998.", "SSN <ID_NUMBER>."),
    ("身份证号11010519491231002X，", "身份证号<ID_NUMBER>，"),
    ("IBAN: DE89 3704 0044 0532 0130 00", "IBAN: <IBAN>"),
    ("GB82WEST12345698765432", "<IBAN>"),
    ("card 4012-8888-8888-1881, 378282246310005", "card <CARD_NUMBER>, <CARD_NUMBER>"),
    ("key AKIAIOSFODNN7ABCDEFG here", "key <API_KEY> here"),
    ("ghp_" + "a1B2" * 9, "<API_KEY>"),
    ("sk-proj-" + "Ab3_" * 10, "<API_KEY>"),
    ("api_key = 'q9X2mL7vB4nR8sT1wZ5y'", "api_key = '<SECRET>'"),
    ('"client_secret": "0f9a3b7c5d1e8f2a6b4c0d9e"', '"client_secret": "<SECRET>"'),
    ("-----BEGIN RSA PRIVATE KEY-----\n" + "MIIE\n" * 30 + "-----END RSA PRIVATE KEY-----", "<PRIVATE_KEY>"),
]

NOT_MASKED = [
    "user@example.com, root@localhost, me@mail.test",  # reserved for documentation
    "git@github.com:org/repo.git",
    "https://user:pw@host.example/x@y",
    "y = x@w.T + a@b.weight",
    "@dataclass\n@pytest.mark.slow",
    "package@1.2.3 and left@right",
    "version 3.11.7, 2024-01-15, 10.0.0.138, 1.38123456789",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "pi = 3.141592653589793238462643383279",
    "0x4012888888881881 id_4012888888881881",
    "4012 8888 8888 1882",  # Luhn fails
    "110105194912310021",  # check character fails
    "11010519491331002X",  # month 13
    "DE88 3704 0044 0532 0130 00",  # mod 97 fails
    "000-12-3456, 666-12-3456, 912-12-3456, 123-00-4567, 123-45-0000",  # never given out
    "ISBN 978-3-16-148410-0, ISSN 2049-3630",
    "555-0123 and (212) 555-0123",  # for fiction
    "1234567890123456789012345678901234567890",
    "api_key = 'your-api-key-goes-here-1'",
    "token = 'aaaaaaaaaaaaaaaaaaaaaaaa1'",
    "secret_key = os.environ['SECRET_KEY_FOR_THE_APP1']",
    "1 + 2000 + 3000 + 4000, +10 20 30",
    "2024-11-22 12:34:56, 1700000000",
]


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_masked(text: str, expected: str) -> None:
    assert mask(text) == expected


@pytest.mark.parametrize("text", NOT_MASKED)
def test_not_masked(text: str) -> None:
    assert mask(text) == text
    assert mask(text, is_code=True) == text


def test_bare_digits_in_code_need_quotes() -> None:
    for number in ("4012888888881881", "11010519491231002X", "13812345678"):
        assert mask(f"x = {number}\n", is_code=True) == f"x = {number}\n"
    assert mask("card = '4012888888881881'", is_code=True) == "card = '<CARD_NUMBER>'"
    assert mask("id = '11010519491231002X'", is_code=True) == "id = '<ID_NUMBER>'"


def with_luhn_digit(digits: str) -> str:
    return next(digits + str(d) for d in range(10) if luhn_valid(digits + str(d)))


@given(st.text("0123456789", min_size=14, max_size=14), st.integers(0, 14), st.integers(1, 9))
def test_luhn_finds_every_single_wrong_digit(tail: str, place: int, change: int) -> None:
    digits = with_luhn_digit("4" + tail)
    wrong = digits[:place] + str((int(digits[place]) + change) % 10) + digits[place + 1 :]
    assert luhn_valid(digits)
    assert not luhn_valid(wrong)


@given(st.integers(110000, 659999), st.dates(), st.integers(0, 999), st.integers(0, 16), st.integers(1, 9))
def test_resident_id_finds_every_single_wrong_digit(
    area: int, born: object, serial: int, place: int, change: int
) -> None:
    stem = f"{area}{str(born).replace('-', ''):0>8}{serial:03}"
    if not "1900" <= stem[6:10] <= "2100":
        return
    valid = [stem + char for char in "0123456789X" if resident_id_valid(stem + char)]
    assert len(valid) == 1
    number = valid[0]
    wrong = number[:place] + str((int(number[place]) + change) % 10) + number[place + 1 :]
    assert not resident_id_valid(wrong)


@given(st.text("0123456789", min_size=18, max_size=18), st.integers(0, 17), st.integers(1, 9))
def test_iban_finds_every_single_wrong_digit(account: str, place: int, change: int) -> None:
    valid = [iban for check in range(2, 99) if iban_valid(iban := f"DE{check:02}{account}")]
    assert len(valid) == 1
    body = account[:place] + str((int(account[place]) + change) % 10) + account[place + 1 :]
    assert not iban_valid(valid[0][:4] + body)


def test_lengths_and_blocks() -> None:
    assert iban_valid("NO9386011117947")
    assert not iban_valid("NO93860111179470")
    assert not iban_valid("ZZ9386011117947")
    longer = [f"NO{check:02}860111179470" for check in range(2, 99)]
    assert any(int(f"860111179470{int('N', 36)}{int('O', 36)}{iban[2:4]}") % 97 == 1 for iban in longer)
    assert not any(map(iban_valid, longer))
    assert ssn_valid("219-09-9998")
    assert not ssn_valid("078-05-1120")


@given(st.text())
def test_masking_twice_changes_nothing_more(text: str) -> None:
    once = mask(text)
    assert mask(once) == once
