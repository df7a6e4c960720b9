"""Masking of personal data and secrets: what looks like one *and* passes its check digits is replaced with a tag such as ``<EMAIL>``.

Precision comes first, since a wrong mask damages a corpus on every page: numbers need their check digits (Luhn, ISO 7064, mod 97),
valid dates or the separators people write, addresses a real top-level domain, secrets a known prefix. Addresses and numbers that
are reserved for documentation (RFC 2606 `example.com`, 555-01xx) are nobody's and stay.
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
    hint: re.Pattern[str] | None = None


def mask(text: str, is_code: bool = False) -> str:
    """``text`` with personal data and secrets replaced by tags. In code, bare digits count only inside quotes."""
    for rule in RULES:
        if rule.hint is not None and not rule.hint.search(text):
            continue
        tag, check = rule.tag, rule.check
        text = rule.pattern.sub(lambda m, tag=tag, check=check: _masked(m, tag) if check(m, is_code) else m[0], text)  # type: ignore[misc]
    return text


def _masked(match: re.Match[str], tag: str) -> str:
    """The match with its group ``secret`` (or all of it) replaced."""
    if "secret" not in match.re.groupindex:
        return tag
    start, end = match.span("secret")
    return match[0][: start - match.start()] + tag + match[0][end - match.start() :]


# --- check digits -----------------------------------------------------------------------------------------------------------


def luhn_valid(digits: str) -> bool:
    """Luhn check (ISO/IEC 7812) of a card number given as digits."""
    total = 0
    for position, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + position % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def resident_id_valid(number: str) -> bool:
    """Chinese resident identity number (GB 11643): 17 digits with a birth date and an ISO 7064 MOD 11-2 check character."""
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
    """US social security number AAA-GG-SSSS: no check digit, but blocks that were never given out, and two used in adverts."""
    area, group, serial = number.split("-")
    given_out = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return given_out and number not in ("078-05-1120", "219-09-9999")


# --- rules ------------------------------------------------------------------------------------------------------------------

_IBAN_LENGTH = dict(
    AD=24, AE=23, AL=28, AT=20, AZ=28, BA=20, BE=16, BG=22, BH=22, BR=29, BY=28, CH=21, CR=22, CY=28, CZ=24, DE=22, DK=18,
    DO=28, EE=20, EG=29, ES=24, FI=18, FO=18, FR=27, GB=22, GE=22, GI=23, GL=18, GR=27, GT=28, HR=21, HU=28, IE=22, IL=23,
    IQ=23, IS=26, IT=27, JO=30, KW=30, KZ=20, LB=28, LI=21, LT=20, LU=20, LV=21, MC=27, MD=24, ME=22, MK=19, MR=27, MT=31,
    MU=30, NL=18, NO=15, PK=24, PL=28, PS=29, PT=25, QA=29, RO=24, RS=22, SA=24, SE=24, SI=19, SK=24, SM=27, TN=24, TR=26,
    UA=29, VA=22, VG=24, XK=20,
)  # fmt: skip

_GENERIC_TLDS = """
    academy agency ai app art biz blog bot center chat club cloud co codes com company computer consulting design dev digital
    edu education email engineering expert foundation fun games gmbh gov group guru health host info ink institute int international io
    jobs land law life link live llc ltd market media mil mobi museum name net network news ngo online org page photo pro
    science services shop site social software solutions space store studio support systems team tech technology tel today tools
    top travel university vip website wiki work works world xyz zone
