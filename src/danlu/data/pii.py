"""Masking of personal data and secrets: what looks like one *and* passes its check digits is replaced with a tag such
as ``<EMAIL>``.

Precision comes first, since a wrong mask damages a corpus on every page: numbers need their check digits (Luhn, ISO
7064, mod 97), valid dates or the separators people write, addresses a real top-level domain, secrets a known prefix.
Addresses and numbers that are reserved for documentation (RFC 2606 `example.com`, 555-01xx) are nobody's and stay.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True)
class Rule:
    """``hint`` is a cheap test that a text may hold a match at all; ``check`` decides about each match."""

    tag: str
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str], bool], bool]
    hint: re.Pattern[str]


def mask(text: str, is_code: bool = False) -> str:
    """``text`` with personal data and secrets replaced by tags. In code, bare digits count only inside quotes."""
    for rule in RULES:
        if rule.hint.search(text):
            text = rule.pattern.sub(lambda found, rule=rule: _tagged(found, rule, is_code), text)  # type: ignore[misc]
    return text


def _tagged(match: re.Match[str], rule: Rule, is_code: bool) -> str:
    """The match with its group ``secret`` (or all of it) replaced, if it passes the rule's check."""
    if not rule.check(match, is_code):
        return match[0]
    group = "secret" if "secret" in match.re.groupindex else 0
    start, end = match.start(group) - match.start(), match.end(group) - match.start()
    return match[0][:start] + rule.tag + match[0][end:]


# --- check digits ----------------------------------------------------------------------------------------------


def luhn_valid(digits: str) -> bool:
    """Luhn check (ISO/IEC 7812) of a card number given as digits."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def resident_id_valid(number: str) -> bool:
    """Chinese resident identity number (GB 11643): 17 digits with a birth date and an ISO 7064 MOD 11-2 check
    character.
    """
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], weights, strict=True))
    if "10X98765432"[total % 11] != number[17].upper():
        return False
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return 1900 <= born.year <= 2100 and "11" <= number[:2] <= "91"


def iban_valid(iban: str) -> bool:
    """ISO 13616: the length of its country and mod 97 = 1, with letters as numbers from 10."""
    compact = re.sub(r"\s", "", iban)
    if len(compact) != _IBAN_LENGTH.get(compact[:2]):
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


def ssn_valid(number: str) -> bool:
    """US social security number AAA-GG-SSSS: no check digit, but blocks that were never given out, and two used in
    adverts.
    """
    area, group, serial = number.split("-")
    given_out = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return given_out and number not in ("078-05-1120", "219-09-9999")


# --- rules -----------------------------------------------------------------------------------------------------

_IBAN_LENGTHS = """
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18
    FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LI21 LT20 LU20
    LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SE24 SI19 SK24 SM27
    TN24 TR26 UA29 VA22 VG24 XK20
"""
_IBAN_LENGTH = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}

_GENERIC_TLDS = """
    academy agency ai app art biz blog bot center chat club cloud co codes com company computer consulting design
    dev digital edu education email engineering expert foundation fun games gmbh gov group guru health host info ink
    institute int international io jobs land law life link live llc ltd market media mil mobi museum name net
    network news ngo online org page photo pro science services shop site social software solutions space store
    studio support systems team tech technology tel today tools top travel university vip website wiki work works
    world xyz zone
