"""Tasks that a teacher invents after the model of a few (Wang et al. 2023, "Self-Instruct").

In each round the teacher is asked several times for more tasks, each time shown a few of the seeds and of the tasks so
far. A task is kept where it can be asked of a language model and is not too much like any other. What a round asks
depends on the rounds before it and on the seed alone, so that a run that was killed asks the same again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danlu import console
from danlu.data.corpus import ErrorPolicy, find_sources
from danlu.data.labelled import objects
from danlu.data.prompts import Prompt, prompt_of
from danlu.errors import DanluError
from danlu.posttraining.synth.asking import Asker
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.filters import n_words
from danlu.posttraining.synth.jobs import Job, seed_of
from danlu.posttraining.synth.likeness import most_alike, words_of
from danlu.posttraining.synth.refusals import is_refusal

SHOWN_SEEDS, SHOWN_TASKS = 6, 2
"""Examples in a request: mostly people's, or the tasks would drift."""
WANTED = 8
"""Tasks that a request asks for."""
REQUESTS = 8
"""Requests of a round, which may be answered at the same time."""
IDLE_ROUNDS = 5
"""Rounds without a new task, after which there is no more to be had."""
MIN_WORDS, MAX_WORDS = 3, 150

REQUEST = """\
I am collecting tasks for an assistant that reads and writes text. Here are some of them:

{examples}

Write {wanted} more, numbered {first} to {last}. Each should be clear by itself, with all that is needed to do it, and \
be something that can be done in writing alone. Make them differ from the ones above and from each other: other \
topics, other kinds of work (explaining, rewriting, sorting, calculating, planning, writing code, ...), questions as \
well as commands. Give only the list."""

