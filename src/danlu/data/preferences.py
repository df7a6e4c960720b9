"""Preference rows: a prompt with answers, and which of them are better.

    pair       {"prompt": "...", "chosen": "...", "rejected": "..."}             TRL, UltraFeedback, Orca
               {"chosen": [messages], "rejected": [messages]}                    TRL: what both begin with is the prompt
               {"chosen": "\\n\\nHuman: ...", "rejected": "\\n\\nHuman: ..."}        Anthropic's HH-RLHF
               {"conversations": [...], "chosen": {...}, "rejected": {...}}      ShareGPT
               {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}     OpenAI
    ranking    {"prompt": "...", "answers": [...], "ranks": [1, 2, 2]}, or "scores", of which more is better; each
               answer can carry its own: {"content": "...", "score": 7.5}
    unpaired   {"prompt": "...", "completion": "...", "label": true}, or {"messages": [...], "label": true}

A prompt may be one of the fields that `prompts.py` knows, and answers may be texts, messages, or whole conversations
that begin with the prompt. Prompts and answers that are texts become the turns of a chat, as in `chat_rows.py`; only
where the prompt is what two texts begin with, all stays text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from danlu.data.chat_rows import ROLES, chat_messages
from danlu.data.corpus import ErrorPolicy, SourceFile
from danlu.data.labelled import Columns, objects, read_split
from danlu.data.prompts import QUESTIONS, prompt_of
from danlu.errors import DanluError

Messages = list[dict[str, Any]]
Kind = Literal["pair", "ranking", "unpaired"]

ANSWERS = ("answers", "responses", "completions", "outputs")
ANSWER = ("completion", "response", "answer", "output")
LABELS = {**dict.fromkeys(("true", "1", "1.0", "good"), True), **dict.fromkeys(("false", "0", "0.0", "bad"), False)}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt with answers.

    Attributes:
        kind: of a pair, ``answers`` are the chosen and the rejected one; of a ranking, all of them, best first;
            unpaired, a single one.
        prompt: messages up to the answer; or a text, which the answers go on with.
        answers: messages, the first of them the assistant's; or texts.
        ranks: of each answer, from 0 for the best; answers of one rank are not compared.
        desirable: of an unpaired answer, whether it is good.
        margin: by how much the chosen answer is better, where the row tells.
        tools: what the model may call, for the chat template.
        where: file and line, for errors.
    """

    kind: Kind
    prompt: Messages | str
    answers: tuple[Messages | str, ...]
    where: str
    ranks: tuple[int, ...] = ()
    desirable: bool = True
    margin: float | None = None
    tools: list[Any] | None = None

    @property
    def key(self) -> str:
        """What decides whether it is held out: all rows of a prompt fall on one side."""
        return self.prompt if isinstance(self.prompt, str) else json.dumps(self.prompt, sort_keys=True)


