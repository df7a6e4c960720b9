"""Reward models: scores are those of the model alone, losses those of the papers; they open elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_rows import pairs, write
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from danlu.adapters.peft_folder import load_adapter
from danlu.engine.config import SamplingParams
from danlu.errors import DanluError, Problems
from danlu.evaluation.calibration import calibration_error, reliability_table
from danlu.evaluation.intervals import share_interval
from danlu.formats.card import Card
from danlu.models.heads import RewardModel
from danlu.models.load import load_model
from danlu.posttraining.config import RewardConfig
from danlu.posttraining.preferences import batch_of, encode_answer, read_groups
from danlu.posttraining.reward import _judge, reward
from danlu.posttraining.scoring import best_of, score_answers, scored
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.metrics import read_metrics

Make = Callable[..., RewardConfig]


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Make:
    def config(name: str = "reward", rows: list[dict[str, Any]] | None = None, **changes: Any) -> RewardConfig:
        values: dict[str, Any] = {
            "model": model_folder, "data": write(tmp_path / f"{name}.jsonl", rows or pairs()), "out": tmp_path / name,
            "steps": 4, "batch_size": 6, "seq_len": 128, "log_to": (), "device": "cpu", "precision": "fp32",
            "lr_scale": 30,
        }  # fmt: skip
        return RewardConfig(**{**values, **changes})

    return config


def fresh(folder: Path) -> RewardModel:
    torch.manual_seed(0)
    return load_model(folder, RewardModel, new_head=True)


def judge(config: RewardConfig, model: RewardModel) -> tuple[Tensor, dict[str, Tensor], list[list[float]]]:
    """Losses, figures, and the scores of each group, one by one."""
    tokenizer = Tokenizer.load(config.model)
    groups = [scored(group) for group in read_groups(config, tokenizer, "rankings").train]
    losses, figures = _judge(config, model, batch_of(groups, tokenizer.pad_id), False)
    alone = [[model.score(torch.tensor([ids[:-1]])).item() for ids, _ in group.examples] for group in groups]
    return losses, figures, alone


def log_sigmoid(x: float) -> float:
    return float(F.logsigmoid(torch.tensor(x)))


def test_scores_are_those_of_each_answer_alone_on_either_side_of_padding(model_folder: Path) -> None:
    model, tokenizer = fresh(model_folder), Tokenizer.load(model_folder)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in pairs(7)]
    answers = [row["chosen"] for row in pairs(7)]
    found = score_answers(model, tokenizer, asked, answers)
    rows = [
        encode_answer(tokenizer, prompt, [{"role": "assistant", "content": answer}])[0]
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    width = max(map(len, rows)) + 3
    for side in ("left", "right"):
        padded = [[0] * (width - len(r)) + r if side == "left" else r + [0] * (width - len(r)) for r in rows]
        real = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
        real = real if side == "left" else [r[::-1] for r in real]
        with torch.no_grad():
            expected = model.score(torch.tensor(padded), torch.tensor(real, dtype=torch.bool))
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


def test_pairs_give_bradley_terry_with_margins_and_centring(make: Make) -> None:
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(pairs(12))]
    config = make(rows=rows, margins=True, centring=0.25, heldout_share=0.0)
    losses, figures, alone = judge(config, fresh(config.model))
    for i, (chosen, rejected) in enumerate(alone):
        expected = -log_sigmoid(chosen - rejected - 0.1 * i) + 0.25 * (chosen + rejected) ** 2
        assert losses[i].item() == pytest.approx(expected, abs=1e-5)
        assert figures["accuracy"][i].item() == float(chosen > rejected)
    plain, *_ = judge(make(rows=rows, heldout_share=0.0), fresh(config.model))
    assert plain[0].item() == pytest.approx(-log_sigmoid(alone[0][0] - alone[0][1]), abs=1e-5)


RANKED = [
    {
        "prompt": f"p{i}",
        "answers": [f"a{i}", f"b{i}", f"c{i}", f"d{i}"][: 2 + i % 3],
        "ranks": [1, 2, 2, 3][: 2 + i % 3],
    }
    for i in range(9)
]


def test_rankings_give_the_mean_over_their_pairs_or_plackett_luce(make: Make) -> None:
    config = make(rows=RANKED, heldout_share=0.0)
    model = fresh(config.model)
    losses, figures, alone = judge(config, model)
    for i, scores in enumerate(alone):
        ranks = [1, 2, 2, 3][: len(scores)]
        compared = [(j, k) for j in range(len(ranks)) for k in range(len(ranks)) if ranks[j] < ranks[k]]
        expected = -sum(log_sigmoid(scores[j] - scores[k]) for j, k in compared) / len(compared)
        assert losses[i].item() == pytest.approx(expected, abs=1e-5)
        right = sum(scores[j] > scores[k] for j, k in compared) / len(compared)
        assert figures["accuracy"][i].item() == pytest.approx(right)
    whole, _, _ = judge(make("whole", RANKED, rankings="plackett-luce", heldout_share=0.0), model)
    assert whole[0].item() == pytest.approx(losses[0].item(), abs=1e-5)  # of two answers both are the same
    a, b, c, d = map(math.exp, alone[2])
    assert whole[2].item() == pytest.approx(
        -sum(map(math.log, (a / (a + b + c + d), b / (b + d), c / (c + d)))), abs=1e-5
    )


def test_a_step_in_pieces_is_the_same_step(make: Make) -> None:
    config = make(rows=RANKED, heldout_share=0.0)
    model, tokenizer = fresh(config.model), Tokenizer.load(config.model)
    batch = batch_of([scored(g) for g in read_groups(config, tokenizer, "rankings").train], tokenizer.pad_id)
    found = []
    for rows in (1, 100):
        model.zero_grad()
        for part in batch.split(rows):
            (_judge(config, model, part, False)[0].sum() / batch.n_targets).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_it_learns_opens_in_transformers_and_tells_how_sure_it_is(make: Make) -> None:
    config = make(rows=pairs(120), steps=60, lr_scale=100, heldout_share=0.25)
    out = reward(config)
    card = Card.load(out)
    assert card.metrics["heldout_accuracy"] > 0.7
    low, high = card.metrics["heldout_accuracy_interval"]
    assert low <= card.metrics["heldout_accuracy"] <= high
    assert sum(row["count"] for row in card.details["reliability"]) == card.metrics["heldout_pairs"]
    lines = read_metrics(out / "metrics.jsonl")
    assert sum(line["margin"] for line in lines[-10:]) > sum(line["margin"] for line in lines[:10])
    reference = AutoModelForSequenceClassification.from_pretrained(out)
    tokenizer, model = Tokenizer.load(out), load_model(out, RewardModel)
    row = pairs(1)[0]
    asked = [{"role": "user", "content": row["prompt"]}]
    ids, _ = encode_answer(tokenizer, asked, [{"role": "assistant", "content": row["chosen"]}])
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits
    assert theirs.shape == (1, 1)
    assert score_answers(model, tokenizer, [asked], [row["chosen"]])[0] == pytest.approx(theirs.item(), abs=1e-4)
    assert reward(config) == out


def test_the_head_is_saved_with_an_adapter(make: Make, tmp_path: Path) -> None:
    rows = pairs(30, seed=5)
    config = make(steps=12, adapter="lora", rank=4, lr_scale=3, heldout=write(tmp_path / "heldout.jsonl", rows))
    out = reward(config)
    model, tokenizer = fresh(config.model), Tokenizer.load(config.model)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]

    def margin() -> float:
        good, bad = (score_answers(model, tokenizer, asked, [r[name] for r in rows]) for name in ("chosen", "rejected"))
        return sum(good) / len(good) - sum(bad) / len(bad)

    card, before = Card.load(out), margin()
    load_adapter(model, out)
    assert margin() == pytest.approx(card.metrics["heldout_margin"], abs=1e-4)
    assert margin() > before + 0.05
    assert card.kind == "adapter"


def test_best_of_n_takes_the_answer_with_the_highest_reward(model_folder: Path) -> None:
    model, tokenizer, reward_model = load_model(model_folder), Tokenizer.load(model_folder), fresh(model_folder)
    asked: list[Any] = [[{"role": "user", "content": "one"}], "a text"]
    params = SamplingParams(temperature=1.0, max_new_tokens=6, seed=3)
    best = best_of(model, tokenizer, asked, 5, partial(score_answers, reward_model, tokenizer), params)
    for one in best:
        assert len(one.texts) == 5
        assert len(set(one.texts)) > 1
        assert one.reward == max(one.rewards)  # type: ignore[type-var]
        assert one.text == one.texts[one.rewards.index(one.reward)]
    again = best_of(model, tokenizer, asked, 5, partial(score_answers, reward_model, tokenizer), params)
    assert again == best
    with pytest.raises(DanluError, match="prompt 1: none of its 2 answers"):
        best_of(model, tokenizer, asked, 2, lambda prompts, answers: [None, math.nan, 1.0, 2.0], params)
    unsure = best_of(model, tokenizer, asked, 2, lambda prompts, answers: [None, 0.5, 2.0, 2.0], params)
    assert [one.texts.index(one.text) for one in unsure] == [1, 0]


def test_what_cannot_be_learned_is_told(make: Make, model_folder: Path) -> None:
    with pytest.raises(DanluError, match=r"bare\.jsonl:\d+: has no margin"):
        reward(make("bare", margins=True))
    rows = [{**row, "score_chosen": 1, "score_rejected": 3} for row in pairs(5)]
    with pytest.raises(DanluError, match="is scored 2 below the rejected one"):
        reward(make("below", rows, margins=True))
    skipping = make("some", [*rows, *({**row, "margin": 1} for row in pairs(8, seed=1))], margins=True, on_error="skip")
    metrics = Card.load(reward(skipping)).metrics
    assert metrics["rows"] + metrics["heldout_rows"] == 8
    with pytest.raises(DanluError, match="is a ranking, and margins are for pairs"):
        reward(make("ranked", RANKED[2:3], margins=True))
    single = [{"prompt": f"p{i}", "completion": "a", "label": True} for i in range(5)]
    with pytest.raises(DanluError, match="nothing to compare"):
        reward(make("single", single))
    with pytest.raises(Problems, match="margins are for rankings=pairs"):
        reward(make("both", margins=True, rankings="plackett-luce"))
    assert not make("both").out.exists()


def test_reliability_and_its_error_are_what_they_say() -> None:
    table = reliability_table([0.55, 0.62, 0.93, 0.97, 1.0], [True, False, True, True, False], bins=5, low=0.5)
    assert [(round(row["from"], 9), row["count"], round(row["share"], 9)) for row in table] == [
        (0.5, 1, 1.0), (0.6, 1, 0.0), (0.9, 3, 0.666666667)
    ]  # fmt: skip
    expected = (abs(0.55 - 1) + 0.62 + 3 * abs((0.93 + 0.97 + 1) / 3 - 2 / 3)) / 5
    assert calibration_error(table) == pytest.approx(expected)
    assert calibration_error([]) == 0.0


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 10, 0.2366, 0.7634), (1.0, 20, 0.8389, 1.0), (0.0, 5, 0.0, 0.4345)]
)
def test_intervals_of_shares(share: float, n: int, low: float, high: float) -> None:
    assert share_interval(share, n) == pytest.approx([low, high], abs=1e-4)  # as statsmodels gives them
