"""`danlu synth`: a teacher writes the data that a student learns from.

prompts, or tasks that the teacher invents     self_instruct.py
a system message for each                      systems.py
answers, each on disk when it is there         folder_teacher.py, endpoint.py; asking.py, spool.py
filters, and verifiers                         filters.py
rows, from easy to hard, and held out          rows.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from danlu import config as configs
from danlu import console
from danlu.data.corpus import ErrorPolicy
from danlu.data.folder import DataFolder, Split
from danlu.data.prompts import Prompt, split_prompts
from danlu.errors import DanluError
from danlu.formats.card import Input, Stage, input_of
from danlu.hub.pull import model_path
from danlu.posttraining.synth.asking import Asker
from danlu.posttraining.synth.candidates import Candidate, Question
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.filters import (
    apply_filters,
    check_answers,
    choose,
    drop_duplicates,
    filters_of,
    report,
)
from danlu.posttraining.synth.jobs import Job, seed_of
from danlu.posttraining.synth.rows import held_out, order_by_difficulty, write_rejected, write_rows
from danlu.posttraining.synth.self_instruct import invent_tasks, read_seeds
from danlu.posttraining.synth.spool import Spool
from danlu.posttraining.synth.systems import NONE, OWN, Systems
from danlu.posttraining.synth.teachers import open_teacher
from danlu.posttraining.verifiers import Verifiers


def synth(config: SynthConfig) -> DataFolder:
    """Have a teacher answer prompts, or invent tasks and answer them, and write a data folder of chats.

    A run that was stopped, however that came, goes on where it was; what has been answered is not asked again. The rows
    of a model folder follow from the config and its inputs; those of an endpoint from what it answered.

    Args:
        config: see :class:`SynthConfig`.

    Raises:
        Problems: impossible options, all at once.
        DanluError: teacher, prompts or verifiers cannot be used, too many answers fail, or none is kept.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = configs.validate(config)
    path = None if config.is_endpoint else model_path(config.teacher)
    inputs = _inputs(config, path)
    stage = Stage.open(
        config.out, kind="data", verb="synth", config=config, inputs=inputs, overwrite=config.overwrite
    )  # fmt: skip
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return DataFolder(config.out)

    started = time.monotonic()
    with contextlib.ExitStack() as opened:
        with stage.preparing():
            systems = Systems.read(config.systems, config.seed)
            seeds, prompts = _read(config)
            verifiers = opened.enter_context(Verifiers.within(config, config.check)) if config.check else None
            with_systems = any(system.content for system in systems.systems) or any(map(_has_system, prompts.values()))
            teacher = opened.enter_context(open_teacher(config, path, with_systems=with_systems))
        spool = opened.enter_context(Spool(stage.out))
        asker = Asker(teacher, spool, config.max_failed)
        details: dict[str, Any] = {}
        try:
            if seeds:
                invention = invent_tasks(seeds, asker, config)
                prompts = {None: invention.tasks}
                details["self_instruct"] = invention.details
            questions, n_same = _questions(prompts, systems)
            candidates = _answers(questions, asker, verifiers, config)
        except KeyboardInterrupt:
            console.note(f"{len(spool.answers):,} answers are kept; run the same command again to go on")
            raise
        except DanluError:
            if not spool.answers:  # a wrong key, URL or model: the mended command can have the folder
                spool.remove()
                stage.abandon()
            raise

        choose(candidates, config.keep)
        left = [candidate for candidate in candidates if candidate.dropped is None]
        found = drop_duplicates(candidates, config)
        kept = [candidate for candidate in left if candidate.dropped is None]
        filters = report(candidates, config)
        if not kept:
            taken = ", ".join(f"{f['name']} {f['documents_removed']}" for f in filters if f["documents_removed"])
            raise DanluError(
                f"no answer is kept of {asker.asked:,}: {asker.failures.total()} failed, left out: {taken or 'none'}; "
                f"change what is asked or how it is filtered, and replace the folder with --overwrite"
            )
        named = {"teacher": config.model or config.teacher}
        if "teacher" in inputs:
            named["teacher_fingerprint"] = inputs["teacher"].fingerprint
        held = held_out(left, found, config)
        order_by_difficulty(kept, candidates, config)
        metrics = write_rows(stage.out, kept, held, named, config)
        write_rejected(stage.out, candidates, named, config)
        metrics = _counts(questions, n_same, candidates, asker) | metrics
        details |= _details(questions, systems, asker, filters, kept[0])
        stage.finish({**metrics, "seconds": round(time.monotonic() - started, 1)}, details)
        spool.remove()
    console.note(
        f"{config.out}: {len(kept):,} rows of {metrics['documents_read']:,} answers to {len(questions):,} prompts "
        f"({metrics['train_documents']:,} for training, {metrics['heldout_documents']:,} held out)"
    )
    return DataFolder(config.out)


Prompts = dict[Split | None, list[Prompt]]
"""Prompts by the split that the data put them in; None: none yet."""


