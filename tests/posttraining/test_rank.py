"""`danlu rank`: a model's answers, ranked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.posttraining import rank as module
from danlu.posttraining.config import RewardConfig
from danlu.posttraining.rank import rank
from danlu.posttraining.rank_config import RankConfig
from danlu.posttraining.reward import reward


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> RankConfig:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(24)))
    return RankConfig(
        model=model_folder, data=prompts, out=tmp_path / "ranked", reward=("regex=[aeiou]", "0.5*regex=[xyz]"), n=4,
        max_prompt=64, max_new_tokens=4, heldout_share=0.25, max_running=8,
    )  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_are_what_a_reward_model_learns_from(config: RankConfig, tmp_path: Path) -> None:
    out = rank(config)
    rows = [row for name in ("train.jsonl", "heldout.jsonl") for row in rows_of(out, name)]
    for row in rows:
        for answer, score in zip(row["answers"], row["scores"], strict=True):  # type: ignore[call-overload]
            assert score == any(c in answer for c in "aeiou") + 0.5 * any(c in answer for c in "xyz")
        assert len(set(row["scores"])) > 1  # type: ignore[call-overload]
    metrics = Card.load(out).metrics
    assert metrics["train_prompts"] + metrics["heldout_prompts"] == 24
    assert metrics["train_rows"] == len(rows_of(out, "train.jsonl"))
    assert metrics["train_reward_best"] > metrics["train_reward_mean"]
    learned = reward(
        RewardConfig(model=config.model, data=out, out=tmp_path / "reward", steps=2, seq_len=96, threads=1, log_to=())
    )
    assert Card.load(learned).metrics["heldout_rows"] == len(rows_of(out, "heldout.jsonl"))


def test_a_stopped_run_goes_on_and_ends_with_the_same_rows(
    config: RankConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rank(config)
    drawn = module.RolloutEngine.draw
    calls = 0

    def stop(self: object, *args: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return drawn(self, *args, **more)  # type: ignore[arg-type]

    stopped = dataclasses.replace(config, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(module.RolloutEngine, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            rank(stopped)
    begun = stopped.out / ".train.jsonl.begun"
    with begun.open("a") as file:
        file.write('{"prompt": "torn')
    rank(stopped)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (stopped.out / name).read_bytes() == (whole / name).read_bytes()
    assert not begun.exists()


def test_what_compares_nothing_is_an_error(config: RankConfig) -> None:
    with pytest.raises(DanluError, match=r"worth different rewards.*all alike"):
        rank(dataclasses.replace(config, reward=("regex=(?s).",)))
    with pytest.raises(Problems, match="nothing judges"):
        rank(dataclasses.replace(config, reward=()))