"""
_TLDS = frozenset(_GENERIC_TLDS.split())  # besides the two letters of countries
_RESERVED = re.compile(
    r"(?:^|[.@])(?:example(?:\.(?:com|net|org|edu|co\.\w\w))?|test|invalid|localhost|local|localdomain|(?:example|domain|server|host"
    r"|foo|bar|spam|yourdomain|mydomain)\.(?:com|net|org))$",
    re.IGNORECASE,
)
_ROLE = re.compile(r"git|hg|svn|user|username|no-?reply|do-?not-?reply", re.IGNORECASE)


def _email(match: re.Match[str], is_code: bool) -> bool:
    user, _, domain = match[0].rpartition("@")
    top = domain.rpartition(".")[2].lower()
    if top not in _TLDS and len(top) > 2 and not top.startswith("xn--"):
        return False  # a file name, a version, the matrix product a@b.T
    if _RESERVED.search("@" + domain) or _ROLE.fullmatch(user):
        return False
    after = match.string[match.end() : match.end() + 1]
    return not (is_code and after in ("(", "[", "_"))


def _phone(match: re.Match[str], is_code: bool) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if match[0].startswith("+"):
        return 10 <= len(digits) <= 15 and digits[0] != "0"
    if "555" in digits[3:6] and digits[6:8] == "01":  # 555-0100 to 555-0199 are for fiction
        return False
    return len(digits) == 10 or not is_code  # a bare Chinese mobile number is just a number in code


def _in_quotes(match: re.Match[str]) -> bool:
    before, after = match.string[match.start() - 1 : match.start()], match.string[match.end() : match.end() + 1]
    return bool(before) and before in "\"'`" and before == after


def _card(match: re.Match[str], is_code: bool) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if len(set(digits)) < 3 or not luhn_valid(digits):
        return False
    return not is_code or match[0] != digits or _in_quotes(match)


def _resident_id(match: re.Match[str], is_code: bool) -> bool:
    return resident_id_valid(match[0]) and (not is_code or _in_quotes(match))


def _secret_value(match: re.Match[str], is_code: bool) -> bool:
    """A quoted value of a variable called like a secret: letters and digits of high entropy, no place-holder."""
    value = match["secret"]
    if not re.search(r"\d", value) or not re.search(r"[A-Za-z]", value) or _PLACE_HOLDER.search(value):
        return False
    counts = Counter(value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return entropy > (3.0 if re.fullmatch(r"[0-9a-fA-F]+", value) else 3.5)


def _always(match: re.Match[str], is_code: bool) -> bool:
    return True


_PLACE_HOLDER = re.compile(r"example|xxxx|your|test|dummy|1234", re.IGNORECASE)

# A number is not the piece of a longer number, of a name, of a decimal, of a version, of a link or of a hash.
_ALONE, _END = r"(?<![\w.+\-/#&=])", r"(?![\w\-/]|[.,]\d)"


def _rule(tag: str, check: Callable[[re.Match[str], bool], bool], hint: str, *pattern: str) -> Rule:
    r"""``\w`` and ``\d`` are ASCII, so that a match may touch a Chinese character."""
    return Rule(tag, re.compile("".join(pattern), re.ASCII), check, re.compile(hint, re.ASCII))


RULES: tuple[Rule, ...] = (
    _rule(
        "<PRIVATE_KEY>",
        _always,
        "PRIVATE KEY",
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[^\-]|-(?!----)){64,20000}",
        r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    ),
    _rule(
        "<API_KEY>",
        _always,
        r"AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|sk-|k_live_|xox|AIza|hf_|npm_|pypi-|eyJ",
        r"(?<![\w\-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}",  # AWS
        r"|gh[pousr]_[0-9A-Za-z]{36,255}|github_pat_[0-9A-Za-z_]{60,255}|glpat-[\w\-]{20,}",  # GitHub, GitLab
        r"|sk-(?:proj-|ant-|or-|svcacct-)?(?=[\w\-]*\d)[A-Za-z0-9_\-]{32,}",  # OpenAI, and others after it
        r"|[rs]k_live_[0-9A-Za-z]{20,}|xox[abprs]-[0-9A-Za-z\-]{10,}|AIza[0-9A-Za-z_\-]{35}",  # Stripe, Slack, Google
        r"|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-AgEI[\w\-]{50,}",  # Hugging Face, npm, PyPI
        r"|eyJ[\w\-]{10,}\.eyJ[\w\-]{10,}\.[\w\-]{20,})(?![\w\-])",  # JSON web tokens
    ),
    _rule(
        "<SECRET>",
        _secret_value,
        r"[:=]\s{0,9}[\"'][\w+/=\-.]{20}",
        r"(?i)(?:api|access|auth|secret|private|client)[_-]?(?:key|token|secret)[\"']?\s{0,9}[:=]\s{0,9}",
        r"[\"'](?P<secret>[\w+/=\-.]{20,200})[\"']",
    ),
    _rule(
        "<EMAIL>",
        _email,
        r"[\w+%\-]@[A-Za-z0-9]",
        r"(?<![\w.+%@/\-])[A-Za-z0-9](?:[\w.+%\-]{0,62}[\w+%\-])?",
        r"@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z][A-Za-z0-9\-]{1,23}(?![\w@])",
    ),
    _rule(
        "<IBAN>",
        lambda match, is_code: iban_valid(match[0]),
        r"[A-Z][A-Z]\d\d[ A-Z0-9]{5}",
        r"(?<![\w\-])[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)(?![\w\-])",
    ),
    _rule("<ID_NUMBER>", _resident_id, r"[0-9]{17}", _ALONE, r"[1-9]\d{16}[\dXx]", _END),
    _rule(
        "<ID_NUMBER>",
        lambda match, is_code: ssn_valid(match[0]),
        r"[0-9]-[0-9]{2}-[0-9]{4}",
        _ALONE + r"\d{3}-\d{2}-\d{4}" + _END,
    ),
    _rule(  # Visa, Mastercard, Discover, UnionPay, JCB, American Express: bare, or in the groups printed on the card
        "<CARD_NUMBER>",
        _card,
        r"[0-9]{13}|[0-9]{4}[ \-][0-9]{4}",
        _ALONE,
        r"(?:(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6(?:011|5\d\d|2\d\d)|35\d\d)",
        r"(?:(?P<s>[ \-])\d{4}(?P=s)\d{4}(?P=s)\d{4}|\d{12}(?:\d{3})?)",
        r"|3[47]\d\d(?:(?P<t>[ \-])\d{6}(?P=t)\d{5}|\d{11}))",
        _END,
    ),
    _rule(  # international numbers, (212) 456-7890, 212-456-7890, Chinese mobile numbers
        "<PHONE>",
        _phone,
        r"\+[1-9]|[0-9]{11}|[0-9]{3}-[0-9]{3,4}-[0-9]{4}|[0-9]\) ?[0-9]{3}-",
        r"(?<![\w.+\-/#&=)])(?:\+[1-9]\d{0,2}(?:[ \-]?\(\d{1,4}\))?(?:[ \-]\d{2,8}){1,4}|\+[1-9]\d{9,13}",
        r"|\([2-9]\d\d\) ?[2-9]\d\d-\d{4}|[2-9]\d\d-[2-9]\d\d-\d{4}|1[3-9]\d{9}|1[3-9]\d-\d{4}-\d{4})",
        r"(?![\w/]|-\w|[.,]\d)",
    ),
)