NUMBERED = re.compile(
    r"^[#>*_ \t-]*(?:(?:task|instruction|任务|指令)[ \t]*)?[(（]?(\d{1,4})[ \t]*(?:\*\*|__)?[ \t]*[.):：、．）-](?!\d)"
    r"[ \t]*(?:\*\*|__)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
SKIPPED = 2
"""Numbers that a teacher may have left out between one task and the next."""
LABEL = re.compile(r"^(?:task|instruction|任务|指令)[ \t]*[:：][ \t]*", re.IGNORECASE)
NEEDS_MORE = re.compile(
    r"\b(?:images?|pictures?|photos?|diagrams?|videos?|audio|screenshots?|attached|attachments?)\b"
    r"|图片|照片|图像|视频|音频|附件",
    re.IGNORECASE,
)


@dataclass
class Invention:
    """What came of asking.

    Attributes:
        dropped: reason -> how many tasks were left out.
    """

    tasks: list[Prompt] = field(default_factory=list)
    requests: int = 0
    parsed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def details(self) -> dict[str, Any]:
        """What the card holds of it."""
        return {
            "requests": self.requests, "tasks_parsed": self.parsed, "tasks_kept": len(self.tasks),
            "tasks_dropped": dict(sorted(self.dropped.items())),
        }  # fmt: skip


def read_seeds(path: Path, on_error: ErrorPolicy) -> list[str]:
    """The tasks of a file: what is asked in each row. ``instances`` as in the seeds of Self-Instruct give the input.

    Raises:
        DanluError: a broken row, or no task.
    """
    found: list[str] = []
    for source in find_sources([str(path)], (), (), on_error):
        for file in source.files:
            for row, where in objects(file, on_error):
                try:
                    prompt = prompt_of(_with_input(row), where)
                    if not prompt.messages or prompt.messages[-1]["role"] != "user":
                        raise DanluError(f"{where}: holds no task; expected what a user asks")
                except DanluError as error:
                    on_error(error)
                    continue
                found.append(prompt.messages[-1]["content"].strip())
    if not found:
        raise DanluError(f"{path}: holds no task to start from")
    return found


def _with_input(row: Any) -> dict[str, Any]:
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    given = first.get("input") if isinstance(first, dict) else None
    return {**row, "input": given} if given and not row.get("input") else dict(row)


def invent_tasks(seeds: Sequence[str], asker: Asker, config: SynthConfig) -> Invention:
    """Tasks like the seeds, as prompts; the seeds are not among them.

    Raises:
        DanluError: the teacher fails, or invents nothing.
    """
    made = Invention()
    known = [words_of(seed) for seed in seeds]
    idle = number = 0
    while len(made.tasks) < config.tasks and idle < IDLE_ROUNDS:
        jobs = [_request(seeds, made.tasks, config, number + i) for i in range(REQUESTS)]
        before = len(made.tasks)
        for i, answer in enumerate(asker.ask(jobs, f"inventing tasks ({before:,} of {config.tasks:,})")):
            made.requests += 1
            if answer is None:
                continue
            for k, task in enumerate(parse_tasks(answer.text, cut_off=answer.finish_reason == "length"), 1):
                made.parsed += 1
                why = unfit(task)
                words = words_of(task)
                if why is None and _is_known(words, known, config.similarity):
                    why = "similar"
                if why is not None:
                    made.dropped[why] += 1
                elif len(made.tasks) < config.tasks:
                    known.append(words)
                    where = f"self-instruct: request {number + i + 1}, task {k}"
                    made.tasks.append(Prompt([{"role": "user", "content": task}], {}, where))
                else:
                    made.dropped["surplus"] += 1
        number += REQUESTS
        idle = 0 if len(made.tasks) > before else idle + 1
    told = ", ".join(f"{name} {count}" for name, count in sorted(made.dropped.items())) or "none"
    if not made.tasks:
        raise DanluError(
            f"the teacher invents no tasks: {made.parsed} found in {made.requests} answers, left out: {told}; "
            "ask a more able teacher, or raise similarity"
        )
    if len(made.tasks) < config.tasks:
        console.warn(
            f"the teacher invents nothing new any more: {len(made.tasks):,} of {config.tasks:,} tasks; left out: {told}"
        )
    return made


def _is_known(words: Sequence[str], known: Sequence[Sequence[str]], similarity: float) -> bool:
    """Whether a task is like another, or is another with more behind it: weak teachers say an example again and answer
    it, which is so long that ROUGE-L is low."""
    begun = any(words[: len(other)] == other for other in known)
    return begun or most_alike(words, known, similarity) is not None


def _request(seeds: Sequence[str], tasks: Sequence[Prompt], config: SynthConfig, number: int) -> Job:
    rng = random.Random(f"{config.seed} {number}")
    own = rng.sample([str(task.messages[-1]["content"]) for task in tasks], min(SHOWN_TASKS, len(tasks)))
    shown = [*rng.sample(list(seeds), min(SHOWN_SEEDS + SHOWN_TASKS - len(own), len(seeds))), *own]
    rng.shuffle(shown)
    examples = "\n".join(f"{i}. {' '.join(task.split())}" for i, task in enumerate(shown, 1))
    first = len(shown) + 1
    content = REQUEST.format(examples=examples, wanted=WANTED, first=first, last=first + WANTED - 1)
    seed = seed_of(config.seed, "task", "", number)
    return Job([{"role": "user", "content": content}], seed, f"the request for tasks {number + 1}")


def parse_tasks(answer: str, *, cut_off: bool = False) -> list[str]:
    """The tasks of a numbered list, however it is dressed: ``1.``, ``(2)``, ``Task 3:``, ``**4.**``, ``- 5、``. A
    list within a task is part of it where its numbers do not go on those of the tasks. Without numbers there are none.

    Args:
        cut_off: the answer is not complete, and its last task is left out.
    """
    starts: list[tuple[int, int]] = []
    matches = list(NUMBERED.finditer(answer))
    all_alike = len({int(match[1]) for match in matches}) == 1  # "1." before each, as Markdown allows
    expected: int | None = None
    for match in matches:
        if expected is None or all_alike or expected <= int(match[1]) <= expected + SKIPPED:
            starts.append((match.start(), match.end()))
            expected = int(match[1]) + 1
    if not starts:
        return []
    ends = [start for start, _ in starts[1:]] + [len(answer)]
    found = [(begin, end) for (_, begin), end in zip(starts, ends, strict=True)]
    if cut_off:
        found = found[:-1]
    return [task for begin, end in found if (task := _undressed(answer[begin:end]))]


def _undressed(text: str) -> str:
    """Without marks of emphasis and quotes round it, and without a label."""
    text = re.sub(r"\s*(?:\n[ \t]*)+(?:---+|===+)?\s*\Z", "", text).strip()
    for mark in ("**", "__", '"', "“", "`"):
        closing = {"“": "”"}.get(mark, mark)
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(closing):
            inner = text[len(mark) : -len(closing)]
            text = inner.strip() if closing not in inner else text
    return LABEL.sub("", text.replace("**", "")).strip()


def unfit(task: str) -> str | None:
    """The name of the reason why a task is of no use; None where it is."""
    n = n_words(task)
    if n < MIN_WORDS:
        return "short"
    if n > MAX_WORDS:
        return "long"
    if NEEDS_MORE.search(task):
        return "needs_more_than_text"
    if is_refusal(task) is not None:
        return "refusal"
    return None
