"""A teacher on this machine: a model folder, asked through the engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.errors import DanluError
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.jobs import Answer, Failure, Job
from danlu.posttraining.synth.teachers import Deliver

PROBE = "Answer in verse."


class FolderTeacher:
    """A model on this machine. An answer depends on its job alone, whatever else is asked.

    Args:
        path: model folder, adapter folder or GGUF file.
        with_systems: system messages will be sent.

    Raises:
        DanluError: it cannot be opened, or knows no chats, or no system messages.
    """

    def __init__(self, path: Path, config: SynthConfig, *, with_systems: bool) -> None:
        self._config = config
        step_tokens = max(512, config.max_running)
        engine_config = EngineConfig(
            max_running=config.max_running, step_tokens=step_tokens, device=config.device, precision=config.precision
        )
        self._engine = Engine(path, engine_config)
        assert self._engine.tokenizer is not None
        self._tokenizer = self._engine.tokenizer
        self._check_template(path, with_systems)

    def _check_template(self, path: Path, with_systems: bool) -> None:
        user = {"role": "user", "content": "Hello"}
        self._tokenizer.render_chat([user], add_generation_prompt=True)
        if not with_systems:
            return
        try:
            rendered = self._tokenizer.render_chat([{"role": "system", "content": PROBE}, user])
        except DanluError as error:
            raise DanluError(
                f"{path}: its chat template takes no system message ({error}); use --systems none"
            ) from error
        if PROBE not in rendered:
            raise DanluError(f"{path}: its chat template leaves system messages out; use --systems none")

    def answer(self, jobs: Sequence[Job], deliver: Deliver) -> None:
        """See :class:`~danlu.posttraining.synth.teachers.Teacher`."""
        waiting = iter(jobs)
        running: dict[str, Job] = {}
        try:
            while True:
                # Twice as many as run, so that the engine always has the next one; not all, which may be millions.
                for job in itertools.islice(waiting, 2 * self._config.max_running - len(running)):
                    try:
                        ids = self._tokenizer.encode_chat(job.messages, add_generation_prompt=True)
                        running[self._engine.submit(ids, self._params(job))] = job
                    except DanluError as error:
                        deliver(job, Failure(str(error)))
                if not running:
                    return
                for event in self._engine.step():
                    if event.generation is None:
                        continue
                    (completion,), stats = event.generation.completions, event.generation.stats
                    outcome: Answer | Failure
                    if event.generation.error is not None:
                        outcome = Failure(event.generation.error)
                    else:
                        outcome = Answer(
                            completion.text, completion.finish_reason, stats.prompt_tokens, stats.new_tokens
                        )
                    deliver(running.pop(event.request_id), outcome)
        finally:
            for request_id in running:
                self._engine.abort(request_id)

    def _params(self, job: Job) -> SamplingParams:
        config = self._config
        return SamplingParams(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=job.seed
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()
