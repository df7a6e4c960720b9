"""Answers that say no, in English and Chinese: a student that learns them refuses what its teacher could not do."""

from __future__ import annotations

import re

from danlu.posttraining.verifiers.base import without_thoughts

OPENING = 300
"""Characters in which a refusal shows."""

_CANNOT = (
    r"(?:can(?:no|['’])t|can not|won['’]t|will not|unable to|not able to|must decline to|have to decline to|refuse to)"
)
_DO = (
    r"(?:help|assist|answer|provide|comply|fulfil|fulfill|do (?:that|this)|discuss|engage|generate|create|write|"
    r"support|offer|access|complete|continue|give|share|perform)"
)
_SORRY = r"(?:i(?:['’]m| am)?\s+)?(?:(?:so|very|really|truly)\s+)?(?:sorry|afraid|(?:my )?apologi(?:[sz]e|es))"

PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # "I'm sorry, but I can't": not a letter that says sorry for something.
        rf"^\W*{_SORRY}\b[^.!?\n]{{0,60}}?\bi\s*(?:['’]m|am)?\s*(?:{_CANNOT}|do(?: not|n['’]t) have)",
        rf"^\W*(?:unfortunately,?\s+)?i\s*(?:['’]m|am)?\s*{_CANNOT}\s+(?:\w+\s+){{0,2}}?{_DO}\b",
        r"\bas an? (?:ai|artificial intelligence|large language model|language model)\b[^.\n]{0,60}?"
        rf"\bi\s*(?:['’]m|am)?\s*(?:{_CANNOT}|do(?: not|n['’]t)|not)\b",
        r"^\W*(?:很|非常|十分)?(?:抱歉|对不起|不好意思|遗憾)[^。！？\n]{0,30}?(?:无法|不能|不便|没有办法|没办法)",
        r"^\W*我(?:无法|不能|不便|没有办法|没办法)(?:为您|为你|给您|给你|向您|向你|直接|就此)?"
        r"(?:提供|回答|协助|帮助|满足|完成|讨论|生成|参与|执行)",
        r"作为(?:一个|一名|一款)?(?:AI|人工智能|大型?语言模型|语言模型)[^。！？\n]{0,30}?(?:无法|不能|没有|不会|不便)",
    )
)


def is_refusal(text: str) -> str | None:
    """The words of an answer that says no; None for one that does what it was asked. Thoughts do not count."""
    opening = without_thoughts(text).strip()[:OPENING]
    found = next((match for pattern in PATTERNS if (match := pattern.search(opening))), None)
    return None if found is None else f"says {found[0].strip()[:100]!r}"
