"""samples.jsonl: the file of a run that was killed and went on is that of one that was not; inputs of a policy."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.prompts import Prompt
from danlu.posttraining.answer_log import PROMPTS, AnswerLog
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Judged
from danlu.posttraining.policy import _inputs
from danlu.posttraining.rollouts import Rollout
from danlu.posttraining.verifiers import Judgement
from danlu.training.metrics import read_metrics


def judged(text: str, prompt: str = "p") -> Judged:
    asked = Prompt([{"role": "user", "content": prompt}], {}, "here", ids=[1])
    return Judged(Rollout(asked, text, [2], [0.0], True), 1.0, Judgement(1.0, {"a": 1.0}, None, {}))


@settings(deadline=None, max_examples=50)  # it writes files
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 400), st.text(max_size=8))
def test_a_run_that_was_killed_leaves_the_same_file(killed_at: int, saved_at: int, cut: int, text: str) -> None:
    def measure(log: AnswerLog, at: int) -> None:
        steps[0] = at
        log.write([[judged(f"{text} {at} {i}", text)] for i in range(PROMPTS + 2)])

    steps = [0]
    with TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        straight.mkdir()
        killed.mkdir()
        log = AnswerLog(straight, lambda: steps[0])
        for at in range(7):
            measure(log, at)
        log = AnswerLog(killed, lambda: steps[0])
        for at in range(killed_at + 1):
            measure(log, at)
        goes_on = min(saved_at, killed_at)  # it had measured more than its checkpoint knows of
        written = killed.joinpath("samples.jsonl").read_bytes()
        whole = sum(len(line) + 1 for line in written.splitlines()[: goes_on * PROMPTS])
        killed.joinpath("samples.jsonl").write_bytes(written[: max(whole, len(written) - cut)])
        log = AnswerLog(killed, lambda: steps[0])
        for at in range(goes_on, 7):
            measure(log, at)
            measure(log, at)  # measured twice, written once
        assert straight.joinpath("samples.jsonl").read_bytes() == killed.joinpath("samples.jsonl").read_bytes()
        lines = read_metrics(killed / "samples.jsonl")
        assert [line["step"] for line in lines] == [at for at in range(7) for _ in range(PROMPTS)]
        assert lines[0]["answer"] == f"{text} 0 0"
        assert json.dumps(lines[0]["parts"]) == '{"a": 1.0}'


def test_all_that_a_policy_is_made_from_is_an_input(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = tmp_path / "one", tmp_path / "two"
    config = AlignConfig(
        method="ppo", model=tmp_path, data=tmp_path / "data", out=tmp_path / "out", critic=one, heldout=two,
        reward=(f"model={one}", f"0.5*model={two}", "python-parses", "regex=model=x"), heldout_reward=(f"model={two}",),
    )  # fmt: skip
    assert _inputs(config) == {
        "model": tmp_path, "data": tmp_path / "data", "heldout": two, "critic": one, "reward": one, "reward 2": two,
        "heldout reward": two,
    }  # fmt: skip
