"""What danlu says while it works: progress and remarks on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out() -> Console:
    """The console for results (stdout)."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def err() -> Console:
    """The console for progress, remarks and errors (stderr)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line about what is going on."""
    err().print(text, markup=False)


def warn(text: str) -> None:
    """Something went on in another way than asked; the user should know."""
    err().print(f"warning: {text}", style="yellow", markup=False)


@contextlib.contextmanager
def progress(description: str, total: float | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields ``advance(amount=1, text="")``, where ``text`` is shown behind the bar.

    Without a terminal only the start and the end are printed, so that log files stay readable.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f}" + (f" {unit}" if unit else "")),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    console = err()
    if not console.is_terminal:
        done = 0.0

        def count(amount: float = 1, text: str = "") -> None:
            nonlocal done
            done += amount

        yield count
        console.print(f"{description}: {done:,.0f} {unit}".rstrip(), markup=False)
        return
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(description, total=total, text="")

        def advance(amount: float = 1, text: str = "") -> None:
            bar.update(task, advance=amount, **({"text": text} if text else {}))  # type: ignore[arg-type]

        yield advance
