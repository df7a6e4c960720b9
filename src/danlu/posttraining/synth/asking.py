"""Between those who have questions and the teacher: what is answered already is not asked again, each answer is on disk
as soon as it is there, and a teacher that fails too often ends the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from danlu import console
from danlu.errors import DanluError
from danlu.posttraining.synth.jobs import Answer, Failure, Job
from danlu.posttraining.synth.spool import Spool
from danlu.posttraining.synth.teachers import Teacher

IN_A_ROW = 20
"""Failures with no answer between them, after which nobody asks on."""
AGAIN = "what was answered is kept; run the same command again to go on"


class Asker:
    """Asks a teacher.

    Args:
        max_failed: share of all answers that may fail.

    Attributes:
        asked, resumed: answers that were wanted, and those of them that were there from an earlier run.
        failures: reasons, and how often each was given.
    """

    def __init__(self, teacher: Teacher, spool: Spool, max_failed: float) -> None:
        self._teacher, self._spool, self._max_failed = teacher, spool, max_failed
        self.asked = self.resumed = 0
        self.prompt_tokens = self.new_tokens = 0
        self.failures: Counter[str] = Counter()
        self._in_a_row = 0

    def ask(self, jobs: Sequence[Job], what: str) -> list[Answer | None]:
        """The answers, in the order of the jobs; None where there is none.

        Args:
            what: shown beside the progress.

        Raises:
            DanluError: too many fail, or the teacher says that there is no use in asking.
        """
        missing = list({job.key: job for job in jobs if job.key not in self._spool.answers}.values())
        self.asked += len(jobs)
        self.resumed += len(jobs) - len(missing)
        if missing:
            with console.progress(what, total=len(missing), unit="answers") as advance:

                def deliver(job: Job, outcome: Answer | Failure) -> None:
                    if isinstance(outcome, Answer):
                        self._spool.append(job, outcome)
                        self._in_a_row = 0
                    else:
                        self._failed(job, outcome)
                    advance(1)

                self._teacher.answer(missing, deliver)
        found = [self._spool.answers.get(job.key) for job in jobs]
        self.prompt_tokens += sum(answer.prompt_tokens for answer in found if answer is not None)
        self.new_tokens += sum(answer.new_tokens for answer in found if answer is not None)
        return found

    def _failed(self, job: Job, failure: Failure) -> None:
        self.failures[failure.reason] += 1
        self._in_a_row += 1
        n_failed, last = self.failures.total(), f"the last, of {job.where}: {failure.reason}"
        if failure.unreachable and not self._spool.answers:
            raise DanluError(f"the teacher cannot be reached: {failure.reason}")
        if self._in_a_row >= IN_A_ROW:
            raise DanluError(f"{IN_A_ROW} answers in a row failed; {last}; {AGAIN}")
        if n_failed > self._max_failed * self.asked:
            raise DanluError(
                f"{n_failed:,} of {self.asked:,} answers failed, more than max_failed ({self._max_failed:g}) allows; "
                f"{last}; {AGAIN}"
            )
