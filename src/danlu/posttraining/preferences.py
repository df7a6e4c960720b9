"""Judged answers as what a model learns from: their tokens, in groups of those that are compared, as a stream of
batches.

A group is one row of the training loop, whole in every micro-batch: the chosen and the rejected answer of a pair, the
answers of a ranking, or a single judged one. Nothing is padded: a micro-batch is packed when it is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from danlu import console
from danlu.data.corpus import ErrorPolicy
from danlu.data.epochs import EpochStream, shuffled
from danlu.data.packed_examples import Example, PackedExamples, n_tokens, pack_examples
from danlu.data.preferences import Messages, PreferenceRow, read_preferences
from danlu.errors import DanluError
from danlu.posttraining.config import JudgedConfig
from danlu.tokenizer.tokenizer import Tokenizer

BATCH_SIZE = 16
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, each with the prompt.

    Attributes:
        examples: best first; the tokens of the answers are targets.
        ranks: of each answer, from 0; answers of one rank are not compared. Empty for a single one.
        desirable: of a single one, whether it is good.
        margin: by how much the chosen answer of a pair is better.
        where: file and line.
    """

    examples: tuple[Example, ...]
    ranks: tuple[int, ...]
    desirable: bool
    margin: float | None
    where: str

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(len(ids) - 1 for ids, _ in self.examples)


@dataclass(frozen=True)
class Judged:
    """Groups to learn from and groups held out."""

    train: list[Group]
    held_out: list[Group]


def encode_answer(
    tokenizer: Tokenizer,
    prompt: Messages | str,
    answer: Messages | str,
    tools: list[Any] | None = None,
    *,
    apart: bool = False,
) -> Example:
    """Tokens of a prompt with its answer, and which of them the model is to write.

    A chat is what the template makes of it; a text begins with BOS where the family has one there. The answer ends with
    a stop token, which is a target too, whatever pads rows.

    Args:
        prompt, answer: both messages, or both texts.
        apart: the tokens of two texts are made apart, as a model that answers a prompt makes them.

    Raises:
        DanluError: the tokens of the prompt are not a prefix of those of prompt and answer.
    """
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        before = [tokenizer.bos_id] if tokenizer.add_bos else []
        asked = [*before, *tokenizer.encode(prompt)]
        together = [*asked, *tokenizer.encode(answer)] if apart else [*before, *tokenizer.encode(prompt + answer)]
        ids, mask = together, [False] * len(asked)
    else:
        assert not isinstance(answer, str)
        asked = tokenizer.encode_chat(prompt, add_generation_prompt=True, tools=tools)
        if len(answer) == 1:
            ids, mask = tokenizer.encode_chat([*prompt, *answer], tools=tools), [False] * len(asked)
        else:  # between the assistant's turns others speak
            ids, mask = tokenizer.encode_chat_with_mask([*prompt, *answer], tools=tools)
            mask[: len(asked)] = [False] * len(asked)
            end_of_last = len(mask) - mask[::-1].index(True)
            ids, mask = ids[:end_of_last], mask[:end_of_last]
    if ids[: len(asked)] != asked:
        raise DanluError(
            "the tokens of the prompt are not a prefix of the tokens of prompt and answer; let the answer begin where "
            "a token begins (with a space, say), or mend the chat template"
        )
    if len(mask) < len(ids):
        end = next((i + 1 for i in range(len(ids) - 1, len(asked) - 1, -1) if ids[i] in tokenizer.stop_ids), None)
        if end is None:
            ids, end = [*ids, tokenizer.eos_id], len(ids) + 1
        mask += [True] * (end - len(asked))
    # What a template writes behind the end of the answer is not the model's, and no part of what is judged.
    return ids[: len(mask)], mask


def read_groups(
    config: JudgedConfig,
    tokenizer: Tokenizer,
    kind: Literal["pairs", "rankings", "singles"],
    *,
    with_margins: bool = False,
) -> Judged:
    """The rows of a run with their tokens.

    Args:
        kind: ``pairs``: rankings become all the pairs in them; ``rankings`` stay whole; ``singles``: pairs and rankings
            are taken apart, and the best answers of each count as good, the others as bad.
        with_margins: every row must be a pair with a margin.

    Raises:
        DanluError: a row that cannot be used, where that is not to be skipped; or none that can.
    """
    share = HELDOUT_SHARE if config.heldout_share is None else config.heldout_share
    train, held_out = read_preferences(config.data, config.heldout, share=share, on_error=config.on_error)
    policy, too_long = ErrorPolicy(config.on_error), 0
    found: list[list[Group]] = [[], []]
    for rows, groups in zip((train, held_out), found, strict=True):
        for row in rows:
            try:
                if row.kind == "unpaired" and kind != "singles":
                    raise DanluError(
                        f"{row.where}: is an answer that is judged by itself, with nothing to compare; `danlu align "
                        "--loss kto` learns from such rows"
                    )
                if with_margins:
                    _check_margin(row)
                examples = _examples(row, tokenizer)
            except DanluError as error:
                policy(error)
                continue
            if max(len(ids) - 1 for ids, _ in examples) > config.seq_len:
                too_long += 1
                continue
            groups += _groups(row, examples, kind)
    n_rows = len(train) + len(held_out)
    if policy.count:
        console.warn(f"{config.data}: {policy.count:,} of {n_rows:,} rows skipped; the first: {policy.messages[0]}")
    if too_long:
        console.warn(
            f"{config.data}: {too_long:,} of {n_rows:,} rows are longer than seq_len ({config.seq_len} tokens) "
            "and left out"
        )
    if not found[0]:
        raise DanluError(f"{config.data}: no row is left to learn from; raise seq_len (now {config.seq_len})")
    return Judged(*found)