def read_preferences(
    path: Path, heldout: Path | None = None, *, share: float = 0.1, on_error: Literal["stop", "skip"] = "stop"
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """Rows to learn from and rows held out, of JSON Lines, JSON, CSV, TSV or Parquet files (compressed or not).

    Args:
        path: a file, a folder or a glob; files in it named test, dev or validation are held out.
        heldout: a file of held-out rows.
        share: of the rows that is held out otherwise, by a hash of the prompt.
        on_error: ``stop`` at the first broken row, or ``skip`` broken rows and tell how many there were.

    Raises:
        DanluError: a row is broken, with file and line; no row can be used.
    """
    return read_split(preference_rows, path, heldout, Columns(), share=share, on_error=on_error)


def preference_rows(file: SourceFile, columns: Columns, on_error: ErrorPolicy) -> Iterator[PreferenceRow]:
    """The preference rows of one file."""
    for row, where in objects(file, on_error):
        try:
            found = preference_of(row, where)
        except DanluError as error:
            on_error(error)
            continue
        yield found


def preference_of(row: Mapping[str, Any], where: str) -> PreferenceRow:
    """A row in one form.

    Raises:
        DanluError: it is no preference row, an answer is empty, two are the same, or prompt and answers do not fit.
    """
    for names, read in _FORMATS:
        if all(row.get(name) is not None for name in names):
            return read(row, where)
    raise DanluError(
        f"{where}: has the fields {', '.join(map(str, row))}; expected prompt, chosen, rejected; or prompt, answers "
        "and ranks or scores; or prompt, completion, label"
    )


# ---- the kinds of rows


def _openai(row: Mapping[str, Any], where: str) -> PreferenceRow:
    given = row["input"]
    if not isinstance(given, Mapping) or not isinstance(given.get("messages"), list):
        raise DanluError(f"{where}: field 'input' must be an object with messages")
    inner = {"prompt": given["messages"], "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return _pair({**inner, "tools": given.get("tools")}, where)


def _pair(row: Mapping[str, Any], where: str) -> PreferenceRow:
    prompt, answers = _prompt_and_answers(row, {"chosen": row["chosen"], "rejected": row["rejected"]}, where)
    return PreferenceRow("pair", prompt, answers, where, (0, 1), margin=_margin(row, where), tools=_tools(row, where))


def _ranking(name: str) -> Callable[[Mapping[str, Any], str], PreferenceRow]:
    def read(row: Mapping[str, Any], where: str) -> PreferenceRow:
        given = row[name]
        if not isinstance(given, list) or len(given) < 2:
            raise DanluError(f"{where}: field {name!r} must be a list of at least two answers")
        answers, levels = _leveled(row, given, name, where)
        prompt, found = _prompt_and_answers(row, {f"{name} {i}": a for i, a in enumerate(answers, start=1)}, where)
        order = sorted(range(len(found)), key=lambda i: levels[i])
        distinct = sorted(set(levels))
        if len(distinct) == 1:
            raise DanluError(f"{where}: all answers have one rank; there is nothing to learn")
        ranks = tuple(distinct.index(levels[i]) for i in order)
        return PreferenceRow("ranking", prompt, tuple(found[i] for i in order), where, ranks, tools=_tools(row, where))

    return read


def _unpaired(name: str) -> Callable[[Mapping[str, Any], str], PreferenceRow]:
    def read(row: Mapping[str, Any], where: str) -> PreferenceRow:
        desirable = LABELS.get(str(row["label"]).strip().lower())
        if desirable is None:
            raise DanluError(f"{where}: label {row['label']!r} says neither good nor bad; expected true or false")
        if name == "messages":
            messages = chat_messages(row, where) or []
            if messages[-1]["role"] != "assistant":
                raise DanluError(f"{where}: the last message is not the assistant's; there is no answer to judge")
            asked: Messages | str
            asked, answers = _shared([messages], where)
        else:
            asked, answers = _prompt_and_answers(row, {name: row[name]}, where)
        return PreferenceRow("unpaired", asked, answers, where, desirable=desirable, tools=_tools(row, where))

    return read


# In this order: a row with both answers and a label is a pair.
_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], PreferenceRow]], ...] = (
    (("input", "preferred_output", "non_preferred_output"), _openai),
    (("chosen", "rejected"), _pair),
    *(((name, "ranks"), _ranking(name)) for name in ANSWERS),
    *(((name, "scores"), _ranking(name)) for name in ANSWERS),
    *(((name,), _ranking(name)) for name in ANSWERS),
    *(((name, "label"), _unpaired(name)) for name in (*ANSWER, "messages")),
)


def _leveled(row: Mapping[str, Any], given: list[Any], name: str, where: str) -> tuple[list[Any], list[float]]:
    """Answers, and a number for each that is the lower the better it is."""
    for field, sign in (("ranks", 1), ("scores", -1)):
        if row.get(field) is not None:
            numbers = row[field]
            if not isinstance(numbers, list) or len(numbers) != len(given):
                raise DanluError(
                    f"{where}: field {field!r} must be a list of {len(given)} numbers, one for each answer"
                )
            return given, [sign * _number(number, field, where) for number in numbers]
    answers, levels = [], []
    for number, item in enumerate(given, start=1):
        own = [key for key in ("rank", "score") if isinstance(item, Mapping) and item.get(key) is not None]
        if not own:
            raise DanluError(f"{where}: {name} {number} has no rank or score; give the row ranks or scores")
        text = next((item[k] for k in ("content", "text", *ANSWER) if item.get(k) is not None), None)
        if text is None:
            raise DanluError(f"{where}: {name} {number} has no text; expected the field 'content'")
        answers.append(text)
        levels.append((1 if own[0] == "rank" else -1) * _number(item[own[0]], own[0], where))
    if len({item.get("rank") is None for item in given}) > 1:
        raise DanluError(f"{where}: some answers have a rank and some a score; give all the same")
    return answers, levels


def _margin(row: Mapping[str, Any], where: str) -> float | None:
    if row.get("margin") is not None:
        return _number(row["margin"], "margin", where)
    for better, worse in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.get(better) is not None and row.get(worse) is not None:
            return _number(row[better], better, where) - _number(row[worse], worse, where)
    return None


