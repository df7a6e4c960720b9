"""`danlu evaluate` on a tiny model and a tiny corpus: figures, card, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.errors import DanluError
from danlu.evaluation import evaluate as module
from danlu.evaluation.bits_per_byte import bits_per_byte
from danlu.evaluation.config import EvaluateConfig
from danlu.evaluation.evaluate import evaluate
from danlu.formats.card import CARD, RUN, Card
from danlu.models.load import load_model, save_model
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on
from random_lm import random_lm


def source(number: int) -> str:
    return "\n\n".join(
        f'def total_{number}_{i}(values):\n    """Sum of the values and {i} more."""\n    result = {number}\n'
        f"    for value in values:\n        result += value * {i}\n    return result\n"
        for i in range(4)
    )


def write_data(folder: Path, **splits: list[str]) -> Path:
    folder.mkdir()
    for split, texts in splits.items():
        with ShardWriter(folder, split) as writer:
            for i, text in enumerate(texts):
                writer.write(Document(id=f"{split}{i}", text=text, path=f"{split}{i}.py"))
    shards = {shard.name: {"bytes": shard.stat().st_size} for shard in folder.iterdir()}
    Card("data", "data build", f"{splits}", {}, files=shards).save(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    train, heldout = [source(i) for i in range(20)], [source(100), source(101)]
    return write_data(tmp_path_factory.mktemp("data") / "data", train=train, heldout=heldout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_on([source(i) for i in range(20)], 330, 2)
    lm = random_lm(330, context=256)
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(lm, folder, tokenizer)
    Card("model", "pretrain", "0", {"seq_len": 64}).save(folder)
    return folder


@pytest.fixture
def config(model: Path, data: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        model=model, data=data, out=tmp_path / "out", functions=5, max_new_tokens=16, precision="fp32", device="cpu"
    )


def test_the_card_holds_what_the_report_reads(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = evaluate(config)
    assert config.out is not None
    card = Card.load(config.out)
    assert (card.kind, card.verb, card.metrics) == ("evaluation", "evaluate", metrics)
    assert [i.role for i in card.inputs] == ["model", "data"]
    heldout = [d.text for d in DataFolder(config.data).documents("heldout")]
    model, tokenizer = load_model(config.model), Tokenizer.load(config.model)
    score = bits_per_byte(model, tokenizer, heldout, context=64)  # what it was trained on, not the 256 it could take
    assert metrics["bits_per_byte"] == score.bits_per_byte
    assert metrics["heldout_bytes"] == sum(len(text.encode()) for text in heldout)
    assert metrics["functions"] == 5
    assert 0 <= metrics["compile_rate"] <= metrics["parse_rate"] <= 1
    assert metrics["compressors"]["xz_primed"] < metrics["compressors"]["xz"]
    samples = card.details["samples"]
    assert len({(s["path"], s["name"]) for s in samples}) == 5
    assert set(samples[0]) == {"path", "name", "prompt", "completion", "reference", "parses", "compiles"}
    assert all(s["prompt"].startswith(f"def {s['name']}(") for s in samples)
    shown = capsys.readouterr().out
    assert f"{metrics['bits_per_byte']:.4f}" in shown
    assert f"{metrics['compressors']['xz_primed']:.4f}" in shown


def test_the_same_evaluation_is_not_made_twice(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, tasks=("code",))
    first = evaluate(config)
    monkeypatch.setattr(module, "write_functions", None)
    assert evaluate(config) == first
    with pytest.raises(DanluError, match="another run"):
        evaluate(replace(config, seed=1))
    monkeypatch.undo()
    assert evaluate(replace(config, out=None)) == first  # the same seed writes the same functions
    evaluate(replace(config, seed=1, overwrite=True))
    assert Card.load(config.out or "").config["seed"] == 1


def test_only_the_tasks_asked_for_are_done(config: EvaluateConfig) -> None:
    assert set(evaluate(replace(config, tasks=("compressors",)))) == {"compressors"}


def test_fine_tuned_models_are_asked_as_they_were_taught(config: EvaluateConfig, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(config.model, tuned)
    Card("model", "finetune", "1", {"seq_len": 64}).save(tuned)
    plain, chat = (
        replace(config, tasks=("code",)),
        replace(config, model=tuned, out=tmp_path / "tuned-out", tasks=("code",)),
    )
    evaluate(plain)
    evaluate(chat)
    first, second = (Card.load(c.out or "").details for c in (plain, chat))
    assert (first["prompt_format"], second["prompt_format"]) == ("plain", "chat")
    keys = [[(s["path"], s["name"], s["prompt"]) for s in details["samples"]] for details in (first, second)]
    assert keys[0] == keys[1]  # both stages are asked for the same functions


def test_a_corpus_without_functions_is_scored_all_the_same(config: EvaluateConfig, tmp_path: Path) -> None:
    prose = write_data(tmp_path / "prose", train=["Once upon a time. " * 20], heldout=["There was a furnace. " * 20])
    metrics = evaluate(replace(config, data=prose))
    assert "bits_per_byte" in metrics
    assert "parse_rate" not in metrics


def test_what_cannot_be_measured_is_told_and_leaves_nothing(config: EvaluateConfig, tmp_path: Path) -> None:
    train_only = write_data(tmp_path / "train-only", train=[source(0)])
    assert config.out is not None
    for broken, message in (
        (replace(config, data=train_only), "has no split 'heldout'"),
        (replace(config, data=config.model), "expected a data folder"),
        (replace(config, data=tmp_path / "missing"), "missing"),
        (replace(config, model=config.data), "is a data folder; expected a model folder"),
        (replace(config, model=tmp_path / "missing"), "no such model folder"),
        (replace(config, context=257), "context=257"),
        (replace(config, context=8, stride=9), "larger than context"),
        (replace(config, tasks=()), "tasks is empty"),
    ):
        with pytest.raises(DanluError, match=message):
            evaluate(broken)
        assert not (config.out / CARD).exists()
        assert not (config.out / RUN).exists()
    evaluate(replace(config, tasks=("compressors",)))  # the folder is still free


@pytest.mark.parametrize(("verb", "asked"), [("align", "chat"), ("distil", "chat"), ("pretrain", "plain")])
def test_models_that_were_taught_to_answer_are_asked(
    verb: str, asked: str, config: EvaluateConfig, tmp_path: Path
) -> None:
    taught = tmp_path / verb
    shutil.copytree(config.model, taught)
    card = Card.load(taught)
    replace(card, verb=verb, fingerprint=verb).save(taught)
    evaluate(replace(config, model=taught, tasks=("code",), functions=1))
    assert Card.load(config.out).details["prompt_format"] == asked