def _inputs(config: SynthConfig, path: Path | None) -> dict[str, Input]:
    """What the result depends on. Where the cache keeps a model tells nobody anything: its name does."""
    inputs = {role: input_of(role, given) for role in ("data", "seeds") if (given := getattr(config, role)) is not None}
    if path is not None:
        inputs["teacher"] = replace(input_of("teacher", path), path=config.teacher)
    for entry in config.systems:
        if (file := Path(entry.rpartition("::")[0] or entry).expanduser()).is_file():
            inputs[f"systems {file.name}"] = input_of(f"systems {file.name}", file)
    return inputs


def _read(config: SynthConfig) -> tuple[list[str], Prompts]:
    """The seeds, or the prompts."""
    if config.seeds is not None:
        return read_seeds(config.seeds, ErrorPolicy(config.on_error)), {}
    assert config.data is not None
    train, held = split_prompts(config.data, share=0.0, on_error=config.on_error)
    for prompt in (*train, *held):
        if prompt.text is not None or not prompt.messages or prompt.messages[-1]["role"] not in ("user", "tool"):
            raise DanluError(
                f"{prompt.where}: holds nothing that a user asks; expected a prompt, or messages that end with a user's"
            )
    if config.limit is not None:
        held = held[: -(-config.limit * len(held) // len(train))]
        train = train[: config.limit]
    return [], ({"train": train, "heldout": held} if held else {None: train})


def _has_system(prompts: Sequence[Prompt]) -> bool:
    return any(prompt.messages[0]["role"] == "system" for prompt in prompts)


def _questions(prompts: Prompts, systems: Systems) -> tuple[list[Question], int]:
    """What is asked, each prompt once, and how many came again."""
    questions: dict[str, Question] = {}
    n = 0
    for split, part in prompts.items():
        for prompt in part:
            n += 1
            if prompt.key in questions:
                continue
            system, messages = systems.draw(prompt.key), prompt.messages
            system_id = system.id if system.content else NONE.id
            if messages[0]["role"] == "system":
                system_id = OWN
            elif system.content:
                messages = [{"role": "system", "content": system.content}, *messages]
            questions[prompt.key] = Question(len(questions), prompt, messages, system_id, split)
    return list(questions.values()), n - len(questions)


def _answers(
    questions: Sequence[Question], asker: Asker, verifiers: Verifiers | None, config: SynthConfig
) -> list[Candidate]:
    """All answers, judged, in the order of the questions."""
    filters = filters_of(config)
    candidates: list[Candidate] = []
    for wave in _waves(questions, candidates, config):
        jobs = [
            Job(question.messages, seed_of(config.seed, "answer", question.prompt.key, sample), question.prompt.where)
            for question, sample in wave
        ]
        answered = zip(wave, jobs, asker.ask(jobs, "the teacher answers"), strict=True)
        new = [Candidate(question, sample, job, answer) for (question, sample), job, answer in answered if answer]
        apply_filters(new, filters)
        if verifiers is not None:
            check_answers(new, verifiers, config.check_score)
        candidates += new
    return sorted(candidates, key=lambda candidate: (candidate.question.number, candidate.sample))


def _waves(
    questions: Sequence[Question], candidates: Sequence[Candidate], config: SynthConfig
) -> Iterator[list[tuple[Question, int]]]:
    """Questions, and which of their answers is asked for, in parts that can be asked at the same time: all at once, or,
    where one that passes is enough, one more each time for those without."""
    if config.keep != "first":
        yield [(question, sample) for question in questions for sample in range(config.n)]
        return
    for sample in range(config.n):
        passed = {candidate.question.number for candidate in candidates if candidate.dropped is None}
        if wave := [(question, sample) for question in questions if question.number not in passed]:
            yield wave


def _counts(
    questions: Sequence[Question], n_same: int, candidates: Sequence[Candidate], asker: Asker
) -> dict[str, Any]:
    return {
        "prompts": len(questions),
        "prompts_left_out_as_duplicates": n_same,
        "documents_read": len(candidates),
        "bytes_read": sum(len(candidate.answer.text.encode()) for candidate in candidates),
        "answers_asked": asker.asked,
        "answers_failed": asker.failures.total(),
        "answers_of_an_earlier_run": asker.resumed,
        "prompt_tokens": asker.prompt_tokens,
        "answer_tokens": asker.new_tokens,
    }


def _details(
    questions: Sequence[Question], systems: Systems, asker: Asker, filters: list[dict[str, Any]], sample: Candidate
) -> dict[str, Any]:
    drawn = {system.id: 0 for system in systems.systems} | (
        {OWN: 0} if any(q.system_id == OWN for q in questions) else {}
    )
    for question in questions:
        drawn[question.system_id] = drawn.get(question.system_id, 0) + 1
    contents = {system.id: system.content for system in systems.systems}
    return {
        "filters": filters,
        "failures": [{"reason": reason, "answers": n} for reason, n in asker.failures.most_common(20)],
        "systems": [{"id": name, "prompts": n, "content": contents.get(name, "")} for name, n in drawn.items()],
        "sample": {"messages": list(sample.question.messages), "answer": sample.answer.text},
    }
