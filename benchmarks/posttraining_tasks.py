"""What `posttraining.py` gives both sides to learn, and the settings of each contestant.

All of it is taken from the source of a few modules of the standard library: documented functions, asked for and
answered as `danlu data mine` does it. A step is one pass over the rows, so that both sides learn from the same examples
in it, in whatever order and however they lay them out.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from danlu.data.mining import MinedFunction, functions_with_docstrings, prompt_for
from danlu.data.packing import IGNORE, pack_epoch
from danlu.posttraining.preferences import encode_answer
from danlu.tokenizer.tokenizer import Tokenizer

MODULES = (
    "argparse", "ast", "calendar", "collections", "configparser", "csv", "dataclasses", "datetime", "difflib",
    "fractions", "ftplib", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "optparse", "pathlib",
    "random", "shutil", "socket", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading",
    "turtle", "zipfile",
)  # fmt: skip
SEQ_LEN = 512
SHORTEST, LONGEST = 80, 320
"""Tokens of a chat; the mean comes to about 160."""
LONGEST_PROMPT = 160
"""Tokens of a prompt that is to be answered."""
SFT_RATE, RATE = 1e-5, 1e-6


@dataclass(frozen=True)
class Contestant:
    """One side, in one of its ways.

    Attributes:
        settings: what its worker is started with.
    """

    name: str
    settings: dict[str, Any]

    @property
    def is_danlu(self) -> bool:
        return self.name.startswith("danlu")


@dataclass(frozen=True)
class Task:
    """A method, ready to be run.

    Attributes:
        tokens: of the examples of a step, without padding; of grpo, of the prompts of a step with the longest answers.
        mean_tokens: of one example.
        ids: of dpo, the tokens of each chosen and rejected answer with its prompt; else empty.
    """

    method: str
    contestants: list[Contestant]
    tokens: int
    mean_tokens: int
    ids: list[list[list[int]]]


def make_task(given: argparse.Namespace, model: Path, work: Path) -> Task:
    """Write the data into ``work``."""
    tokenizer = Tokenizer.load(model)
    functions = documented_functions()
    settings: dict[str, Any] = {
        "method": given.method, "model": str(model), "threads": given.threads, "precision": given.precision,
        "seq_len": SEQ_LEN, "data": str(work / f"{given.method}.jsonl"), "tokens": str(work / "tokens.jsonl"),
        "rate": RATE, "betas": [0.9, 0.999], "micro_batch": 4, "timed": True,
    }  # fmt: skip
    make = {"sft": sft_task, "dpo": dpo_task, "grpo": grpo_task}[given.method]
    return make(given, tokenizer, functions, settings)


def sft_task(
    given: argparse.Namespace, tokenizer: Tokenizer, functions: list[MinedFunction], settings: dict[str, Any]
) -> Task:
    """Chats, of which the answers are learned."""
    rows, examples = [], []
    for function in functions:
        messages = [*prompt_for(function), {"role": "assistant", "content": function.answer}]
        ids, mask = tokenizer.encode_chat_with_mask(messages)
        if SHORTEST <= len(ids) <= LONGEST and len(rows) < given.examples:
            rows.append({"messages": messages})
            examples.append((ids, mask))
    write_lines(settings["data"], rows)
    labels = [[i if wanted else IGNORE for i, wanted in zip(ids, mask, strict=True)] for ids, mask in examples]
    write_lines(
        settings["tokens"],
        [{"input_ids": ids, "labels": some} for (ids, _), some in zip(examples, labels, strict=True)],
    )
    lengths = [len(ids) for ids, _ in examples]
    n_rows = len(pack_epoch(np.array(lengths) - 1, SEQ_LEN, seed=0, epoch=0))
    mean = round(sum(lengths) / len(lengths))
    settings |= {"rows": n_rows, "mean_tokens": mean, "rate": SFT_RATE, "betas": [0.8, 0.95]}
    contestants = [
        Contestant("danlu (packed)", settings | {"variant": "packed"}),
        Contestant("trl (padded)", settings | {"variant": "padded"}),
        Contestant("trl (packed)", settings | {"variant": "packed"}),
    ]
    return Task("sft", contestants, sum(lengths), mean, [])


def dpo_task(
    given: argparse.Namespace, tokenizer: Tokenizer, functions: list[MinedFunction], settings: dict[str, Any]
) -> Task:
    """Pairs: the function that was asked for, and the next one, which was not."""
    rows, texts, pairs = [], [], []
    for function, other in itertools.pairwise(functions):
        prompt = prompt_for(function)
        answers = [[{"role": "assistant", "content": one.answer}] for one in (function, other)]
        pair = [encode_answer(tokenizer, prompt, answer) for answer in answers]
        if all(SHORTEST <= len(ids) <= LONGEST for ids, _ in pair) and len(rows) < given.examples:
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
            pairs.append([list(ids) for ids, _ in pair])
            chosen, rejected = (tokenizer.decode(ids[list(mask).index(True) :]) for ids, mask in pair)
            asked = tokenizer.render_chat(prompt, add_generation_prompt=True)
            texts.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    write_lines(settings["data"], rows)
    write_lines(settings["tokens"], texts)
    tokens = sum(len(ids) for pair in pairs for ids in pair)
    mean = round(tokens / len(pairs) / 2)
    settings |= {"rows": len(rows), "mean_tokens": mean}
    contestants = [
        Contestant("danlu", settings | {"variant": "precomputed"}),
        Contestant("trl (precomputed)", settings | {"variant": "precomputed"}),
        Contestant("trl (online)", settings | {"variant": "online"}),
    ]
    return Task("dpo", contestants, tokens, mean, pairs)


def grpo_task(
    given: argparse.Namespace, tokenizer: Tokenizer, functions: list[MinedFunction], settings: dict[str, Any]
) -> Task:
    """Prompts."""
    rows, lengths = [], []
    for function in functions:
        prompt = prompt_for(function)
        n = len(tokenizer.encode_chat(prompt, add_generation_prompt=True))
        if n <= LONGEST_PROMPT and len(rows) < given.prompts:
            rows.append({"prompt": prompt})
            lengths.append(n + given.new_tokens)
    write_lines(settings["data"], rows)
    tokens = given.group * sum(lengths)
    mean = round(sum(lengths) / len(lengths))
    settings |= {
        "rows": len(rows), "mean_tokens": mean, "group_size": given.group, "new_tokens": given.new_tokens,
        "passes": 1, "fixed_length": True, "rollouts": None,
    }  # fmt: skip
    contestants = [
        Contestant("danlu", settings | {"variant": "engine"}),
        Contestant("trl", settings | {"variant": "generate"}),
    ]
    return Task("grpo", contestants, tokens, mean, [])


def documented_functions() -> list[MinedFunction]:
    """Those of :data:`MODULES`, in an order that depends on nothing else."""
    found = []
    for name in MODULES:
        origin = getattr(importlib.util.find_spec(name), "origin", None)
        if origin is not None:
            found += functions_with_docstrings(Path(origin).read_text(encoding="utf-8"))
    found = [function for function in found if function.syntax is not None]
    random.Random(0).shuffle(found)
    return found


def write_lines(path: str, rows: list[Any]) -> None:
    """JSON Lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