def _number(value: Any, field: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DanluError(f"{where}: field {field!r}: {value!r} is not a finite number")
    return number


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DanluError(f"{where}: field 'tools' must be a list of functions")
    return tools or None


# ---- prompt and answers


def _prompt_and_answers(
    row: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Messages | str, tuple[Messages | str, ...]]:
    """The prompt, and each answer without it, checked."""
    answers = [_answer(value, name, where) for name, value in given.items()]
    names = list(given)
    for i, answer in enumerate(answers):
        if answer in answers[:i]:
            first = names[answers.index(answer)]
            raise DanluError(f"{where}: {first} and {names[i]} are the same; there is nothing to prefer")
    texts = [answer for answer in answers if isinstance(answer, str)]
    if texts and len(texts) < len(answers):
        raise DanluError(f"{where}: some answers are text and some are messages; give all the same")
    has_prompt = any(row.get(name) is not None for name in (*QUESTIONS, "messages", "conversations"))
    if texts and not has_prompt:
        if all(_TURN.match(text) for text in texts):
            return _shared([_turns(text, where) for text in texts], where)
        return _shared_text(texts, where)
    conversations: list[Messages] = [
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers
    ]
    whole = [_opens(messages) for messages in conversations]
    if any(whole):
        if not all(whole):
            raise DanluError(f"{where}: some answers are whole conversations and some are not; give all the same")
        shared, rests = _shared([_checked(messages, where) for messages in conversations], where)
        if has_prompt:
            _check_same(prompt_of(row, where).messages, shared, where)
        return shared, rests
    if not has_prompt:
        raise DanluError(f"{where}: has no prompt; expected one of the fields {', '.join(QUESTIONS)}")
    prompt = prompt_of(row, where).messages
    if prompt[-1]["role"] == "assistant":
        raise DanluError(f"{where}: the prompt ends with the assistant's message; an answer has to follow the user's")
    found = [_checked([*prompt, *messages], where) for messages in conversations]
    return found[0][: len(prompt)], tuple(messages[len(prompt) :] for messages in found)


def _answer(value: Any, name: str, where: str) -> str | Messages:
    """An answer as text or messages; of one message, an object will do."""
    if isinstance(value, str):
        if not value.strip():
            raise DanluError(f"{where}: {name} is empty")
        return value
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DanluError(f"{where}: {name} is neither text nor messages, or empty")
    if any("from" in turn for turn in turns):
        turns = [{"role": turn.get("from", turn.get("role")), "content": turn.get("value")} for turn in turns]
    return [dict(turn) for turn in turns]


def _opens(messages: Messages) -> bool:
    return ROLES.get(str(messages[0].get("role"))) in ("system", "user")


def _checked(messages: Messages, where: str) -> Messages:
    return chat_messages({"messages": messages}, where) or []


def _shared(conversations: Sequence[Messages], where: str) -> tuple[Messages, tuple[Messages | str, ...]]:
    """What conversations begin with, up to the assistant's turn in which they part; and what follows in each."""
    if len(conversations) == 1:
        n = len(conversations[0]) - 1
    else:
        n = 0
        while all(len(c) > n and c[n] == conversations[0][n] for c in conversations):
            n += 1
    rests = [conversation[n:] for conversation in conversations]
    for number, rest in enumerate(rests, start=1):
        if not rest:
            raise DanluError(
                f"{where}: conversation {number} ends where another goes on; there is no answer to compare"
            )
        if rest[0]["role"] != "assistant":
            raise DanluError(
                f"{where}: the prompts differ: the conversations part at message {n + 1}, not the assistant's"
            )
    return conversations[0][:n], tuple(rests)


def _shared_text(texts: Sequence[str], where: str) -> tuple[str, tuple[Messages | str, ...]]:
    """What texts begin with, up to white space, where tokens end; and what follows in each."""
    first, last = min(texts), max(texts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    while n and not texts[0][n - 1 : n].isspace():
        n -= 1
    while n and texts[0][n - 1].isspace():  # it belongs to the word behind it
        n -= 1
    rests = tuple(text[n:] for text in texts)
    if len(texts) < 2 or not n or not all(rest.strip() for rest in rests):
        raise DanluError(f"{where}: has no prompt, and the answers do not begin with one; expected the field 'prompt'")
    return texts[0][:n], rests


def _turns(text: str, where: str) -> Messages:
    parts = _TURN.split(text)  # "", speaker, what it says, speaker, ...
    spoken = zip(parts[1::2], parts[2::2], strict=True)
    return _checked([{"role": _SPEAKERS[who], "content": content.strip()} for who, content in spoken], where)


def _check_same(prompt: Messages, shared: Messages, where: str) -> None:
    """A prompt that is given besides must be that of the conversations; UltraFeedback has their first turn only."""
    if prompt != shared[: len(prompt)] and prompt[-1] not in shared:
        raise DanluError(f"{where}: the prompt is not what the conversations begin with")