def _check_margin(row: PreferenceRow) -> None:
    if row.kind != "pair":
        raise DanluError(f"{row.where}: is a ranking, and margins are for pairs; leave --margins out")
    if row.margin is None:
        raise DanluError(f"{row.where}: has no margin; expected margin, or score_chosen and score_rejected")
    if row.margin < 0:
        raise DanluError(f"{row.where}: the chosen answer is scored {-row.margin:g} below the rejected one")


def _examples(row: PreferenceRow, tokenizer: Tokenizer) -> list[Example]:
    try:
        examples = [encode_answer(tokenizer, row.prompt, answer, row.tools) for answer in row.answers]
    except DanluError as error:
        raise DanluError(f"{row.where}: {error}") from error
    if len({tuple(ids) for ids, _ in examples}) < len(examples):
        raise DanluError(f"{row.where}: two answers are the same when the chat template has written them")
    return examples


def _groups(row: PreferenceRow, examples: list[Example], kind: str) -> list[Group]:
    if kind == "singles":
        ranks = row.ranks or (0 if row.desirable else 1,)
        return [Group((e,), (), rank == 0, None, row.where) for e, rank in zip(examples, ranks, strict=True)]
    if kind == "rankings" or row.kind == "pair":
        return [Group(tuple(examples), row.ranks, True, row.margin, row.where)]
    k = len(examples)
    better = [(i, j) for i in range(k) for j in range(i + 1, k) if row.ranks[i] < row.ranks[j]]
    return [Group((examples[i], examples[j]), (0, 1), True, None, row.where) for i, j in better]


@dataclass(frozen=True)
class GroupBatch:
    """Groups of one step, or some of them (:class:`danlu.training.loop.StepBatch`).

    Attributes:
        numbers: the places of the groups in their list, by which what was computed before is found.
        room: tokens of the longest group.
        step: all groups of the step, where this is a part of them.
    """

    groups: Sequence[Group]
    numbers: Sequence[int]
    room: int
    pad_id: int
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    step: GroupBatch | None = None

    @property
    def n_targets(self) -> int:
        """Groups: each has one loss."""
        return len(self.groups)

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads; a prompt counts once for its answers."""
        return n_tokens(self._examples)

    def split(self, rows: int) -> Iterator[GroupBatch]:
        """Micro-batches of as many tokens as ``rows`` of the longest groups have, at most."""
        start, n_tokens = 0, 0
        for end, group in enumerate(self.groups):
            if n_tokens + group.n_tokens > rows * self.room and end > start:
                yield self._part(start, end)
                start, n_tokens = end, 0
            n_tokens += group.n_tokens
        yield self._part(start, len(self.groups))

    def to(self, device: torch.device) -> GroupBatch:
        """The batch for a device."""
        return dataclasses.replace(self, device=device)

    @cached_property
    def packed(self) -> PackedExamples:
        """The examples of all groups, in their order."""
        return pack_examples(self._examples, pad_id=self.pad_id).to(self.device)

    @property
    def _examples(self) -> list[Example]:
        return [example for group in self.groups for example in group.examples]

    def _part(self, start: int, end: int) -> GroupBatch:
        whole = self.step or self
        return dataclasses.replace(
            self, groups=self.groups[start:end], numbers=self.numbers[start:end], step=whole
        )  # fmt: skip


def batch_of(groups: Sequence[Group], pad_id: int) -> GroupBatch:
    """All groups of a list as one batch."""
    return GroupBatch(groups, range(len(groups)), max(group.n_tokens for group in groups), pad_id)


class GroupStream(EpochStream[int]):
    """Endless batches of groups over epochs (:class:`danlu.training.loop.Rows`)."""

    def __init__(self, groups: Sequence[Group], *, seed: int, pad_id: int) -> None:
        self.groups, self.seed, self.pad_id = groups, seed, pad_id
        self.row_len = max(group.n_tokens for group in groups)
        super().__init__()

    def order(self, epoch: int) -> list[int]:
        return shuffled(len(self.groups), self.seed, epoch)

    def next(self, n_rows: int) -> GroupBatch:
        """The next groups."""
        taken = self.take(n_rows)
        return GroupBatch([self.groups[i] for i in taken], taken, self.row_len, self.pad_id)
