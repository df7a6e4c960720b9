"""What `danlu synth` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from danlu.config import REQUIRED, option
from danlu.engine.engine_config import DEVICE_HELP, PRECISION_HELP, Precision
from danlu.posttraining.verifiers.config import SandboxOptions

FILTERS = ("refusal", "repetition", "duplicate", "near_duplicate")
"""Those that can be left out; an empty answer, and one that was cut off, is never worth learning."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig(SandboxOptions):
    """Have a teacher write training data: answers to prompts, or tasks and answers."""

    teacher: str = option(
        REQUIRED,
        "Who answers: a model folder, adapter folder or GGUF file, a name that `danlu pull` knows, or the URL of an "
        "OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.",
    )
    out: Path = option(REQUIRED, "Data folder to make; its documents are chats.", affects_result=False)
    method: Literal["answer", "self-instruct"] = option(
        "answer", "answer: the teacher answers the prompts of data; self-instruct: it first invents tasks like seeds."
    )
    data: Path | None = option(
        None,
        "Prompts: JSON Lines, JSON, CSV or Parquet rows with prompt, question, instruction or messages, or a data "
        "folder; other fields are kept, for check.",
    )
    limit: int | None = option(None, "Only the first so many prompts.", ge=1)
    seeds: Path | None = option(None, "self-instruct: tasks that show what is wanted, in rows as of data.")
    tasks: int = option(100, "self-instruct: tasks to invent.", ge=1, le=10_000_000)
    similarity: float = option(
        0.7, "self-instruct: a task is new where its ROUGE-L with all others is below this.", gt=0, le=1
    )
    systems: tuple[str, ...] = option(
        ("built-in",),
        "System messages that are drawn: built-in (all of them), none, one by its id (step-by-step), or a file of rows "
        "with system, weight, id; ENTRY::2 is drawn twice as often. A prompt's own system message stays.",
    )

    n: int = option(1, "Answers to ask for, to each prompt.", ge=1, le=128)
    keep: Literal["first", "best", "all"] = option(
        "first",
        "Of the answers that pass: the first (the next is asked for only where none has passed yet), the one with the "
        "best score, or all.",
    )
    temperature: float = option(0.7, "Divides the teacher's logits; 0 is greedy.", ge=0, le=2)
    top_p: float = option(0.95, "Keep the fewest most likely tokens whose probabilities sum to p.", gt=0, le=1)
    max_new_tokens: int = option(1024, "Longest answer; those that are cut off are not kept.", unit="tokens", ge=1)
    seed: int = option(0, "Seed of all that is drawn.", ge=0, lt=2**63)

    min_words: int = option(1, "Shorter answers are left out.", unit="words", ge=1)
    max_words: int | None = option(None, "Longer answers are left out.", unit="words", ge=1)
    without: tuple[str, ...] = option((), f"Filters to leave out: {', '.join(FILTERS)}.")
    near_duplicates: float = option(
        0.8, "Similarity of prompt and answer with an earlier row's from which on a row is left out.", gt=0, le=1
    )
    check: tuple[str, ...] = option(
        (),
        "Verifiers that an answer must pass: python-parses, python-tests, math-equal, json-schema, regex=..., "
        "think-format, module:function, model=FOLDER.",
    )
    check_score: float | None = option(
        None, "Least weighted sum of the verifiers' scores; default: each of them gives a whole point."
    )

    curriculum: Literal["none", "length", "pass-rate"] = option(
        "none",
        "Order rows from easy to hard: by the words of prompt and answer, or by the share of the prompt's n answers "
        "that did not pass; also writes stage-1.jsonl, stage-2.jsonl, ... to train on one after the other.",
    )
    stages: int = option(3, "Stages of the curriculum.", ge=2, le=100)
    heldout: float = option(
        0.05, "Share of the rows held out, related ones together; data that is split already stays so.", ge=0, lt=1
    )

    model: str | None = option(None, "Endpoint: name of the model.")
    api_key_env: str | None = option(
        None, "Endpoint: environment variable that holds the key, such as OPENAI_API_KEY.", affects_result=False
    )
    body: dict[str, Any] = option(
        {}, "Endpoint: fields of each request beside danlu's own; null takes one out, as in {seed: null}."
    )
    concurrency: int = option(8, "Endpoint: requests at the same time.", ge=1, le=1024, affects_result=False)
    timeout: float = option(300.0, "Endpoint: longest wait for an answer.", unit="seconds", gt=0, affects_result=False)
    retries: int = option(
        5, "Endpoint: tries after a first one that failed for now (429, 5xx, time).", ge=0, le=100, affects_result=False
    )
    retry_wait: float = option(
        1.0, "Endpoint: wait before the second try; it doubles.", unit="seconds", gt=0, le=60, affects_result=False
    )
    max_failed: float = option(
        0.1, "Share of the answers that may fail before the run ends with an error.", ge=0, le=1, affects_result=False
    )

    device: str = option("auto", DEVICE_HELP)
    precision: Precision = option("auto", PRECISION_HELP)
    max_running: int = option(64, "Answers of a model folder that are written at once.", ge=1, affects_result=False)
    on_error: Literal["stop", "skip"] = option("stop", "At a broken row: stop, or skip it and count.")
    overwrite: bool = option(False, "Replace the folder when it holds another result.", affects_result=False)

    @property
    def is_endpoint(self) -> bool:
        """Whether the teacher is asked over HTTP."""
        return self.teacher.lower().startswith(("http://", "https://"))

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        found = [*self._of_method(), *self._of_teacher()]
        if self.n > 1 and self.temperature == 0:
            found.append("n: at temperature 0 all answers to a prompt are the same; raise the temperature")
        if self.keep == "best" and not self.check:
            found.append("keep=best: nothing says which answer is best; give check, or keep first or all")
        if self.keep != "first" and self.n == 1:
            found.append(f"keep={self.keep}: there is one answer to each prompt; raise n")
        if self.curriculum == "pass-rate" and (self.n == 1 or self.keep == "first"):
            found.append(
                "curriculum=pass-rate: counts the answers that pass; give n of 2 or more, and keep best or all"
            )
        if self.curriculum == "none" and self._is_given("stages"):
            found.append("stages are given, and no curriculum; give curriculum too")
        if self.max_words is not None and self.max_words < self.min_words:
            found.append(f"max_words ({self.max_words}) is less than min_words ({self.min_words})")
        found += [f"without: there is no filter {name!r}; known: {', '.join(FILTERS)}"
                  for name in self.without if name not in FILTERS]  # fmt: skip
        if self._is_given("near_duplicates") and "near_duplicate" in self.without:
            found.append("near_duplicates is given, and the filter is left out; choose one")
        if self.check_score is not None and not self.check:
            found.append("check_score is given, and nothing is checked; give check too")
        if self.check_score is None and any("model=" in spec for spec in self.check):
            found.append("check: a reward model has no right and wrong; say with check_score what is good enough")
        return found

    def _of_method(self) -> list[str]:
        if self.method == "answer":
            wrong = [name for name in ("seeds", "tasks", "similarity") if self._is_given(name)]
            missing = [] if self.data else ["data is missing: method=answer needs prompts"]
        else:
            wrong = [name for name in ("data", "limit") if self._is_given(name)]
            missing = [] if self.seeds else ["seeds is missing: method=self-instruct needs tasks to start from"]
        return [f"{name} is not for method={self.method}" for name in wrong] + missing

    def _of_teacher(self) -> list[str]:
        if not self.is_endpoint:
            return [f"{name} is for endpoints, and the teacher is none" for name in _ENDPOINT if self._is_given(name)]
        found = [
            f"{name} is for model folders, and the teacher is an endpoint" for name in _FOLDER if self._is_given(name)
        ]
        try:
            url = urlsplit(self.teacher)
            has_host, has_secret = bool(url.hostname) and url.port != 0, "@" in url.netloc
        except ValueError as error:
            return [*found, f"teacher: is no URL ({error})"]
        if not has_host:
            found.append("teacher: the URL names no host, as in http://127.0.0.1:8000/v1")
        if has_secret or url.query or url.fragment:
            found.append(
                "teacher: the URL holds more than the address, which the card would show; give a key with api_key_env"
            )
        if not self.model:
            found.append("model is missing: the name that the endpoint knows the teacher by")
        reserved = sorted({"model", "messages", "n", "stream"} & set(self.body))
        found += [f"body: {name} cannot be set by it" for name in reserved]
        return found

    def _is_given(self, name: str) -> bool:
        default: Any = {} if name == "body" else type(self).__dataclass_fields__[name].default
        return bool(getattr(self, name) != default)


_ENDPOINT = ("model", "api_key_env", "body", "concurrency", "timeout", "retries", "retry_wait")
_FOLDER = ("device", "precision", "max_running")
"""Options that mean something for one kind of teacher only; given for the other they are refused, not passed over."""
