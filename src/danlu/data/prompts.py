"""Prompts to be answered and judged: what reinforcement learning, best-of-n and teachers begin with.

    prompt             {"prompt": "..."} or {"prompt": [messages]}       and any fields for who judges the answer
    question, problem, instruction (with input)                          the same, by their usual names
    messages, ...      a chat row as in `chat_rows.py`: its last answer is taken off and kept as the field "answer"
    text               {"text": "def f("}                                no chat: a text to go on with

All fields of a row are kept: an expected answer, tests, a schema are what verifiers look at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from danlu import console
from danlu.data.chat_rows import chat_messages
from danlu.data.corpus import ErrorPolicy, SourceFile
from danlu.data.epochs import EpochStream, shuffled
from danlu.data.folder import DataFolder, Split
from danlu.data.labelled import Columns, objects, read_split
from danlu.errors import DanluError
from danlu.formats.card import CARD
from danlu.tokenizer.tokenizer import Tokenizer

QUESTIONS = ("prompt", "question", "problem", "instruction", "query")
"""Fields that hold what is asked, by their usual names; the first that is there counts."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: ``messages`` up to the answer, or a ``text`` to go on with.

    Attributes:
        row: all fields, for who judges the answer.
        where: file and line, for errors.
        ids: the tokens, once :func:`read_prompts` has made them.
    """

    messages: list[dict[str, Any]]
    row: Mapping[str, Any]
    where: str
    text: str | None = None
    ids: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What decides whether it is held out."""
        return self.text if self.text is not None else json.dumps(self.messages, sort_keys=True, ensure_ascii=False)


def prompt_of(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of a row.

    Raises:
        DanluError: there is none, or it is empty.
    """
    if row.get("messages") is not None or row.get("conversations") is not None:
        messages = chat_messages(row, where, answered=False) or []
        return _before_the_answer(messages, row, where)
    for name in QUESTIONS:
        asked = row.get(name)
        if asked is None:
            continue
        if isinstance(asked, list):
            return Prompt(chat_messages({"messages": asked}, where, answered=False) or [], row, where)
        if not isinstance(asked, str) or not asked.strip():
            raise DanluError(f"{where}: field {name!r} is no text, or empty; expected what the model is asked")
        given = row.get("input") if name == "instruction" else None
        content = f"{asked}\n\n{given}" if isinstance(given, str) and given.strip() else asked
        system = row.get("system")
        before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
        return Prompt([*before, {"role": "user", "content": content}], row, where)
    text = row.get("text")
    if isinstance(text, str) and text:
        return Prompt([], row, where, text)
    raise DanluError(f"{where}: has no prompt; expected one of the fields {', '.join(QUESTIONS)}, messages, text")


def _before_the_answer(messages: list[dict[str, Any]], row: Mapping[str, Any], where: str) -> Prompt:
    if messages[-1]["role"] != "assistant":
        return Prompt(messages, row, where)
    return Prompt(messages[:-1], {"answer": messages[-1]["content"], **row}, where)


def prompt_rows(file: SourceFile, columns: Columns, on_error: ErrorPolicy) -> Iterator[Prompt]:
    """The prompts of one file."""
    for row, where in objects(file, on_error):
        try:
            yield prompt_of(row, where)
        except DanluError as error:
            on_error(error)


def split_prompts(
    path: Path,
    *,
    heldout: Path | None = None,
    share: float = 0.1,
    on_error: Literal["stop", "skip"] = "stop",
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and prompts held out, as :func:`read_prompts` has them, without their tokens. With a
    share of 0 a data folder may have none held out."""
    if (path / CARD).exists() and heldout is None:
        wanted = DataFolder(path).splits() if share == 0 else ["train", "heldout"]
        splits: tuple[Split, Split] = ("train", "heldout")
        train, held_out = (list(_of_folder(path, split)) if split in wanted else [] for split in splits)
        return train, held_out
    return read_split(prompt_rows, path, heldout, Columns(), share=share, on_error=on_error)


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    longest: int,
    heldout: Path | None = None,
    share: float = 0.1,
    on_error: Literal["stop", "skip"] = "stop",
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from and prompts held out, with their tokens; those longer than ``longest`` tokens are left out
    and counted.

    Args:
        path: a file, a folder, a glob, or a data folder, whose own held-out rows are taken.
        heldout: a file of held-out prompts.
        share: of the prompts that is held out otherwise, by a hash.

    Raises:
        DanluError: a broken row, with file and line; no prompt that can be used.
    """
    train, held_out = split_prompts(path, heldout=heldout, share=share, on_error=on_error)
    n_rows = len(train) + len(held_out)
    train, held_out = ([_with_ids(one, tokenizer) for one in part] for part in (train, held_out))
    train, held_out = ([one for one in part if len(one.ids) <= longest] for part in (train, held_out))
    if n_long := n_rows - len(train) - len(held_out):
        console.warn(f"{path}: {n_long:,} of {n_rows:,} prompts are longer than {longest} tokens and left out")
    if not train:
        raise DanluError(f"{path}: no prompt is left to learn from; raise the longest prompt (now {longest} tokens)")
    return train, held_out


def _of_folder(path: Path, split: Split) -> Iterator[Prompt]:
    for document in DataFolder(path).documents(split):
        where = f"{path}: {document.path or document.id}"
        if document.kind == "chat":
            yield _before_the_answer(document.messages(), {**document.meta}, where)
        else:
            yield Prompt([], {**document.meta}, where, document.text)


def _with_ids(prompt: Prompt, tokenizer: Tokenizer) -> Prompt:
    if prompt.text is not None:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt.text)]
    else:
        try:
            ids = tokenizer.encode_chat(prompt.messages, add_generation_prompt=True)
        except DanluError as error:
            raise DanluError(f"{prompt.where}: {error}") from error
    return Prompt(prompt.messages, prompt.row, prompt.where, prompt.text, ids)


class PromptOrder(EpochStream[int]):
    """Endless indexes of prompts over epochs, each epoch shuffled anew.

    Args:
        difficulties: of the prompts: the first epoch goes from the easy to the hard, in tenths that are shuffled
            (curriculum learning: Bengio et al. 2009).
    """

    def __init__(self, n: int, seed: int, difficulties: Sequence[float] | None = None) -> None:
        self.n, self.seed, self.difficulties = n, seed, difficulties
        super().__init__()

    def order(self, epoch: int) -> list[int]:
        found = shuffled(self.n, self.seed, epoch)
        if epoch > 0 or self.difficulties is None:
            return found
        ranks = np.argsort(np.argsort(np.asarray(self.difficulties), kind="stable"), kind="stable")
        return sorted(found, key=lambda i: int(ranks[i]) * 10 // self.n)
