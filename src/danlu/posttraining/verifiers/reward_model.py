"""A reward model as a verifier: its number for prompt and answer, as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.errors import DanluError
from danlu.posttraining.verifiers.base import MOST, Sample, Verdict

if TYPE_CHECKING:
    from danlu.data.preferences import Messages
    from danlu.models.heads import RewardModel
    from danlu.tokenizer.tokenizer import Tokenizer


class ModelScore:
    """Judges by a model folder with a scalar head; it is opened when there is something to judge.

    Raises:
        DanluError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if (path / "adapter_config.json").is_file():
            raise DanluError(
                f"model={path}: is an adapter; make a model of it first: danlu merge BASE {path} --out OUT"
            )
        if not (path / "config.json").is_file():
            raise DanluError(f"model={path}: is no model folder; name one that `danlu reward` made")
        self._path = path
        self._opened: tuple[RewardModel, Tokenizer] | None = None

    def judge(self, samples: Sequence[Sample]) -> list[Verdict]:
        if not samples:
            return []
        from danlu.posttraining.scoring import score_answers

        model, tokenizer = self._open()
        prompts = [_prompt(sample) for sample in samples]
        problems = [
            _problem(model, tokenizer, prompt, sample.answer) for prompt, sample in zip(prompts, samples, strict=True)
        ]
        readable = [i for i, problem in enumerate(problems) if problem is None]
        verdicts = [Verdict(None, f"the reward model cannot read it: {problem}") for problem in problems]
        scores = score_answers(model, tokenizer, [prompts[i] for i in readable], [samples[i].answer for i in readable])
        for i, score in zip(readable, scores, strict=True):
            verdicts[i] = Verdict(score) if abs(score) <= MOST else Verdict(None, f"the model gave {score}")
        return verdicts

    def _open(self) -> tuple[RewardModel, Tokenizer]:
        if self._opened is None:
            from danlu.models.heads import RewardModel
            from danlu.models.load import load_model
            from danlu.posttraining.scoring import check_decoder
            from danlu.tokenizer.tokenizer import Tokenizer

            model = load_model(self._path, RewardModel)
            check_decoder(model, self._path)
            self._opened = model, Tokenizer.load(self._path)
        return self._opened

    def close(self) -> None:
        self._opened = None


def _prompt(sample: Sample) -> Messages | str:
    return sample.prompt if isinstance(sample.prompt, str) else [dict(message) for message in sample.prompt]


def _problem(model: RewardModel, tokenizer: Tokenizer, prompt: Messages | str, answer: str) -> str | None:
    """Why it cannot be scored, found before, so that it does not take others with it."""
    from danlu.posttraining.preferences import encode_answer

    said: Messages | str = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    try:
        ids, _ = encode_answer(tokenizer, prompt, said, apart=True)
    except DanluError as error:
        return str(error)
    if len(ids) > model.config.context:
        return f"{len(ids)} tokens with its prompt; it reads {model.config.context}"
    return None