"""
_TLDS = frozenset(_GENERIC_TLDS.split())
_COUNTRY_TLDS = frozenset(
    """
    ac ad ae af ag al am ao ar as at au aw az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc cd cf cg ch ci ck cl
    cm cn cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gb gd ge gf gg gh gi gl gm gn gp gq gr
    gt gu gw gy hk hm hn hr ht hu id ie il im in iq ir is it je jm jo jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls
    lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf
    pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf
    tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw
    """.split()
)
_RESERVED = re.compile(
    r"(?:^|[.@])(?:example(?:\.(?:com|net|org|edu|co\.\w\w))?|test|invalid|localhost|local|localdomain|(?:example|domain|server|host"
    r"|foo|bar|spam|yourdomain|mydomain)\.(?:com|net|org))$",
    re.IGNORECASE,
)
_ROLE = re.compile(r"git|hg|svn|user|username|no-?reply|do-?not-?reply", re.IGNORECASE)


def _email(match: re.Match[str], is_code: bool) -> bool:
    user, _, domain = match[0].rpartition("@")
    top = domain.rpartition(".")[2].lower()
    if top not in _TLDS and top not in _COUNTRY_TLDS and not top.startswith("xn--"):
        return False  # a file name, a version, the matrix product a@b.T
    if _RESERVED.search("@" + domain) or _ROLE.fullmatch(user):
        return False
    after = match.string[match.end() : match.end() + 1]
    return not (is_code and after in ("(", "[", "_"))


def _phone(match: re.Match[str], is_code: bool) -> bool:
    digits = re.sub(r"\D", "", match[0])
    if match[0].startswith("+"):
        return 9 <= len(digits) <= 15 and digits[0] != "0"
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
    """A quoted value of a variable called like a secret: mixed letters and digits of high entropy, no words, no place-holder."""
    value = match["secret"]
    if not (re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)) or re.search(
        r"example|xxxx|your|test|dummy|1234", value, re.I
    ):
        return False
    counts = Counter(value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return entropy > 3.5 if not re.fullmatch(r"[0-9a-fA-F]+", value) else entropy > 3.0


def _always(match: re.Match[str], is_code: bool) -> bool:
    return True


# A number is not the piece of a longer number, of a name, of a decimal, of a version or of a hash.
_ALONE, _END = r"(?<![\w.+\-/#&=])", r"(?![\w\-/]|[.,]\d)"

RULES: tuple[Rule, ...] = (
    Rule(
        "<PRIVATE_KEY>",
        re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{64,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
        _always,
        re.compile("PRIVATE KEY"),
    ),
    Rule(
        "<API_KEY>",
        re.compile(
            r"(?<![\w\-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
            r"|gh[pousr]_[0-9A-Za-z]{36,255}|github_pat_[0-9A-Za-z_]{60,255}|glpat-[\w\-]{20,}"  # GitHub, GitLab
            r"|sk-(?:proj-|ant-|or-|svcacct-)?(?=[\w\-]*\d)[A-Za-z0-9_\-]{32,}"  # OpenAI and those who took up its prefix
            r"|[rs]k_live_[0-9A-Za-z]{20,}|xox[abprs]-[0-9A-Za-z\-]{10,}"  # Stripe, Slack
            r"|AIza[0-9A-Za-z_\-]{35}|hf_[A-Za-z]{34}|npm_[A-Za-z0-9]{36}|pypi-AgEI[\w\-]{50,}"  # Google, Hugging Face, npm, PyPI
            r"|eyJ[\w\-]{10,}\.eyJ[\w\-]{10,}\.[\w\-]{20,})(?![\w\-])",  # JSON web tokens
            re.ASCII,
        ),
        _always,
        re.compile(r"AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|sk-|k_live_|xox|AIza|hf_|npm_|pypi-|eyJ"),
    ),
    Rule(
        "<SECRET>",
        re.compile(
            r"(?i)(?:api|access|auth|secret|private|client)[_-]?(?:key|token|secret)[\"']?\s*[:=]\s*[\"'](?P<secret>[\w+/=\-.]{20,200})[\"']",
            re.ASCII,
        ),
        _secret_value,
        re.compile(r"[:=]\s{0,9}[\"'][\w+/=\-.]{20}", re.ASCII),
    ),
    Rule(
        "<EMAIL>",
        re.compile(
            r"(?<![\w.+%@/\-])[A-Za-z0-9](?:[\w.+%\-]{0,62}[\w+%\-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}"
            r"[A-Za-z][A-Za-z0-9\-]{1,23}(?![\w@])",
            re.ASCII,
        ),
        _email,
        re.compile(r"[\w+%\-]@[A-Za-z0-9]", re.ASCII),
    ),
    Rule(
        "<IBAN>",
        re.compile(r"(?<![\w\-])[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,4})?)(?![\w\-])", re.ASCII),
        lambda m, is_code: iban_valid(m[0]),
        re.compile(r"[A-Z][A-Z]\d\d[ A-Z0-9]{5}", re.ASCII),
    ),
    Rule("<ID_NUMBER>", re.compile(_ALONE + r"[1-9]\d{16}[\dXx]" + _END, re.ASCII), _resident_id, re.compile("[0-9]{17}")),
    Rule("<ID_NUMBER>", re.compile(_ALONE + r"\d{3}-\d{2}-\d{4}" + _END, re.ASCII), lambda m, is_code: ssn_valid(m[0]), re.compile("[0-9]-[0-9]{2}-[0-9]{4}")),
    Rule(
        "<CARD_NUMBER>",  # Visa, Mastercard, American Express, Discover, JCB, UnionPay; bare or in the groups printed on the card
        re.compile(
            _ALONE + r"(?:(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6(?:011|5\d\d|2\d\d)|35\d\d)(?:(?P<s>[ \-])\d{4}(?P=s)\d{4}(?P=s)\d{4}|\d{12}(?:\d{3})?)"
            r"|3[47]\d\d(?:(?P<t>[ \-])\d{6}(?P=t)\d{5}|\d{11}))" + _END,
            re.ASCII,
        ),
        _card,
        re.compile(r"[0-9]{13}|[0-9]{4}[ \-][0-9]{4}"),
    ),
    Rule(
        "<PHONE>",  # +CC..., (212) 456-7890, 212-456-7890, Chinese mobile numbers
        re.compile(
            r"(?<![\w.+\-/#&=)])(?:\+[1-9]\d{0,2}(?:[ \-]?\(\d{1,4}\))?(?:[ \-]\d{2,4}){2,4}|\+[1-9]\d{9,13}"
            r"|\([2-9]\d\d\) ?[2-9]\d\d-\d{4}|[2-9]\d\d-[2-9]\d\d-\d{4}|1[3-9]\d{9}|1[3-9]\d-\d{4}-\d{4})(?![\w/]|-\w|[.,]\d)",
            re.ASCII,
        ),
        _phone,
        re.compile(r"\+[1-9]|[0-9]{11}|[0-9]{3}-[0-9]{3,4}-[0-9]{4}|[0-9]\) ?[0-9]{3}-"),
    ),
)  # fmt: skip
