"""The one kind of error a user sees: what was wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence


class DanluError(Exception):
    """Something the user can mend. The command line prints the message alone and exits with code 2.

    Write messages as ``WHERE: WHAT; HOW TO MEND``, for example
    ``train.jsonl:17: field "messages" is missing; expected chat or text rows``.
    """


class Problems(DanluError):
    """Several problems found in one pass, reported together."""

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.title = title
        self.problems = list(problems)
        super().__init__(title + "".join(f"\n  - {problem}" for problem in self.problems))


class MissingExtra(DanluError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: pip install 'danlu[{extra}]'")
